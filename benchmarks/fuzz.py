"""What the readers of files make of bytes that nobody should trust.

    python -m benchmarks.fuzz [--minutes 10] [--readers "JSON lines" CSV …]

Hypothesis makes arbitrary bytes, valid files with errors in them, and files that a usual writer writes. Of each, a
reader must give what it holds, or raise an error that tells a user what is wrong. Anything else is broken: another
exception, a crash, a hang, too much memory, or something lost without a word. Inputs that break a reader are kept.

After each reader its row is written to a Markdown table, in which the rows of other readers stay.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy and torch are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import logging
import multiprocessing
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.environment import REPOSITORY, commit, cpu_model, versions
from benchmarks.fuzz_data import data_readers
from benchmarks.fuzz_folders import folder_readers
from benchmarks.fuzz_inputs import Case
from benchmarks.fuzz_labelled import labelled_readers
from benchmarks.fuzz_rows import Reader, SilentLoss, row_readers
from ds_roberta.command_line import ArgumentParser, positive_number, run_command
from ds_roberta.errors import UserError, user_message
from ds_roberta.files import write_text

READ, REFUSED = "read", "refused"
SECONDS_FOR_ONE = 20
"""CPU time after which a reader is taken to hang."""
SECONDS_FOR_LIBRARY = 400
"""Time after which the process is killed, because a library neither works nor returns to Python."""
BYTES_FOR_ONE = 6 << 30
"""More than the longest window of zstd, which has 2 GiB."""
_BATCH = 200


class Hang(BaseException):
    """A reader does not end; no `except Exception` may catch it."""


@cache
def readers() -> dict[str, Reader]:
    """All readers by the names of what they read."""
    return row_readers() | labelled_readers() | folder_readers() | data_readers()


def try_case(reader: Reader, case: Case, folder: Path) -> str:
    """Give a reader an input; return `READ` or `REFUSED`.

    Args:
        folder: does not exist, and is removed unless something is wrong.

    Raises:
        SilentLoss, or what the reader raised: it is broken.
    """
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        found = reader.read(folder)
    except Exception as error:
        if not any(user_message(error) or ()):
            raise
        if case.expected is not None:
            raise SilentLoss(f"a valid file is refused: {error}") from error
        shutil.rmtree(folder)
        return REFUSED
    if case.expected is not None and found != case.expected:
        raise SilentLoss(f"{found!r} was read, not {case.expected!r}")
    shutil.rmtree(folder)
    return READ


@dataclass
class Tally:
    """What came of the different inputs of a reader.

    Attributes:
        broken: what went wrong, and where, with the folder of the first input that did.
    """

    read: int = 0
    refused: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return self.read + self.refused + len(self.broken)


def fuzz(reader: Reader, seconds: float, first_seed: int, kept: Path, sender: Connection) -> None:
    """Try inputs for a time, and send the tally after each batch; the body of a process.

    An input is on the disk before it is read, so that it survives a crash.
    """
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + BYTES_FOR_ONE,) * 2)
    signal.signal(signal.SIGPROF, _hang)
    logging.disable(logging.CRITICAL)
    began, tally, seen, number = time.monotonic(), Tally(), set[int](), 0

    def attempt(case: Case) -> None:
        nonlocal number
        identity = hash(tuple(sorted(case.files.items())))
        if identity in seen or time.monotonic() - began > seconds:
            return
        seen.add(identity)
        number += 1
        folder = kept / f"{first_seed}-{number}"
        signal.setitimer(signal.ITIMER_PROF, SECONDS_FOR_ONE)
        signal.alarm(SECONDS_FOR_LIBRARY)
        try:
            outcome = try_case(reader, case, folder)
        except (Exception, Hang) as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _keep(tally, error, folder)
        else:
            tally.read += outcome == READ
            tally.refused += outcome == REFUSED
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    options = settings(
        max_examples=_BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    batch = first_seed
    while time.monotonic() - began < seconds:
        seed(batch)(options(given(reader.cases)(attempt)))()
        batch += 1
        tally.seconds = time.monotonic() - began
        sender.send(tally)


def _hang(number: int, frame: object) -> None:
    raise Hang(f"no end after {SECONDS_FOR_ONE} s")


def _keep(tally: Tally, error: BaseException, folder: Path) -> None:
    """Note what broke; of inputs that break the same line in the same way, keep the first."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if str(REPOSITORY) in frame.filename]
    what = f"{type(error).__name__} at {Path(ours[-1].filename).relative_to(REPOSITORY)}:{ours[-1].lineno}"
    if what in tally.broken:
        shutil.rmtree(folder)
        return
    tally.broken[what] = str(folder)
    (folder.parent / f"{folder.name}.txt").write_text("".join(traceback.format_exception(error)), "utf-8", "replace")


def watch(reader: Reader, seconds: float, kept: Path) -> Tally:
    """Fuzz a reader in a process of its own, and in another one after each crash."""
    began, total, processes = time.monotonic(), Tally(), multiprocessing.get_context("fork")
    while (left := seconds - (time.monotonic() - began)) > 0:
        receiver, sender = processes.Pipe(duplex=False)
        first_seed = 1_000_000 * len(total.broken)
        process = processes.Process(target=fuzz, args=(reader, left, first_seed, kept, sender))
        process.start()
        sender.close()
        tally = Tally()
        try:
            while True:
                tally = receiver.recv()
        except EOFError:
            process.join()
        total.read, total.refused = total.read + tally.read, total.refused + tally.refused
        total.broken |= tally.broken
        if process.exitcode:
            folders = [path for path in kept.glob(f"{first_seed}-*") if path.is_dir()]
            last = max(folders, key=lambda path: int(path.name.partition("-")[2]))
            total.broken[f"exit code {process.exitcode} ({last.name})"] = str(last)
    total.seconds = time.monotonic() - began
    return total


def reported(name: str, tally: Tally) -> list[str]:
    """The lines of a report that are about a reader: its row, and a line for each way in which it broke."""
    row = (
        f"| {name} | {tally.tried:,} | {tally.read:,} | {tally.refused:,} | {len(tally.broken)} | "
        f"{tally.seconds:.0f} | {commit()} |"
    )
    return [row, *(f"- {name}: {what}, `{folder}`" for what, folder in tally.broken.items())]


def earlier(output: Path) -> dict[str, list[str]]:
    """The lines of an earlier report, by reader."""
    found: dict[str, list[str]] = {}
    for line in output.read_text(encoding="utf-8").splitlines() if output.is_file() else ():
        if (match := re.match(r"\| (.+?) \||- (.+?): ", line)) and (name := match[1] or match[2]) in readers():
            found.setdefault(name, []).append(line)
    return found


def whole(found: dict[str, list[str]]) -> list[str]:
    """The lines of the report of all readers in `found`."""
    of_readers = [found[name] for name in readers() if name in found]
    return [
        "# Readers and hostile files",
        "",
        "Different inputs that each reader was given, and what it made of them; broken are the different ways to fail.",
        "",
        "| reader | inputs tried | read | refused | broken | seconds | commit |",
        "|---|---|---|---|---|---|---|",
        *(row for row, *_ in of_readers),
        "",
        *(line for _, *broken in of_readers for line in broken),
        f"{cpu_model()}. {versions('hypothesis', 'pyarrow', 'datasets', 'transformers', 'tokenizers')}",
    ]


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive_number, default=10, help="for each reader (default: 10)")
    parser.add_argument("--readers", nargs="+", choices=list(readers()), default=list(readers()), metavar="READER")
    parser.add_argument("--kept", type=Path, help="folder for inputs that break a reader (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/fuzz.md")
    arguments = parser.parse_args()
    if arguments.kept is not None and arguments.kept.exists():
        raise UserError(f"--kept {str(arguments.kept)!r} exists: choose a new folder")
    kept = arguments.kept or Path(tempfile.mkdtemp(prefix="fuzz-"))
    found, broken = earlier(arguments.output), False
    for name in arguments.readers:
        tally = watch(readers()[name], 60 * arguments.minutes, kept / name.replace(" ", "-").replace(",", ""))
        found[name] = reported(name, tally)
        broken |= bool(tally.broken)
        print(*found[name], sep="\n", flush=True)
        write_text(arguments.output, "\n".join(whole(found)) + "\n")
    return int(broken)


if __name__ == "__main__":
    run_command(main)
