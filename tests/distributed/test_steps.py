"""What DeepSpeed does at the edges of a step, with two processes."""

from pathlib import Path

import pytest
from groups import run_group

WORKER = Path(__file__).with_name("step_worker.py")


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("findings")
    return run_group(2, "growth,layouts,failure,buckets,devices", corpus_folder, output, worker=WORKER)


def test_a_loss_scale_that_grows_leaves_the_step_as_it_is(findings):
    for stage, found in findings["growth"].items():
        assert found["scales"] == [2.0**8, 2.0**9], stage
        assert found["rows"][0] == found["rows"][1], stage
        assert found["same_weights"], stage


def test_no_setting_of_how_zero_divides_tensors_changes_the_training(findings):
    """Weights are those that checkpoints get: with `round_robin_gradients`, they would be other parameters'."""
    for stage, (losses, changed, same_weights) in findings["layouts"].items():
        assert losses == changed, stage
        assert same_weights, stage


def test_a_failure_within_a_step_reduces_nothing(findings):
    """Other ranks wait elsewhere: a rank that waited for them here would never tell what failed."""
    assert findings["failure"] == {"1-fp16": 0, "2-fp32": 0, "3-bf16": 0}


def test_the_memory_of_buckets_is_known_before_they_are_there(findings):
    assert findings["buckets"]["on the device"] == [0, 0]
    foreseen, taken = findings["buckets"]["offloaded"]
    assert foreseen == taken > 0


def test_processes_agree_on_muons_precision(findings):
    assert findings["devices"] == [["torch.float32"] * 2, ["torch.bfloat16"] * 2]
