"""What a power cut must not take away: files are synced before they are renamed, and the folders of renamed ones after.

No test cuts the power; these see what the operating system is asked to do, and in which order.
"""

import os
from pathlib import Path

import pytest

from ds_roberta.files import atomic_path, put_in_place
from ds_roberta.lease import Lease
from preprocessing.jobs.job import Job


def state(file):
    """An open file or a path, as it is now; of a folder, only which one it is."""
    found = os.stat(file)
    return found.st_ino, None if os.path.isdir(file) else found.st_size


@pytest.fixture
def events(monkeypatch):
    """The states that are synced, and before each renaming a pair: what moves, and its new folder."""
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(state(descriptor)))

    def recorded(rename):
        def record_and_rename(source, target):
            moved = {state(path) for path in (Path(source), *Path(source).rglob("*"))}
            events.append((moved, state(Path(target).parent)))
            return rename(source, target)

        return record_and_rename

    for place, name in ((os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace")):
        monkeypatch.setattr(place, name, recorded(getattr(place, name)))
    return events


def assert_durable(events):
    renamed = [index for index, (first, _) in enumerate(events) if isinstance(first, set)]
    assert renamed
    for index in renamed:
        moved, folder = events[index]
        assert moved <= {event for event in events[:index] if not isinstance(event[0], set)}
        assert folder in events[index:]


def test_a_file_survives_a_power_cut(tmp_path, events):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert_durable(events)


def test_a_folder_survives_a_power_cut(tmp_path, events):
    (tmp_path / "temporary/train").mkdir(parents=True)
    for name in ("manifest.json", "train/shard.arrow"):
        (tmp_path / "temporary" / name).write_text(name)
    put_in_place(tmp_path / "temporary", tmp_path / "folder")
    assert_durable(events)


def test_what_a_unit_made_survives_a_power_cut_before_its_record_is_there(tmp_path, events):
    job = Job(tmp_path / "plan", Lease(tmp_path / "lease.json"))
    job.lease.path.touch()

    def work(scratch):
        for name in ("data/train/shard.arrow", "staged/keys"):
            (scratch / name).parent.mkdir(parents=True)
            (scratch / name).write_text(name)
        return {}

    job.do("units", 0, work)
    assert_durable(events)
    of_the_record = [index for index, event in enumerate(events) if event[1] == state(tmp_path / "plan/units")]
    assert_durable(events[: of_the_record[0]])
    folders = {state(tmp_path / "plan" / name) for name in ("", "data", "data/train", "staged")}
    assert folders <= {event for event in events[: of_the_record[0]] if not isinstance(event[0], set)}
