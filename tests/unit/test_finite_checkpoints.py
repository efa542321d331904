"""Only finite numbers are saved."""

import math

import pytest
import torch
from fake_engine import IDENTITY, FakeEngine

from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention
from ds_roberta.training.loss_spikes import LossSpike


@pytest.mark.parametrize("key", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_on_one_process_is_one_error_on_all_and_nothing_is_written(
    tmp_path, tokenizer_folder, on_ranks, key, value
):

    def body(ranks):
        engine = FakeEngine(ranks)
        for parameter in engine.module.parameters():  # each is written by one process
            engine.full_tensors(parameter)[key].view(-1)[-1] = value if ranks.rank == 1 else 0.0
        with CheckpointWriter(engine, tokenizer_folder, tmp_path / "run", Retention(9)) as writer:
            writer.save(TrainState(IDENTITY, 2))

    results = on_ranks(2, body)
    assert [type(result) for result in results] == [LossSpike] * 2
    assert str(results[0]) == str(results[1])
    assert f"'{key}." in str(results[0])
    assert "after step 2 is not finite" in str(results[0])
    assert not (tmp_path / "run").exists()


def test_the_largest_finite_numbers_are_saved(tmp_path, tokenizer_folder, solo_ranks):
    engine = FakeEngine(solo_ranks)
    for parameter in engine.module.parameters():
        parameter.data.fill_(torch.finfo(torch.float32).max)
    with CheckpointWriter(engine, tokenizer_folder, tmp_path / "run", Retention(9)) as writer:
        path = writer.save(TrainState(IDENTITY, 2))
    checkpoint.verify(path)
