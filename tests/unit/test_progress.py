"""Signs of life on stderr."""

import threading

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
