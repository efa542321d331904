"""What studies that take hours share: a folder of finished parts, each measured by one process at a time, and commands
whose clock is CPU time.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import python_path
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json

IN_CPU_TIME = """import runpy, sys, time
time.perf_counter = time.process_time
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")"""
"""Runs the script that is the first argument, with the CPU time of its process and threads as its clock."""

WITH_THE_STUDY = ("setpriv", "--pdeathsig", "TERM")
"""Before a command: it is asked to stop if the study is killed, so that the study can go on at once."""


class Busy(UserError):
    """Another process measures the same part."""


def same_settings(results: Path, settings: Mapping[str, Any], kind: str) -> None:
    """Note in the folder what its results are of, or raise `UserError` if they are of something else.

    Args:
        settings: JSON values.
        kind: of results, for the message.
    """
    path = results / "settings.json"
    if not path.exists():
        results.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    kept = read_json(path)
    if changed := [f"{name} {kept.get(name)!r}, not {value!r}" for name, value in settings.items()
                   if kept.get(name) != value]:  # fmt: skip
        raise UserError(f"the {kind} in {str(results)!r} are of {'; '.join(changed)}: give another --results")


@contextmanager
def only_here(results: Path, part: str) -> Iterator[int]:
    """Hold a lock that a second call, or a command that outlived its call, would hold; yields its descriptor.

    Raises:
        Busy: another process holds it.
    """
    with (results / f"{part}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another process measures {part!r} in {str(results)!r}: wait or end it") from error
        yield file.fileno()


def execute(command: Sequence[str], lock: int) -> None:
    """Run a command, which holds the lock too; raises `UserError` if it fails."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    words = [*WITH_THE_STUDY, *command]
    code = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=False, pass_fds=[lock]).returncode
    if code:
        raise UserError(f"exit code {code}: {' '.join(command)}")
