import shutil
import sys

import pytest
from monitor_readers import assert_same_series, csv_series, expected_series, tensorboard_series
from torch.utils.tensorboard import SummaryWriter

from ds_roberta.errors import UserError
from ds_roberta.training.metrics import MetricsLog
from ds_roberta.training.monitors import RECORD_NAME, Monitors
from ds_roberta.training.wandb_monitor import WandbMonitor


@pytest.fixture
def sections(tmp_path):
    place = {"enabled": True, "output_path": str(tmp_path / "monitors")}
    return {"tensorboard": {**place, "job_name": "tb"}, "csv_monitor": {**place, "job_name": "csv"}}


@pytest.fixture
def run(tmp_path, sections, monkeypatch):
    """A function that starts a run at a step and takes it to another, with an evaluation each three steps."""
    from tensorboard.summary.writer import event_file_writer

    # TensorBoard reads files by name: time, host, process, and a count that begins with the process.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    output = tmp_path / "run"
    output.mkdir()

    def run(first, last, attempt=0, say=pytest.fail):
        monitors = Monitors(output, sections, may_roll_back=False)
        monitors.check()
        monitors.open(say)
        log = MetricsLog(output, first)
        monitors.start(log, first, say)
        for step in range(first, last + 1):
            rows = [{"global_step": step, "loss": step + attempt / 10, "grad_norm": None if step == 2 else 1.0}]
            rows = rows if step > first else []  # the step that it stands at was taken before
            rows += [{"global_step": step, "eval_loss": -step - attempt / 10}] if step % 3 == 0 else []
            for row in rows:
                log.write(row)
                monitors.write(row)
        return log  # as a kill leaves it: nothing is closed

    return run


def assert_monitors_show(log, folder):
    expected = expected_series(log.rows())
    assert_same_series(csv_series(folder / "csv"), expected)
    assert_same_series(tensorboard_series(folder / "tb"), expected, tolerance=1e-6)


def test_each_step_is_shown_once_with_its_last_value(run, tmp_path):
    folder = tmp_path / "monitors"
    run(0, 7)
    assert_monitors_show(run(3, 9, attempt=1), folder)  # an evaluation at the step that it stands at
    assert_monitors_show(run(4, 5, attempt=2), folder)  # ends before the lost steps
    assert_monitors_show(run(0, 2, attempt=3), folder)  # from the beginning, without the evaluation at 3
    assert_monitors_show(run(2, 8, attempt=4), folder)
    assert_monitors_show(run(0, 0, attempt=5), folder)  # a series without a step is gone


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_what_a_kill_left_in_the_middle_of_a_write_is_no_harm(run, tmp_path, lost):
    run(0, 7)
    (events,) = (tmp_path / "monitors/tb").glob("*tfevents*")
    for path in (events, tmp_path / "monitors/csv/Train_loss.csv"):
        path.write_bytes(path.read_bytes()[:-lost])
    assert_monitors_show(run(4, 9, attempt=1), tmp_path / "monitors")


def test_a_monitor_that_is_switched_on_later_gets_the_steps_before(run, sections, tmp_path):
    shown = dict(sections)
    sections.clear()
    run(0, 5)
    sections.update(shown)
    assert_monitors_show(run(4, 7), tmp_path / "monitors")


def test_a_monitor_that_was_off_for_some_steps_gets_them_later(run, sections, tmp_path):
    run(0, 4)
    shown = dict(sections)
    sections.clear()
    run(4, 7)
    sections.update(shown)
    assert_monitors_show(run(7, 9), tmp_path / "monitors")


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(run, sections, tmp_path):
    run(0, 4)
    before = {path: path.read_bytes() for path in (tmp_path / "monitors").rglob("*") if path.is_file()}
    (tmp_path / "other").mkdir()
    for name in sections:
        other = Monitors(tmp_path / "other", {name: sections[name]}, may_roll_back=False)
        with pytest.raises(UserError, match=f"{name} would mix two runs.*choose another {name}.job_name"):
            other.check()
    assert {path: path.read_bytes() for path in (tmp_path / "monitors").rglob("*") if path.is_file()} == before


def test_a_copy_of_a_run_leaves_the_monitors_of_the_first_alone(run, sections, tmp_path):
    log = run(0, 4)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(UserError, match="would mix two runs"):
        Monitors(tmp_path / "copy", sections, may_roll_back=False).check()
    assert_monitors_show(log, tmp_path / "monitors")
    shutil.rmtree(tmp_path / "run")  # as if it had been moved
    moved = Monitors(tmp_path / "copy", sections, may_roll_back=False)
    moved.check()
    moved.open(pytest.fail)
    moved.start(MetricsLog(tmp_path / "copy", 4), 4, pytest.fail)
    moved.close(complete=True)


def test_a_folder_that_cannot_be_made_and_a_damaged_record_are_user_errors(sections, tmp_path):
    (tmp_path / "monitors").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write '.*monitors/tb'.*change tensorboard.output_path"):
        Monitors(tmp_path, sections, may_roll_back=False).open(pytest.fail)
    (tmp_path / RECORD_NAME).write_text("{}")
    with pytest.raises(UserError, match=r"monitors.json' is damaged: remove it"):
        Monitors(tmp_path, sections, may_roll_back=False).open(pytest.fail)


def test_a_monitor_that_fails_is_reported_once_and_the_others_go_on(run, sections, tmp_path):
    said = []
    log = run(0, 4)
    monitors = Monitors(tmp_path / "run", sections, may_roll_back=False)
    monitors.open(said.append)
    monitors.start(log, 4, said.append)
    shutil.rmtree(tmp_path / "monitors/csv")
    for step in (5, 6):
        row = {"global_step": step, "loss": 1.0}
        log.write(row)
        monitors.write(row)
    (line,) = said
    assert line.startswith("csv_monitor fails and is left out until the next start: FileNotFoundError")
    assert_monitors_show(run(6, 7), tmp_path / "monitors")


def test_tensorboard_gets_what_it_lacks_since_it_failed(run, sections, tmp_path, monkeypatch):
    said = []
    with monkeypatch.context() as patched:
        flush, calls = SummaryWriter.flush, []
        patched.setattr(
            SummaryWriter, "flush", lambda self: calls.append(1) or flush(self) if len(calls) < 5 else 1 / 0
        )
        run(0, 8, say=said.append)
    assert [line.split(" fails")[0] for line in said] == ["tensorboard"]
    assert_monitors_show(run(8, 9), tmp_path / "monitors")
    assert_monitors_show(run(7, 9, attempt=1), tmp_path / "monitors")


def test_tensorboard_gets_what_a_failed_start_could_not_add(run, sections, tmp_path, monkeypatch):
    run(0, 2)
    shown = dict(sections)
    sections.clear()
    run(2, 7)
    sections.update(shown)
    with monkeypatch.context() as patched:
        patched.setattr(SummaryWriter, "flush", lambda self: 1 / 0)
        run(7, 7, say=lambda line: None)
    assert_monitors_show(run(7, 9), tmp_path / "monitors")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    for section, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"{section}.enabled is true.*pip install {section}"):
            Monitors(tmp_path, {section: {"enabled": True}}, may_roll_back=False).check()
    assert not list(tmp_path.iterdir())


class FakeRun:
    """Takes what a W&B run takes: each step once, none smaller than one before."""

    def __init__(self):
        self.rows, self.exit_code = {}, None

    def log(self, values, step, commit):
        assert commit
        assert step > max(self.rows, default=-1)
        self.rows[step] = values

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_gets_a_step_with_its_evaluation_once_and_what_it_lacks():
    run = FakeRun()
    monitor = WandbMonitor(run, sent=2, may_roll_back=False)
    monitor.start([(step, {"loss": float(step)}) for step in (1, 2, 3, 4)], 4)
    assert run.rows == {3: {"global_step": 3, "loss": 3.0}}  # 4 may yet get its evaluation
    monitor.write(4, {"eval_loss": 7.0})
    monitor.write(5, {"loss": 5.0})
    assert run.rows[4] == {"global_step": 4, "loss": 4.0, "eval_loss": 7.0}
    monitor.close(complete=False)
    assert (list(run.rows), run.exit_code) == ([3, 4], 1)
    run = FakeRun()
    monitor = WandbMonitor(run, sent=4, may_roll_back=False)
    monitor.start([(5, {"loss": 5.0})], 5)
    monitor.write(5, {"eval_loss": 6.0})
    monitor.close(complete=True)
    assert (run.rows, run.exit_code) == ({5: {"global_step": 5, "loss": 5.0, "eval_loss": 6.0}}, 0)


def test_wandb_gets_steps_that_may_be_taken_back_only_when_they_are_saved():
    run = FakeRun()
    monitor = WandbMonitor(run, sent=-1, may_roll_back=True)
    monitor.start([], 0)
    for step in range(1, 6):
        monitor.write(step, {"loss": float(step)})
    assert not run.rows
    monitor.saved(2)
    assert list(run.rows) == [1, 2]
    monitor.start([(1, {"loss": 1.0}), (2, {"loss": 2.0})], 2)  # rolled back
    for step in (3, 4):
        monitor.write(step, {"loss": -1.0})
    monitor.close(complete=True)
    assert [values["loss"] for values in run.rows.values()] == [1.0, 2.0, -1.0, -1.0]


def test_a_service_that_cannot_be_reached_stops_nothing_but_a_wrong_login_does(monkeypatch):
    from wandb.errors import CommError, UsageError

    said, error = [], CommError("no\nroute")

    def init(**settings):
        raise error

    monkeypatch.setattr("wandb.init", init)
    assert WandbMonitor.open({}, "abcd1234", False, said.append) is None
    (line,) = said
    assert line.endswith("the next start sends what is missing: no route")
    error = UsageError("No API key configured.")
    with pytest.raises(UserError, match=r"wandb cannot start \(No API key configured\): wandb login, or WANDB_MODE"):
        WandbMonitor.open({}, "abcd1234", False, said.append)
