"""What the readers of files make of bytes that nobody should trust.

    python -m benchmarks.fuzz [--minutes 10] [--readers "JSON lines" CSV …]

Hypothesis makes arbitrary bytes, valid files with errors in them, and files that a usual writer writes. Of each, a
reader must give what it holds, or raise an error that tells a user what is wrong. Anything else is broken: another
exception, a crash, a hang, too much memory, or something lost without a word. Writes a Markdown table with the
hardware, the versions and the commit; inputs that break a reader are kept.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy and torch are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import logging
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import xxhash
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.fuzz_folders import folder_readers
from benchmarks.fuzz_inputs import Case
from benchmarks.fuzz_labelled import labelled_readers
from benchmarks.fuzz_rows import Reader, SilentLoss, row_readers
from ds_roberta.command_line import ArgumentParser, positive_number, run_command
from ds_roberta.errors import UserError, user_message

READ, REFUSED = "read", "refused"
SECONDS_FOR_ONE = 20
"""CPU time after which a reader is taken to hang."""
BYTES_FOR_ONE = 6 << 30
"""More than the longest window of zstd, which has 2 GiB."""
_BATCH = 200


class Hang(BaseException):
    """A reader does not end; no `except Exception` may catch it."""


@cache
def readers() -> dict[str, Reader]:
    """All readers by the names of what they read."""
    return row_readers() | labelled_readers() | folder_readers()


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
        broken: what went wrong, and where, with the folder of its smallest input.
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
    began, tally, seen, number = time.monotonic(), Tally(), set[str](), 0

    def attempt(case: Case) -> None:
        nonlocal number
        identity = xxhash.xxh3_128_hexdigest(repr(sorted(case.files.items())).encode("utf-8", "surrogatepass"))
        if identity in seen or time.monotonic() - began > seconds:
            return
        seen.add(identity)
        number += 1
        folder = kept / f"{first_seed}-{number}"
        signal.setitimer(signal.ITIMER_PROF, SECONDS_FOR_ONE)
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
    """Note what broke; of inputs that break the same line in the same way, keep the smallest."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if str(REPOSITORY) in frame.filename]
    place = f"{Path(ours[-1].filename).relative_to(REPOSITORY)}:{ours[-1].lineno}"
    what = f"{type(error).__name__} at {place}"
    before = tally.broken.get(what)
    if before is not None and _size(Path(before)) <= _size(folder):
        shutil.rmtree(folder)
        return
    if before is not None:
        shutil.rmtree(before)
        Path(f"{before}.txt").unlink()
    tally.broken[what] = str(folder)
    (folder.parent / f"{folder.name}.txt").write_text("".join(traceback.format_exception(error)), "utf-8", "replace")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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


def lines(chosen: list[str], minutes: float, kept: Path) -> Iterator[str]:
    """Yield the lines of the report."""
    yield "# Readers and hostile files"
    yield ""
    yield f"Different inputs that each reader was given in {minutes:g} minutes, and what it made of them;"
    yield "broken are the different ways to fail."
    yield ""
    yield "| reader | inputs tried | read | refused | broken | seconds |"
    yield "|---|---|---|---|---|---|"
    known, broken = readers(), []
    for name in chosen:
        tally = watch(known[name], 60 * minutes, kept / name.replace(" ", "-").replace(",", ""))
        print(f"{name}: {tally.tried:,} inputs, {len(tally.broken)} broken", file=sys.stderr, flush=True)
        yield (
            f"| {name} | {tally.tried:,} | {tally.read:,} | {tally.refused:,} | {len(tally.broken)} | "
            f"{tally.seconds:.0f} |"
        )
        broken += [f"- {name}: {what}, `{folder}`" for what, folder in tally.broken.items()]
    yield ""
    yield from broken
    yield f"{cpu_model()}. {versions('hypothesis', 'pyarrow', 'datasets', 'transformers', 'tokenizers')}"


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
    report = list(lines(arguments.readers, arguments.minutes, kept))
    publish(report, arguments.output)
    return int(any(line.startswith("- ") for line in report))


if __name__ == "__main__":
    run_command(main)
