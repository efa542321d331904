"""The training step's contracts, in real process groups: any partition gives the same step, any break the same run.

Each group of processes runs many configurations, because starting one costs seconds.
"""

from pathlib import Path

import numpy as np
import pytest
from groups import run_group

pytestmark = pytest.mark.timeout(900)  # the first test waits for four groups, which are slow where bf16 is emulated
WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("findings")


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, output: Path) -> dict:
    """Findings of all cases; two processes write the checkpoint from which the others go on."""
    for processes, cases in (
        (2, "partition,resume,elastic,overflow,overflow_at_the_floor,trials,recomputation"),
        (1, "partition,elastic,accumulation"),
        (3, "partition,elastic"),
        (4, "partition,elastic"),
    ):
        found = run_group(processes, cases, corpus_folder, output)
    return found


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def cases(findings: dict, precision: str) -> dict[tuple[str, int], list[dict]]:
    return {
        (name, world_size): rows
        for world_size in WORLD_SIZES
        for name, rows in findings[f"partition-{world_size}"].items()
        if precision in name
    }


def test_every_partition_trains_on_the_same_inputs_and_labels(findings):
    reference = [row["data"] for row in findings["partition-1"]["0-fp32-4"]]
    assert all(len(data) == 22 for data in reference)
    for precision, world_sizes in (("fp32", WORLD_SIZES), ("bf16", (2, 3)), ("fp16", (2, 3))):
        found = cases(findings, precision)
        assert {world_size for _, world_size in found} == set(world_sizes)
        for case, rows in found.items():
            assert [row["data"] for row in rows] == reference, case


@pytest.mark.parametrize(
    ("precision", "tolerance", "parameter_tolerance"),
    [("fp32", 1e-6, 1e-5), ("bf16", 1e-3, None), ("fp16", 1e-4, None)],
)
def test_a_step_does_not_depend_on_the_partition(findings, output, capsys, precision, tolerance, parameter_tolerance):
    """Prints how far the losses, gradient norms and, after three steps, the parameters are from one process's."""
    reference = findings["partition-1"]["0-fp32-4"]
    lines = ["ZeRO-precision-micro_batch  processes  loss     gradient  parameters"]
    with np.load(output / "0-fp32-4-1.npz") as expected:
        expected = dict(expected)
    for (name, world_size), rows in sorted(cases(findings, precision).items()):
        loss, norm = (
            max(abs(row[key] / right[key] - 1) for row, right in zip(rows, reference, strict=True))
            for key in ("loss", "grad_norm")
        )
        with np.load(output / f"{name}-{world_size}.npz") as final:
            moved = max(float(np.abs(final[key] - expected[key]).max()) for key in expected)
        lines.append(f"{name:<27} {world_size:>9}  {loss:.1e}  {norm:.1e}   {moved:.1e}")
        assert loss <= tolerance, (name, world_size)
        assert norm <= 10 * tolerance, (name, world_size)
        assert parameter_tolerance is None or moved <= parameter_tolerance, (name, world_size)
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reduces_every_gradient_once_at_every_stage(findings, output, precision):
    with np.load(output / "0-fp32-4-1.npz") as parameters:
        gradient_elements = sum(value.size for value in parameters.values())
    for (name, world_size), rows in cases(findings, precision).items():
        if world_size > 1:
            for row in rows:  # besides: a norm, a flag, padding to equal partitions
                assert gradient_elements <= row["reduced"] <= gradient_elements + 1_000, (name, world_size)


@pytest.mark.parametrize("layout", ["portable", "deepspeed"])
def test_a_resumed_run_is_bit_identical_to_the_unbroken_one(findings, layout):
    for name, case in findings["resume-2"].items():
        resumed = case[layout]
        assert resumed["losses"] == case["unbroken"], name
        assert resumed["largest_difference"] == 0.0, name
        assert resumed["loss_scaler"][0] == resumed["loss_scaler"][1], name


def test_an_offloaded_optimizer_takes_the_same_steps(findings):
    """A gradient that is rounded to bf16 on its way to the host moves the losses by some 1e-4."""
    for name in ("1-bf16", "2-fp32", "3-bf16"):
        found, expected = (findings["resume-2"][case]["unbroken"] for case in (f"{name}-offloaded", name))
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_goes_on_at_another_world_size_stage_and_micro_batch(findings, world_size):
    unbroken = findings["elastic-2"]["unbroken"]
    for name, found in findings[f"elastic-{world_size}"].items():
        assert [row["data"] for row in found] == [row["data"] for row in unbroken], name
        np.testing.assert_allclose(losses(found), losses(unbroken), rtol=1e-5, err_msg=name)


def test_an_fp16_overflow_skips_the_step_and_halves_the_loss_scale(findings):
    assert findings["overflow"] == {"skipped": True, "unchanged": True, "scales": [2.0**39]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_that_no_loss_scale_cures_ends_the_run_with_the_tensors_name(findings, stage):
    skipped, message = findings["overflow_at_the_floor"][f"{stage}-dynamic"]
    assert skipped == [True]  # from 2 to its floor of 1
    assert "loss scale 1, which is at its floor (fp16.min_loss_scale)" in message
    assert "(not finite: lm_head.bias):" in message
    skipped, message = findings["overflow_at_the_floor"][f"{stage}-fixed"]
    assert skipped == []
    assert "loss scale 2, which is fixed" in message
    assert "(not finite: lm_head.bias):" in message


def test_trials_that_run_out_of_memory_agree_and_leave_no_trace(findings):
    assert len(findings["trials"]) == 5
    for name, found in findings["trials"].items():
        assert found == {"size": 3, "equal": True}, name


def test_recomputed_activations_are_those_that_are_kept_otherwise(findings):
    for case, (kept, recomputed) in findings["recomputation"].items():
        assert kept == recomputed, case


def test_hundreds_of_micro_steps_in_bf16_are_as_exact_as_two(findings):
    """A bf16 sum of 256 gradients is off by 5%; the bf16 products alone are by half a percent."""
    errors = findings["accumulation"]
    assert errors["bf16-128"] < 0.01
    assert errors["bf16-1"] < 1.1 * errors["bf16-128"]


def test_the_gradient_of_a_large_batch_does_not_fall_out_of_the_range_of_fp16(findings):
    errors = findings["accumulation"]
    assert errors["fp16-128"] < 2e-3
    assert errors["fp16-128-large"] < 1.01 * errors["fp16-128"]
