"""The training loop with a stand-in engine: stages, loss spikes, and resuming after an interruption."""

import errno
import json
import math
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from fake_training import FakeEngine, HeldOut, Interrupted, PlacesCollator
from monitor_readers import assert_same_series, csv_series, expected_series, tensorboard_series

from ds_roberta.config import GuardConfig, IntervalConfig, PackingConfig, ScheduleConfig, model_config
from ds_roberta.data.loader import LoaderStage, TrainLoader
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.stages import SkippedPlaces, make_stages
from ds_roberta.errors import UserError
from ds_roberta.files import append_line
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training import checkpoint, loss_spikes, metrics
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.facts import completed_identity
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.settings import RunConfig
from ds_roberta.training.trainer import Trainer

STEPS, SAVE_INTERVAL, WINDOW = 60, 25, 8
PEAK_FLOPS = 1e9
STAGES = make_stages(8, 12, "0:4,30:8", "0:4,20:12")  # step 30 lies between a checkpoint and SPIKE
IDENTITY = completed_identity({"model": asdict(model_config("tiny", 400, 8)), "packing": {"max_seq_length": 8}})
LINES = {"unigram_loss": 7.0, "neighbour_loss": 5.0}
STILL = {0: 9.0, 12: 6.95, 42: 6.2, 48: 6.19, 54: 4.9}
"""Held-out losses on one plateau and then another, and beyond both; until step 30 the sequences are too short."""
SPIKE = (8, 12 * 15)
"""A place of length 8, of step 46."""


@pytest.fixture
def make(tmp_path, corpus_folder, solo_ranks, monkeypatch):
    """A function that makes a trainer as a run does, from the newest checkpoint where there is one."""
    monkeypatch.setattr(loss_spikes, "WINDOW", WINDOW)

    def make(
        policy,
        spikes=(SPIKE,),
        name="run",
        interrupted_at=None,
        height=100.0,
        monitors=None,
        plateau="warn",
        held_out=None,
        stopped_at=None,
        resume=None,
        **intervals,
    ):
        config = RunConfig(
            data_dir=corpus_folder,
            output_dir=tmp_path / name,
            model_name="tiny",
            model=model_config("tiny", 400, 8),
            packing=PackingConfig(8),
            schedule=ScheduleConfig(STEPS, 5),
            stages=STAGES,
            intervals=IntervalConfig(**{"save_interval": SAVE_INTERVAL, **intervals}),
            guard=GuardConfig(policy, loss_plateau=plateau),
        )
        config.output_dir.mkdir(exist_ok=True)
        loader = TrainLoader(
            [
                LoaderStage(stage, PlacesCollator(stage.max_seq_length), SampleOrder(10_000, 0), 4)
                for stage in config.stages
            ]
        )
        engine = FakeEngine(solo_ranks, dict.fromkeys(spikes, height), interrupted_at)
        path = resume or checkpoint.choose("auto", config.output_dir / checkpoint.CHECKPOINTS_FOLDER)
        state = TrainState(IDENTITY, lines=LINES) if path is None else checkpoint.load(engine, path)
        if resume:
            state.begin_at(str(resume), is_own=False)
        trainer = Trainer(
            config,
            engine,
            loader,
            None,
            state,
            path,
            peak_learning_rate=1e-3,
            peak_flops=PEAK_FLOPS,
            monitors=monitors or Monitors(config.output_dir, {}, False),
        )
        trainer._held_out = held_out and HeldOut(trainer, held_out, stopped_at)
        return trainer

    return make


def rows(trainer):
    found, _ = metrics.read_metrics(trainer.config.output_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in metrics.MACHINE_COLUMNS} for row in found]


def places(trainer, length):
    """The places that the steps of the run drew, each step as it was taken last."""
    return [
        place for step in sorted(trainer.engine.places) for place in trainer.engine.places[step] if place[0] == length
    ]


def whole(length, count, left_out=range(0)):
    return sorted((length, place) for place in range(count + len(left_out)) if place not in left_out)


def test_stages_draw_their_places_and_every_sample_is_counted(make):
    trainer = make("warn", spikes=())
    assert trainer.train()
    assert sorted(places(trainer, 4)) == whole(4, 20 * 4 + 10 * 12)
    assert sorted(places(trainer, 8)) == whole(8, 30 * 12)
    assert [row["consumed_samples"] for row in rows(trainer)] == [
        4 * step if step <= 20 else 80 + 12 * (step - 20) for step in range(1, STEPS + 1)
    ]
    assert trainer.state.consumed_tokens == 4 * 200 + 8 * 360
    assert trainer.engine.micro_batch_sizes == [(4, 4), (12, 4), (12, 4)]
    assert {row["loss_spikes"] for row in rows(trainer)} == {row["skipped_samples"] for row in rows(trainer)} == {0}


def test_utilisation_is_of_each_steps_own_tokens_masks_and_length(make):
    trainer = make("warn", spikes=())
    assert trainer.train()
    lines = (trainer.config.output_dir / "metrics.jsonl").read_text().splitlines()
    for row, batch, length in [(json.loads(lines[0]), 4, 4), (json.loads(lines[-1]), 12, 8)]:
        per_token = MaskedLM.flops_per_token(trainer.config.model, length, 1 / length)  # one masked a sequence
        assert row["mfu"] * row["step_seconds"] * PEAK_FLOPS == pytest.approx(batch * length * per_token)


@pytest.mark.parametrize(("policy", "counted"), [("off", 0), ("warn", 1)])
def test_a_spike_is_passed_or_counted(make, capsys, policy, counted):
    trainer = make(policy)
    assert trainer.train()
    assert [row["loss_spikes"] for row in rows(trainer)] == [0] * 45 + [counted] * 15
    assert capsys.readouterr().err.count("the loss of step 46 is a spike") == counted
    assert sorted(places(trainer, 8)) == whole(8, 360)


def test_a_stage_is_judged_by_its_own_losses(make):
    trainer = make("stop", spikes=[(8, 12 * (WINDOW - 1))])  # the eighth step at this length
    assert trainer.train()


def test_a_stop_saves_nothing_of_the_spiked_step(make):
    trainer = make("stop")
    with pytest.raises(UserError, match=r"loss of step 46 is a spike: 9\.\d+, above 1\.\d+; the step is not saved"):
        trainer.train()
    folder = trainer.config.output_dir / checkpoint.CHECKPOINTS_FOLDER
    assert checkpoint.saved_steps(folder) == [25]
    checkpoint.verify(folder / "global_step25")
    assert rows(trainer)[-1]["global_step"] == 45


def test_a_rollback_leaves_out_the_data_since_the_last_checkpoint(make):
    trainer = make("rollback")
    assert trainer.train()
    assert sorted(places(trainer, 4)) == whole(4, 200, left_out=range(80 + 5 * 12, 200))
    assert sorted(places(trainer, 8)) == whole(8, 360, left_out=range(16 * 12))
    found = rows(trainer)
    assert [row["global_step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["skipped_samples"] for row in found] == [0] * 25 + [21 * 12] * 35
    assert [row["loss_spikes"] for row in found] == [0] * 25 + [1] * 35
    assert trainer.state.consumed_samples == 80 + 40 * 12
    assert trainer.state.skipped_places == [SkippedPlaces(25, 4, 140, 200), SkippedPlaces(25, 8, 0, 192)]


def test_a_run_with_a_rollback_that_is_broken_off_goes_on_as_the_unbroken_one(make):
    unbroken = make("rollback", name="unbroken")
    assert unbroken.train()
    for interrupted_at in (1, 26, 46, 47, 48, 75):
        name = f"interrupted at {interrupted_at}"
        with pytest.raises(Interrupted):
            make("rollback", name=name, interrupted_at=interrupted_at).train()
        resumed = make("rollback", name=name)
        assert resumed.train()
        assert rows(resumed) == rows(unbroken), name
        assert resumed.state == unbroken.state, name
        assert torch.equal(resumed.engine.module.weight, unbroken.engine.module.weight), name
        for step, drawn in resumed.engine.places.items():
            assert drawn == unbroken.engine.places[step], name


@pytest.mark.parametrize("stopped_at", [0, 12, 24, STEPS])
def test_a_run_that_is_stopped_while_it_evaluates_goes_on_as_the_unbroken_one(make, stopped_at):
    options = {"held_out": STILL, "eval_interval": 12}
    unbroken = make("off", name="unbroken", **options)
    assert unbroken.train()
    assert not make("off", stopped_at=stopped_at, **options).train()
    resumed = make("off", **options)
    assert resumed.state.global_step == stopped_at
    assert resumed.train()
    assert rows(resumed) == rows(unbroken)
    assert resumed.state == unbroken.state


def test_a_run_that_began_elsewhere_is_not_rolled_back_to_what_was_in_its_folder(make, tmp_path, capsys):
    with pytest.raises(Interrupted):
        make("rollback", interrupted_at=30).train()
    begun = tmp_path / "run/checkpoints/global_step25"
    shutil.copytree(begun, tmp_path / "other/checkpoints/global_step10")
    trainer = make("rollback", name="other", resume=begun)
    assert trainer.train()
    assert f"rolled back to {begun};" in capsys.readouterr().err
    assert trainer.state.skipped_places[0].global_step == 25
    assert trainer.state.resumed_from == str(begun)


def test_a_checkpoint_in_deepspeeds_layout_that_cannot_be_written_leaves_the_portable_one(make, monkeypatch):
    def refuse(*_):
        raise UserError("the disk is full")

    trainer = make("warn")
    monkeypatch.setattr("ds_roberta.training.deepspeed_checkpoint.save", refuse)
    monkeypatch.setattr(trainer, "config", replace(trainer.config, save_deepspeed_checkpoint=True))
    trainer.state.global_step = 7
    with pytest.raises(UserError, match="the disk is full"):
        trainer.save()
    checkpoint.verify(trainer.config.output_dir / "checkpoints/global_step7")


@pytest.mark.parametrize("logged", [30, 60])
def test_a_full_disk_under_the_metrics_ends_a_run_that_goes_on_as_the_unbroken_one(make, monkeypatch, logged):
    whole_run = make("warn", name="whole")
    assert whole_run.train()
    lines = []

    def append(path, line):
        lines.append(line)
        if len(lines) == logged:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append_line(path, line)

    monkeypatch.setattr(metrics, "append_line", append)
    with pytest.raises(UserError, match=r"cannot write '.*metrics.jsonl' \(No space left.*to continue from the newest"):
        make("warn").train()
    trainer = make("warn")
    assert trainer.state.global_step == logged // SAVE_INTERVAL * SAVE_INTERVAL
    assert trainer.train()
    assert rows(trainer) == rows(whole_run)


def test_after_a_rollback_the_monitors_show_each_step_once_with_the_value_that_holds(make, tmp_path):
    place = {"enabled": True, "output_path": str(tmp_path)}
    sections = {"tensorboard": {**place, "job_name": "tb"}, "csv_monitor": {**place, "job_name": "csv"}}
    (tmp_path / "run").mkdir()
    monitors = Monitors(tmp_path / "run", sections, may_roll_back=True)
    monitors.open(pytest.fail)
    trainer = make("rollback", monitors=monitors)
    assert trainer.train()
    assert trainer.state.loss_spikes == 1
    expected = expected_series(json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert list(expected["Train/loss"]) == list(range(1, STEPS + 1))
    assert_same_series(csv_series(tmp_path / "csv"), expected)
    assert_same_series(tensorboard_series(tmp_path / "tb"), expected, tolerance=1e-6)


def test_a_second_spike_since_the_same_checkpoint_stops(make):
    # Step 42 after the rollback, which draws 12 steps' places from 16 * 12 on.
    trainer = make("rollback", spikes=[SPIKE, (8, 12 * (16 + 11))])
    with pytest.raises(UserError, match=r"step 42 is a spike.*second one since step 25"):
        trainer.train()


def test_a_checkpoint_whose_model_has_diverged_is_not_one_to_go_back_to(make):
    with pytest.raises(Interrupted):
        make("rollback", interrupted_at=30).train()
    trainer = make("rollback", held_out={0: math.nan}, eval_interval=25)
    with pytest.raises(UserError, match=r"\(nan\) after step 25 is not finite, at the checkpoint '.*step25' itself"):
        trainer.train()


def test_spikes_with_a_checkpoint_between_them_are_rolled_back_each(make):
    trainer = make("rollback", spikes=[SPIKE, (8, 12 * (16 + 25))])  # the second in step 56
    assert trainer.train()
    assert trainer.state.loss_spikes == 2
    assert [entry.global_step for entry in trainer.state.skipped_places] == [25, 25, 50]
    left_out = [*range(16 * 12), *range(12 * (16 + 20), 12 * (16 + 26))]
    assert sorted(places(trainer, 8)) == whole(8, 360, left_out)


def test_without_a_checkpoint_there_is_no_way_back(make):
    with pytest.raises(UserError, match=r"step 46 is a spike.*there is no checkpoint to go back to"):
        make("rollback", save_interval=50).train()


def test_a_loss_that_is_not_finite_stops_or_is_rolled_back(make):
    with pytest.raises(UserError, match=r"the loss \(nan\).*step 46 is not finite"):
        make("warn", height=math.nan, name="stopped").train()
    trainer = make("rollback", height=math.nan)
    assert trainer.train()
    assert np.isfinite([row["loss"] for row in rows(trainer)]).all()


@pytest.mark.parametrize(("plateau", "interrupted_at"), [("off", None), ("warn", 22), ("warn", 45)])
def test_each_plateau_is_said_once_and_a_broken_off_run_decides_the_same(make, capsys, plateau, interrupted_at):
    options = {"plateau": plateau, "held_out": STILL, "eval_interval": 6, "save_interval": 10}
    unbroken = make("off", name="unbroken", **options)
    assert unbroken.train()
    said = capsys.readouterr().err
    words = ["step 36: the held-out loss, 6.9500, is not 0.15 below 7.0000", "step 48: the held-out loss, 6.1900, has"]
    assert [said.count(each) for each in words] == [plateau == "warn"] * 2
    assert said.count("When the loss does not fall") == 2 * (plateau == "warn")
    if interrupted_at:
        with pytest.raises(Interrupted):
            make("off", interrupted_at=interrupted_at, **options).train()
        resumed = make("off", **options)
        assert resumed.train()
        assert rows(resumed) == rows(unbroken)
        assert resumed.state == unbroken.state
        said = capsys.readouterr().err
        assert [said.count(each) for each in words] == [1, 1]
    evaluated = [row for row in rows(unbroken) if "eval_loss" in row]
    assert {name: evaluated[0][name] for name in LINES} == LINES
    assert not any(row.keys() & LINES for row in evaluated[1:])


def test_a_plateau_ends_a_run_after_its_step_is_saved_each_time_until_told_otherwise(make):
    options = {"held_out": STILL, "eval_interval": 6}
    for _ in range(2):
        trainer = make("off", plateau="stop", **options)
        with pytest.raises(
            UserError, match=r"^step 36: .* is not 0.15 below 7.0000.*saved.*a new run with --recipe fast"
        ):
            trainer.train()
        assert checkpoint.saved_steps(trainer.config.output_dir / checkpoint.CHECKPOINTS_FOLDER)[0] == 36
        assert trainer.state.global_step == 36
    assert make("off", plateau="warn", **options).train()


def test_a_rollback_to_a_checkpoint_of_an_earlier_version_keeps_the_lines_and_the_best_step(make):
    trainer = make("rollback", held_out={0: 9.0}, interrupted_at=30, eval_interval=20)
    trainer.state.lines, trainer.state.identity = {}, {name: IDENTITY[name] for name in ("model", "packing")}
    with pytest.raises(Interrupted):
        trainer.train()
    trainer = make("rollback", held_out={0: 9.0}, eval_interval=20, save_interval=50)
    trainer.state.lines, trainer.state.identity = LINES, IDENTITY
    assert trainer.train()
    assert trainer.state.best_step == 20
    logged = [row for row in rows(trainer) if row.keys() & LINES]
    assert [{name: row[name] for name in LINES} for row in logged] == [LINES]
    assert trainer.state.loss_spikes == 1
    assert trainer.state.lines == LINES
