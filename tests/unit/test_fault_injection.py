"""benchmarks/fault_injection.py and elastic_tour.py: what counts as a hit, as a loss, and as the same."""

import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks import fault_injection
from benchmarks.elastic_tour import Tour
from benchmarks.fault_injection import everything_is_saved, table
from benchmarks.fault_injection_targets import (
    INDEX,
    SAVE,
    START,
    STEP,
    TUNING_SAVE,
    Unbroken,
    differences,
    targets,
    written,
)
from benchmarks.interrupted import Phase, Watch, running
from ds_roberta.training.metrics import METRICS_NAME

PYTHON = (sys.executable, "-S", "-c")


def test_what_a_killed_command_left_is_not_taken_for_the_next_ones(tmp_path):
    phase, left = Phase("save", "run/.step*"), tmp_path / "run/.step3"
    left.mkdir(parents=True)
    (left / "weights").touch()
    (left / "state").touch()
    watch = Watch([phase], tmp_path)
    assert watch.now() is None
    (left / "state").unlink()  # the next start cleans up
    assert watch.now() is None
    (tmp_path / "run/.step6").mkdir()
    assert watch.now() == phase
    (tmp_path / "run/.step6").rename(tmp_path / "run/step6")
    assert watch.now() is None
    (left / "weights").write_text("again")
    assert watch.now() == phase


def test_a_save_of_a_fine_tuning_ends_with_its_last_file(tmp_path):
    checkpoint = tmp_path / ".tuned.runs/plan/run/trainer/checkpoint-10"
    checkpoint.mkdir(parents=True)
    assert list(TUNING_SAVE.traces(tmp_path)) == [str(checkpoint.relative_to(tmp_path))]
    (checkpoint / "trainer_state.json").touch()
    assert not TUNING_SAVE.traces(tmp_path)


def test_a_phase_is_met_as_often_as_asked_and_all_processes_are_killed(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    script = "import os, sys, time\nwhile True: os.mkdir('.x'); time.sleep(.01); os.rmdir('.x'); time.sleep(.01)"
    phase = Phase("x", ".x")
    with running((*PYTHON, script), folder) as run:
        assert Watch([phase], folder).wait_for(phase, 3, run)
        run.kill()
        assert run.wait() == [-9]
    with running((*PYTHON, "import os, time; os.mkdir('.y'); time.sleep(0.2)"), folder) as run:
        [(begin, end)] = Watch([Phase("y", ".y")], folder).spans(run)["y"]
        assert 0 < begin < begin + 0.1 < end
    with running((*PYTHON, "print('a last word')"), folder) as run:
        assert not Watch([phase], folder).wait_for(phase, 1, run)
        assert run.wait() == [0]
        assert run.printed() == "a last word\n"


def test_a_phase_that_does_not_come_is_not_waited_for_beyond_the_next(tmp_path):
    index, save = Phase("index", "index"), Phase("save", ".save")
    folder = tmp_path / "work"
    folder.mkdir()
    watch = Watch([index, save], folder)  # before the command makes its folder
    with running((*PYTHON, "import os, time; os.mkdir('.save'); time.sleep(60)"), folder) as run:
        assert watch.wait_for(index, 1, run)


def test_moments_are_in_the_order_of_the_run_and_follow_from_the_seed():
    target = targets(2)["pretraining"]
    assert target.aimed(1) == [STEP]
    assert target.aimed(9) == ["index", START, STEP, "save", STEP, "save", STEP, "save", "export"]
    unbroken = Unbroken({}, {"index": [(1, 2), (2, 4)], "save": [(10, 11), (20, 21), (30, 31)], "export": []})
    assert [aim for aim in target.aimed(9) if not unbroken.shows(target, aim)] == ["export"]
    aims = [START, INDEX.name, SAVE.name, STEP]
    moments = {aim: [unbroken.moment(target, aim, random.Random(seed)) for seed in range(99)] for aim in aims}
    assert moments[SAVE.name][7] == unbroken.moment(target, SAVE.name, random.Random(7))
    assert {aim: {(phase, n) for phase, n, _ in found} for aim, found in moments.items()} == {
        START: {(None, 0)}, INDEX.name: {(INDEX, 1)}, SAVE.name: {(SAVE, 1), (SAVE, 2)}, STEP: {(SAVE, 1), (SAVE, 2)},
    }  # fmt: skip
    longest = {aim: round(max(seconds for _, _, seconds in found)) for aim, found in moments.items()}
    assert longest == {START: 10, INDEX.name: 3, SAVE.name: 1, STEP: 10}


def write(folder: Path, seconds: float, weights: bytes = b"same") -> dict:
    (folder / "hf").mkdir(parents=True)
    (folder / "hf/model").write_bytes(weights)
    (folder / "hf/README.md").write_text(f"| seed | 0 |\n| commit of ds_roberta | {seconds} |\n")
    rows = [{"global_step": 1, "loss": 2.5, "step_seconds": seconds}]
    (folder / METRICS_NAME).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return dict(written(folder, ["hf/**/*", METRICS_NAME]))


def test_runs_are_the_same_if_all_but_their_times_and_commit_is(tmp_path):
    unbroken = write(tmp_path / "unbroken", 1.0)
    assert differences(write(tmp_path / "broken", 2.0), unbroken) == []
    assert differences(write(tmp_path / "other", 1.0, b"Same"), unbroken) == ["hf/model"]
    (tmp_path / "broken/.left.tmp").touch()
    left = dict(written(tmp_path / "broken", ["hf/**/*"]))
    assert differences(left, unbroken) == [".left.tmp", METRICS_NAME]


def test_a_stopped_run_has_its_last_step_in_a_checkpoint(tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "global_step2").mkdir(parents=True)
    (checkpoints / "latest").write_text("global_step2\n")
    target = targets(2)["pretraining"]
    for steps, saved in (([1, 2], True), ([1, 2, 3], False)):
        rows = (json.dumps({"global_step": step, "loss": 1.0}) for step in steps)
        (tmp_path / "run" / METRICS_NAME).write_text("\n".join(rows))
        assert everything_is_saved(target, tmp_path, 0.0) == saved


def test_a_run_that_differs_loses_all_its_kills():
    found = [
        {"target": "export", "landed": ["export", "start"], "lost": []},
        {"target": "export", "landed": ["export"], "lost": ["exported/model.safetensors"]},
    ]
    assert list(table(found))[2:] == [
        "| export | the export | 2 | 1 | 1 |",
        "| export | the start | 1 | 1 | 0 |",
        "| **all** | | **3** | **2** | **1** |",
    ]


def test_finished_runs_are_kept_and_made_until_there_are_enough_kills(tmp_path, monkeypatch):
    made = []

    def broken_run(options, results, name, kind, wanted, target, ground, lock):
        made.append((name, wanted))
        return {"target": target.name, "landed": ["start"] * min(wanted, 3), "lost": []}

    monkeypatch.setattr(fault_injection, "broken_run", broken_run)
    chosen = list(targets(1).values())[:2]

    def kills(wanted):
        made.clear()
        found = list(fault_injection.runs(None, tmp_path, "kills", wanted, chosen, None))
        return sum(len(run["landed"]) for run in found), made

    assert kills(5) == (5, [("kills-000-preprocessing", 5), ("kills-001-pretraining", 2)])
    assert kills(5) == (5, [])
    assert kills(7) == (7, [("kills-002-preprocessing", 2)])


def test_a_step_that_is_missing_or_differs_is_lost():
    unbroken = {1: 2.0, 2: 1.5, 3: 1.25}
    row = Tour({2: 1, 3: 2}, {1: 2.0, 2: 1.5 + 9e-6, 3: 1.25}, unbroken).row("Muon")
    assert row == "| Muon | 2 from step 1, 3 from step 2 | 3 | 9.0e-06 | 3 | 0 |"
    for losses in ({1: 2.0, 2: 1.5}, {1: 2.0, 2: 1.5, 3: float("nan")}, {1: 2.0, 2: 1.5, 3: 1.2499}):
        assert Tour({2: 1}, losses, unbroken).row("Muon").endswith("| 2 | 1 |")


@pytest.mark.parametrize("name", list(targets(1)))
def test_every_aim_is_a_phase_of_its_command(name):
    target = targets(1)[name]
    aims = target.aimed(100)
    assert len(aims) == len(target.aims)
    assert {*aims} - {START, STEP} <= {phase.name for phase in target.phases}
    assert {*aims, *(phase.name for phase in target.phases), target.outside} <= {*fault_injection.WHERE}
