import json

import pytest

from ds_roberta.errors import UserError
from ds_roberta.progress import MicroStepBar, duration
from ds_roberta.training.metrics import METRICS_NAME, MetricsLog


def read_rows(folder):
    return [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]


def write_rows(folder, steps):
    log = MetricsLog(folder, 0)
    for step in steps:
        log.write({"global_step": step, "loss": step / 2})


def test_rows_are_one_json_object_a_line(tmp_path):
    write_rows(tmp_path, [1, 2])
    assert read_rows(tmp_path) == [{"global_step": 1, "loss": 0.5}, {"global_step": 2, "loss": 1.0}]


def test_a_resumed_run_drops_the_rows_of_steps_that_it_takes_again(tmp_path):
    write_rows(tmp_path, range(1, 6))
    MetricsLog(tmp_path, 3).write({"global_step": 4, "loss": 9.0})
    assert [(row["global_step"], row["loss"]) for row in read_rows(tmp_path)] == [(1, 0.5), (2, 1), (3, 1.5), (4, 9.0)]


def test_the_evaluation_of_the_step_that_a_run_stands_at_is_done_again(tmp_path):
    write_rows(tmp_path, [1, 2])
    log = MetricsLog(tmp_path, 2)
    log.write({"global_step": 1, "eval_loss": 4.0})
    log.write({"global_step": 2, "eval_loss": 3.0})
    MetricsLog(tmp_path, 2)
    assert [row.get("eval_loss") for row in read_rows(tmp_path)] == [None, None, 4.0]
    log.write({"global_step": 2, "eval_loss": 3.0})
    MetricsLog(tmp_path, 2, is_evaluated=False)  # as the last step of a run that is given more
    assert [row.get("eval_loss") for row in read_rows(tmp_path)] == [None, None, 4.0, 3.0]


@pytest.mark.parametrize("half", ['{"global_step": 3, "lo', '{"global_step": 3, "loss": 1.0}'])
def test_a_last_line_without_its_end_is_dropped(tmp_path, half):
    write_rows(tmp_path, [1, 2])
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write(half)
    MetricsLog(tmp_path, 3).write({"global_step": 4})
    assert [row["global_step"] for row in read_rows(tmp_path)] == [1, 2, 4]


def test_a_fresh_run_begins_a_fresh_log(tmp_path):
    MetricsLog(tmp_path, 0).write({"global_step": 0, "eval_loss": 9.0})
    write_rows(tmp_path, [1, 2])
    assert [row["global_step"] for row in read_rows(tmp_path)] == [1, 2]


def test_the_expected_time_is_said_once_and_first_from_the_second_micro_step(capsys):
    waited = []
    progress = MicroStepBar(10, 0, visible=True)
    for step in (1, 2):
        for micro_step in range(3):
            progress.micro_step(micro_step, 3, lambda: waited.append(1))
            said = "expected time per step" in capsys.readouterr().err
            assert said == (step == 1 and micro_step == 1)
        progress.step(step, 2.5, 1000.0, 0.4, 0.1)
        assert "expected" not in capsys.readouterr().err
    progress.close()
    assert len(waited) == 2


def test_a_run_of_single_micro_steps_says_its_first_steps_time(capsys):
    progress = MicroStepBar(10, 0, visible=True)
    progress.micro_step(0, 1, lambda: None)
    progress.step(1, 2.5, 1000.0, 0.4, 90.0)
    progress.close()
    assert "expected time per step: 90 seconds" in capsys.readouterr().err


def test_the_expected_time_is_said_again_where_steps_take_another(capsys):
    progress = MicroStepBar(10, 0, visible=True)
    progress.micro_step(0, 1, lambda: None)
    progress.step(1, 2.5, 1000.0, 0.4, 90.0)
    capsys.readouterr()
    progress.restart(1)
    progress.micro_step(0, 2, lambda: None)
    assert "expected" not in capsys.readouterr().err
    progress.micro_step(1, 2, lambda: None)
    assert "expected time per step" in capsys.readouterr().err
    progress.close()
    silent = MicroStepBar(10, 0, visible=False)
    silent.restart(5)
    silent.micro_step(0, 2, lambda: pytest.fail("waited for the device"))


def test_other_ranks_are_silent_and_never_wait(capsys):
    progress = MicroStepBar(10, 0, visible=False)
    for micro_step in range(2):
        progress.micro_step(micro_step, 2, lambda: pytest.fail("waited for the device"))
    progress.step(1, 2.5, 1000.0, 0.4, 1.0)
    progress.say("nothing")
    progress.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.034, "0.034 seconds"),
        (3.14159, "3.1 seconds"),
        (119, "119 seconds"),
        (150, "2.5 minutes"),
        (9_000, "2.5 hours"),
        (216_000, "2.5 days"),
    ],
)
def test_durations_are_in_the_unit_that_suits(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"global_step": 1, "loss": 1' + b"0" * 400 + b"}", "loss is too large a number"),
        (b'{"global_step": 1' + b"0" * 5000 + b"}", "line 1 .* is broken"),
        (b'{"global_step": true}', "not an object with a global_step"),
        (b'\xff{"global_step": 1}', "line 1 .* is broken"),
        (b"", "line 1 .* is broken"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line, message):
    (tmp_path / METRICS_NAME).write_bytes(line + b"\n")
    with pytest.raises(UserError, match=message):
        MetricsLog(tmp_path, 3)
