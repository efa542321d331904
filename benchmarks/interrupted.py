"""Start the real commands, know by the files that they are writing what they are doing, and end them in the middle."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import iglob
from pathlib import Path
from typing import IO

from benchmarks.environment import free_ports, python_path
from benchmarks.studies import WITH_THE_STUDY
from ds_roberta.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.0005
SECONDS_OF_A_RUN = 600.0
"""After which a run that has not ended counts as hanging."""


@dataclass(frozen=True)
class Phase:
    """What a command does while it writes certain files.

    Attributes:
        pattern: of their paths in the command's working folder, as `glob` reads it.
        until: a file whose presence in a found folder ends the phase.
        at_most: a kill is aimed at one of so many occurrences after a start, the first ones.
    """

    name: str
    pattern: str
    until: str = ""
    at_most: int = 1

    def traces(self, folder: Path) -> dict[str, int]:
        """The files and folders that are being written, and when a file of each was last changed, in ns."""
        found = {}
        for path in iglob(self.pattern, root_dir=folder):
            if not (self.until and (folder / path / self.until).exists()):
                inside = (os.path.join(parent, name) for parent, _, names in os.walk(folder / path) for name in names)
                found[path] = max(map(_changed, (str(folder / path), *inside)))
        return found


def _changed(path: str) -> int:
    """When a file was last changed, in ns; 0 for a folder, which also changes when a left one is removed."""
    try:
        status = os.stat(path)
    except OSError:  # renamed meanwhile
        return 0
    return 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns


class Watch:
    """The phases of a command that is about to be started; what killed commands left in the folder is not theirs."""

    def __init__(self, phases: Iterable[Phase], folder: Path):
        self._folder = folder
        self._left = {phase: phase.traces(folder) for phase in phases}

    def is_in(self, phase: Phase) -> bool:
        left = self._left[phase]
        return any(changed > left.get(path, -1) for path, changed in phase.traces(self._folder).items())

    def now(self) -> Phase | None:
        """The first of the phases that the command is in."""
        return next(filter(self.is_in, self._left), None)

    def spans(self, run: Running) -> dict[str, list[tuple[float, float]]]:
        """Watch a run to its end; when each phase began and ended, in seconds since the start, by its name."""
        began = time.monotonic()
        found: dict[str, list[tuple[float, float]]] = {phase.name: [] for phase in self._left}
        since: dict[Phase, float] = {}
        while run.is_alive():
            for phase in self._left:
                if self.is_in(phase):
                    since.setdefault(phase, time.monotonic() - began)
                elif phase in since:
                    found[phase.name].append((since.pop(phase), time.monotonic() - began))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for phase, begin in since.items():
            found[phase.name].append((begin, time.monotonic() - began))
        return found

    def wait_for(self, phase: Phase, occurrence: int, run: Running) -> bool:
        """Wait until a phase begins for the `occurrence`-th time, or a later phase begins, so that no run escapes.

        Returns:
            False if the command ends before.
        """
        phases, inside = list(self._left), False
        later = phases[phases.index(phase) + 1 :]
        while run.is_alive():
            before, inside = inside, self.is_in(phase)
            occurrence -= inside and not before
            if occurrence == 0 or any(map(self.is_in, later)):
                return True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False


class Running:
    """A command's processes, each with its children in a process group of its own."""

    def __init__(self, words: Sequence[str], folder: Path, log: IO[str], variables: Sequence[Mapping[str, str]]):
        self._log = Path(log.name)
        self._from = log.tell()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        self.processes = [
            subprocess.Popen(
                [*WITH_THE_STUDY, *words],
                cwd=folder,
                env={**environment, **each},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for each in variables
        ]

    def is_alive(self) -> bool:
        """Whether no process has ended yet."""
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """Send SIGKILL to all processes and their children."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def wait(self, seconds: float = SECONDS_OF_A_RUN) -> list[int | None]:
        """Wait for the ends of the processes; their exit codes, None for one that had not ended and was killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        codes = [process.returncode for process in self.processes]
        self.kill()
        return codes

    def printed(self) -> str:
        """What the command has printed until now."""
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._from)
            return log.read()

    def last_words(self) -> str:
        return " ".join(re.split(r"\s+", self.printed())[-60:])


@contextmanager
def running(words: Sequence[str], folder: Path, processes: int = 1) -> Iterator[Running]:
    """Start a command in a folder, as the ranks of one run if it has several processes; the block's end kills it."""
    variables: list[dict[str, str]] = [{}]
    if processes > 1:
        (port,) = free_ports(1)
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        variables = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        run = Running(words, folder, log, variables)
        try:
            yield run
        finally:
            run.kill()


def run_to_its_end(
    words: Sequence[str], folder: Path, processes: int = 1, meanwhile: Callable[[Running], object] | None = None
) -> None:
    """Run a command; raises `UserError` if it fails.

    Args:
        meanwhile: called with the running command.
    """
    with running(words, folder, processes) as run:
        if meanwhile is not None:
            meanwhile(run)
        codes = run.wait()
        if any(codes):
            raise UserError(f"exit codes {codes} of {' '.join(words)}: … {run.last_words()}")
