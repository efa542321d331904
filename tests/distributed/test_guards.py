"""What the trainer promises about numbers that are not finite, with real engines at every ZeRO stage and precision."""

from pathlib import Path

import pytest
from groups import run_group

pytestmark = pytest.mark.timeout(600)  # the first test waits for the group
COMBINATIONS = [
    "0-fp32",
    *(f"{stage}-{precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")),
    "2-fp16-muon",
    "3-fp32-muon",
]
RARE = ("0-fp32", "2-bf16", "3-fp16")
LOST = "lower the learning rate or warm up longer, and resume from the last checkpoint"


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Runs of two processes, with 4 steps each and a save every 2; the fault happens in the third step, on rank 1."""
    output = tmp_path_factory.mktemp("findings")
    worker = Path(__file__).with_name("guards_worker.py")
    found = run_group(2, "guards,weight_decay,loss_scale", corpus_folder, output, worker=worker)
    return {**found["guards"], **{name: found[name] for name in ("weight_decay", "loss_scale")}}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_run_that_diverges_ends_and_keeps_its_last_finite_checkpoint(findings, name):
    found = findings[name]["diverged"]
    assert f"of step 2 is not finite: {LOST}" in found["error"]
    assert found["saved"] == [1]  # and verified to be finite
    assert found["state"]["global_step"] == 1


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_loss_that_is_no_number_ends_a_run_that_does_not_roll_back(findings, name):
    found = findings[name]["nan"]
    assert found["error"].startswith("the loss (nan) or the gradient norm (")
    assert found["error"].endswith(f"of step 3 is not finite: {LOST}")
    assert (found["saved"], found["steps"], found["hidden"]) == ([2], [1, 2], [])
    assert found["state"]["skipped_steps"] == 0  # in fp16 too, where it is no overflow that a lower scale cures


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_run_that_rolls_back_leaves_out_the_data_of_such_a_loss(findings, name):
    found = findings[name]["rollback"]
    assert (found["error"], found["saved"], found["steps"]) == (None, [2, 4], [1, 2, 3, 4])
    assert found["applied_steps"] == 4
    state = found["state"]
    assert (state["loss_spikes"], state["skipped_steps"], state["consumed_samples"]) == (1, 0, 4 * 22)
    (places,) = state["skipped_places"]
    assert (places["global_step"], places["first_place"], places["end_place"]) == (2, 2 * 22, 3 * 22)
    scale = 2.0**12 if "fp16" in name else 1.0
    assert found["counted"] == [[0, 0, scale]] * 2 + [[0, 1, scale]] * 2
    assert state["best_step"] == 4
    assert state["recent_losses"] == found["losses"][-2:]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_gradient_that_is_not_finite_is_skipped_in_fp16_alone(findings, name):
    found = findings[name]["gradient"]
    if "fp16" in name:
        assert (found["error"], found["saved"]) == (None, [2, 4])
        assert found["counted"] == [[0, 0, 2.0**12]] * 2 + [[1, 0, 2.0**11]] * 2
        assert found["state"]["loss_scaler"]["cur_scale"] == 2.0**11
        assert (found["state"]["global_step"], found["applied_steps"]) == (4, 3)
    else:
        assert "or the gradient norm (inf) of step 3 is not finite" in found["error"]
        assert (found["saved"], found["steps"]) == ([2], [1, 2])


@pytest.mark.parametrize("name", RARE)
def test_a_run_that_was_rolled_back_and_resumed_is_bit_identical(findings, name):
    unbroken, found = findings[name]["rollback"], findings[name]["resumed"]
    assert found["equal"]
    assert found["losses"] == unbroken["losses"][2:]
    assert found["state"] == unbroken["state"]


@pytest.mark.parametrize("name", RARE)
def test_a_finite_spike_is_counted_stops_the_run_or_is_rolled_back(findings, name):
    found = findings[name]["spike warn"]
    assert (found["error"], found["saved"]) == (None, [2, 4])
    assert [spikes for _, spikes, _ in found["counted"]] == [0, 0, 1, 1]
    found = findings[name]["spike stop"]
    assert found["error"].startswith("the loss of step 3 is a spike: ")
    assert (found["saved"], found["steps"], found["hidden"]) == ([2], [1, 2], [])
    found, not_a_number = findings[name]["spike rollback"], findings[name]["rollback"]
    assert (found["error"], found["saved"], found["applied_steps"]) == (None, [2, 4], 4)
    assert found["losses"] == not_a_number["losses"]  # the same data are left out
    assert found["state"] == not_a_number["state"]


@pytest.mark.parametrize("key", ["weight", "exp_avg_sq"])
@pytest.mark.parametrize("name", RARE)
def test_what_is_not_finite_is_never_saved(findings, name, key):
    """The weight becomes infinite in the update of step 3, whose loss was finite."""
    found = findings[name][key]
    assert found["error"] == f"'{key}.lm_head.bias' after step 3 is not finite: {LOST}"
    assert (found["saved"], found["deepspeed"], found["hidden"]) == ([1, 2], [1, 2], [])


@pytest.mark.parametrize("name", RARE)
def test_a_weight_that_is_not_finite_is_rolled_back(findings, name):
    found = findings[name]["weight rollback"]
    assert (found["error"], found["saved"], found["steps"]) == (None, [1, 2, 3, 4], [1, 2, 3, 4])
    (places,) = found["state"]["skipped_places"]
    assert (places["first_place"], places["end_place"]) == (2 * 22, 3 * 22)


@pytest.mark.parametrize("name", RARE)
def test_a_held_out_loss_that_is_no_number_is_never_the_best(findings, name):
    found = findings[name]["held-out"]
    assert f"the held-out loss (nan) after step 4 is not finite: {LOST}" in found["error"]
    assert (found["saved"], found["state"]["best_step"]) == ([2], 2)


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_weight_decay_that_leaves_out_biases_and_norms_is_torchs_of_two_groups(findings, stage):
    """Decay of all would move LayerNorms by 1.5e-3."""
    found = findings["weight_decay"][stage]
    assert found["from torch"] < 1e-4
    assert found["resumed"] == 0.0


def test_a_resumed_fp16_run_scales_its_loss_as_the_unbroken_one(findings):
    """Scale, iteration, last overflow and free overflows left of DeepSpeed's scaler, and applied steps."""
    found = findings["loss_scale"]
    fallen = [[2.0**12, 1, 0, 1, 0], [2.0**11, 2, 1, 1, 0], [2.0**11, 3, 1, 1, 1]]
    grown = [[2.0**11, 4, 1, 1, 2], [2.0**12, 5, 1, 2, 3]]
    assert found == {"unbroken": fallen + grown, "portable": grown, "deepspeed": grown}
