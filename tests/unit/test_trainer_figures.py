"""What the training loop logs of a step, how often, and what it takes for a spike."""

import math
import time
from dataclasses import replace

import pytest
from fake_training import Result
from test_trainer import PEAK_FLOPS, STEPS, rows
from test_trainer import make as make_trainer

make = make_trainer


def test_the_figures_of_a_step_fit_together(make):
    trainer = make("off")
    tokens = 0
    for step in range(2):
        row = trainer.train_step(trainer.loader.micro_batches(step), time.perf_counter() - 0.2)
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(row["consumed_tokens"] - tokens)
        tokens = row["consumed_tokens"]
        assert 0.2 <= row["data_wait_share"] * row["step_seconds"] < row["step_seconds"]
        flops = trainer.objective.flops_per_token(trainer.config.model, 4, 1 / 4)  # each sequence has one label
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / PEAK_FLOPS)
        assert row["grad_norm"] == 2.5


def test_each_so_many_steps_are_logged(make):
    trainer = make("off", log_interval=7)
    assert trainer.train()
    assert [row["global_step"] for row in rows(trainer)] == [*range(7, STEPS, 7), STEPS]


def test_the_norm_of_a_gradient_that_overflows_is_logged_as_null(make):
    trainer = make("off")
    step = trainer.engine.step

    def overflow(*arguments):
        return Result(math.inf, skipped=True) if trainer.state.global_step == 2 else step(*arguments)

    trainer.engine.step = overflow
    assert trainer.train()
    assert [row["grad_norm"] for row in rows(trainer)] == [2.5, 2.5, None, *[2.5] * (STEPS - 3)]


def test_the_threshold_decides_what_is_a_spike(make):
    for threshold, spikes in ((10.0, 1), (1e6, 0)):
        trainer = make("warn", name=f"run-{threshold}")
        trainer.config = replace(trainer.config, guard=replace(trainer.config.guard, loss_spike_threshold=threshold))
        assert trainer.train()
        assert trainer.state.loss_spikes == spikes
