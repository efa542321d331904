"""Which checkpoint of transformers' Trainer an interrupted fine-tuning continues from."""

import json

import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.trainer_checkpoints import TRAINER_STATE, check_processes, last_checkpoint


def test_the_newest_whole_checkpoint_counts(tmp_path):
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / TRAINER_STATE).write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-11" / TRAINER_STATE).write_text("{")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def test_what_deepspeed_divided_among_other_processes_is_refused(tmp_path):
    checkpoint = tmp_path / "run/trainer/checkpoint-10"
    (checkpoint / "global_step10").mkdir(parents=True)
    check_processes(checkpoint, 3)  # stage 0 divides nothing
    for rank in range(2):
        (checkpoint / f"global_step10/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_processes(checkpoint, 2)
    with pytest.raises(
        UserError, match=r"was saved by 2 processes, .* 3 cannot continue it: start 2, or remove '.*run' to"
    ):
        check_processes(checkpoint, 3)
