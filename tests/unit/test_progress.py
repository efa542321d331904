"""Signs of life on stderr."""

import sys
import threading

import pytest

from ds_roberta import progress


def test_a_clock_runs_from_its_start_to_the_end_of_the_context(capsys, monkeypatch):
    shown = threading.Event()
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.01)

    class Bar(progress.tqdm):
        def refresh(self, *arguments, **options):
            shown.set()
            return super().refresh(*arguments, **options)

    monkeypatch.setattr(progress, "tqdm", Bar)
    with progress.clock("waiting"):
        pass
    assert not shown.is_set()
    with progress.clock("waiting") as start:
        start()
        assert shown.wait(10)
    assert "waiting: 00:0" in capsys.readouterr().err


def test_a_bar_moves_with_documents_within_a_file(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    with progress.document_bar(100, "reading") as update:
        for _ in range(50):
            update(0, 1)
        update(100, 0)
    lines = capsys.readouterr().err.split("\r")
    assert sum("documents/s" in line and "0.00/100" in line for line in lines) >= 40


def test_a_bar_over_steps_asks_for_the_loss_only_when_it_is_written(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    asked = []

    def loss():
        asked.append(True)
        return 0.25

    for seconds, visible, times in ((0.0, True, 9), (60.0, True, 0), (0.0, False, 0)):
        monkeypatch.setattr(progress, "_LOG_SECONDS", seconds)
        with progress.StepBar(10, "seed 0", done=1, visible=visible) as bar:
            for _ in range(9):
                bar.step(loss)
        assert len(asked) == times, seconds
        asked.clear()
        shown = capsys.readouterr().err
        assert ("seed 0: step 10/10, loss 0.250 100%" in shown) == bool(times)
        assert bool(shown) == visible


def test_a_line_above_a_bar_over_steps_begins_where_the_bar_was(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    with progress.StepBar(9, "seed 0") as bar:
        bar.step(lambda: 0.5)
        with bar.interrupted():
            sys.stderr.write("epoch 1\n")
        assert capsys.readouterr().err.split("\r")[-2:][0].startswith("epoch 1\n")
    with progress.StepBar(9, "seed 0", visible=False) as bar, bar.interrupted():
        pass
    assert capsys.readouterr().err.count("seed 0") == 1  # the last state of the first bar


def test_an_error_erases_a_bar_over_steps(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)

    def fail():
        with progress.StepBar(9, "seed 0") as bar:
            bar.step(lambda: 0.5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err.rstrip("\r").split("\r")[-1].strip() == ""
