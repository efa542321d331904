"""The layout's frame, without DeepSpeed: a stand-in engine writes the files."""

import sys

import pytest
import torch
from fake_engine import IDENTITY

from ds_roberta.errors import UserError
from ds_roberta.training import deepspeed_checkpoint
from ds_roberta.training.checkpoint import TrainState

CONFIG = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "fp16": {"enabled": False}}


class FakeDeepSpeed:
    """Writes what DeepSpeed's first rank writes, or tells that it could not."""

    def __init__(self, ranks, problem=None):
        self.ranks, self._problem = ranks, problem

    def save_deepspeed_checkpoint(self, folder, tag, client_state):
        if self.ranks.is_main:
            content = {"dp_world_size": self.ranks.world_size, "ds_config": CONFIG, **client_state}
            torch.save(content, folder / tag / "mp_rank_00_model_states.pt")
        return self._problem


@pytest.fixture
def save(tmp_path, on_ranks):
    """A function that saves a step from two processes; the second may have a problem."""

    def save_step(step, problem=None):
        def body(ranks):
            engine = FakeDeepSpeed(ranks, problem if ranks.rank else None)
            return deepspeed_checkpoint.save(engine, TrainState(IDENTITY, step), tmp_path / "run", keep_last=2)

        return on_ranks(2, body)

    return save_step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_found_by_its_tag_or_by_latest(tmp_path, save):
    (first, _), (second, _) = save(1), save(2)
    assert deepspeed_checkpoint.find(tmp_path / "run") == second
    assert deepspeed_checkpoint.find(first) == first
    assert deepspeed_checkpoint.find(tmp_path) is None
    (tmp_path / "run/latest").write_text("global_step7")
    assert deepspeed_checkpoint.find(tmp_path / "run") is None


def test_the_newest_are_kept(tmp_path, save):
    for step in (1, 2, 10):
        save(step)
    assert names(tmp_path / "run") == ["global_step10", "global_step2", "latest"]


def test_no_checkpoint_appears_where_a_process_could_not_write(tmp_path, save):
    save(1)
    for result in save(2, "No space left on device"):
        assert isinstance(result, UserError)
        assert "global_step2': No space left on device; earlier checkpoints are intact" in str(result)
    assert names(tmp_path / "run") == ["global_step1", "latest"]


def test_the_state_comes_back_where_the_run_is_of_the_same_kind(save):
    (path, _) = save(3)
    assert deepspeed_checkpoint.read_state(path, 2, 2, "bf16") == TrainState(IDENTITY, 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ((3, 2, "bf16"), "its number of processes is 2, this run's is 3"),
        ((2, 1, "bf16"), "its ZeRO stage is 2, this run's is 1"),
        ((2, 2, "fp32"), "its precision is 'bf16', this run's is 'fp32'"),
    ],
)
def test_runs_of_another_kind_are_pointed_to_the_portable_layout(save, kind, message):
    (path, _) = save(3)
    with pytest.raises(UserError) as caught:
        deepspeed_checkpoint.read_state(path, *kind)
    assert message in str(caught.value)
    assert "resume from the portable one in checkpoints/" in str(caught.value)


def test_a_json_without_a_stage_is_of_stage_0(save, monkeypatch):
    for content in ({}, {"zero_optimization": {}}):
        monkeypatch.setattr(sys.modules[__name__], "CONFIG", content)
        (path, _) = save(3)
        assert deepspeed_checkpoint.read_state(path, 2, 0, "fp32").global_step == 3


def test_another_programs_and_damaged_files_are_named(save):
    (path, _) = save(3)
    file = path / "mp_rank_00_model_states.pt"
    torch.save({"module": {}}, file)
    with pytest.raises(UserError, match="was not written by this program"):
        deepspeed_checkpoint.read_state(path, 2, 2, "bf16")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read DeepSpeed's checkpoint file .*mp_rank_00"):
        deepspeed_checkpoint.read_state(path, 2, 2, "bf16")
