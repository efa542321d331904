"""The disk that `benchmarks.storage_faults` breaks."""

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.refused_calls import CREATE, READ, RENAME, SYNC, WRITE, Disk, spread, start
from ds_roberta.errors import UserError


def body():
    """Two writes by Python, two by the C library beneath numpy, and a rename; with a read before."""
    try:
        Path("text").read_text()
        os.mkdir("folder")
        with open("folder/file", "wb") as file:
            file.write(bytes(10))
        np.zeros(1000).tofile("array")
        os.rename("array", "folder/array")
    except OSError as error:
        print(errno.errorcode[error.errno] if error.errno else error)


@pytest.fixture
def broken(tmp_path):
    """A function that runs `body` on a disk; returns how it ended."""
    folder, logs = tmp_path / "work", tmp_path / "logs"
    logs.mkdir()
    folder.mkdir()

    def run(refused, **fault):
        here = folder / str(len(list(folder.iterdir())))
        here.mkdir()
        (here / "text").write_text("text")
        disk = Disk(here, refused=refused, **fault)
        try:
            return disk, start(body, here, logs, watched=True).ended(disk), here
        except UserError as error:
            pytest.skip(str(error))

    return run


def test_each_call_of_any_library_is_refused_in_turn(broken):
    disk, ended, _ = broken(0)
    assert (ended.code, ended.output) == (0, "")
    assert disk.count >= 6
    for number in range(1, disk.count + 1):
        refused, ended, _ = broken(number)
        assert refused.count >= number
        assert "ENOSPC" in ended.output or "written" in ended.output or refused.what == ["write array"]


def test_a_disk_stays_full_and_reads_fail_if_asked(broken):
    _, ended, here = broken(1, stays_full=True)
    assert ended.output == "ENOSPC\n"
    assert not (here / "folder").exists()
    _, ended, _ = broken(1 << 20, kinds=(READ,))
    assert ended.output == ""
    disk, ended, _ = broken(2, kinds=(READ,), number=errno.EIO)
    assert ended.output == "EIO\n"
    assert disk.what == ["read text"]


def test_what_is_counted_and_what_is_late(tmp_path):
    disk = Disk(tmp_path, kinds=(WRITE, RENAME), refused=2, stays_full=True, delayed=(4,), seconds=0.01)
    path = f"{tmp_path}/file"
    assert [disk.answer(kind, path) for kind in (SYNC, WRITE, CREATE, RENAME, WRITE)] == [0, 0, 0, 28, 28]
    assert disk.answer(WRITE, "/elsewhere/file") == 0
    began = time.monotonic()
    assert disk.answer(RENAME, path) == 0  # a full disk can still rename
    assert time.monotonic() - began >= 0.01
    assert disk.count == 4
    assert disk.what == ["rename file", "rename file"]


def test_numbers_are_spread_from_the_first_to_the_last():
    assert spread(3, 5) == [1, 2, 3]
    assert spread(101, 5) == [1, 26, 51, 76, 101]
