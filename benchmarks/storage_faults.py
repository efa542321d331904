"""Break the storage beneath every command, and see that nothing is lost.

    python -m benchmarks.storage_faults
    python -m benchmarks.storage_faults --parts full-disk,reads --at_most 50

The parts:

- `damage`: every byte of a small checkpoint, flipped in turn, and random bits of the shards of prepared data.
- `full-disk`: the disk is full from the first, the second, … write on, for each command. A write is any call that
  writes, allocates, creates, renames or syncs, made by Python or by a library in Rust or C++. Later renames succeed, as
  on a disk that is full.
- `reads`: the first, the second, … read of a command's files fails (an I/O error).
- `stalls`: reads and writes that take seconds.
- `clock`: the system's clock jumps a day back, and ten years ahead, while a command runs.
- `two-jobs`: the same command twice at a time, on one folder.

A fault is survived if the command ends with exit code 2 and one line of error, leaves what was there as it was and
nothing half-written (only what the same command continues from), and if the same command then makes the same output,
bit for bit; or if it ends well, with the same output, or names a checkpoint that it could not read and takes the one
before, as documented. Everything else is lost. If a command makes more calls than `--at_most`, so many at equal
distances are broken.

Each item is kept in the folder of results as soon as it is finished, and the same command again goes on, after a kill
too. It needs Linux on x86_64.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.refused_calls import READ, Disk, Ended, spread
from benchmarks.storage_commands import COMMANDS, Command, Ground, Unbroken, import_all
from benchmarks.storage_damage import checkpoint_bytes, pointer_bytes, shard_bits
from benchmarks.storage_jobs import PAIRS, jumping, two_jobs
from benchmarks.studies import Item, beside, finish_all, parts_of, same_settings
from ds_roberta.command_line import ArgumentParser, positive, run_command

DAMAGE, FULL_DISK, READS, STALLS, CLOCK, TWO_JOBS = PARTS = (
    "damage", "full-disk", "reads", "stalls", "clock", "two-jobs"
)  # fmt: skip
STALL_SECONDS = 5.0
STALLS_OF_A_COMMAND = 3
_PROBLEMS = 20
"""Kept of an item."""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to try (default: %(default)s)")
    parser.add_argument("--at_most", type=positive, default=200, help="faults of a kind in a command")
    parser.add_argument("--bits", type=positive, default=1000, help="of shards, flipped in turn")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/storage_faults")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    run_command(lambda: study(parser.parse_args()))


def study(options: argparse.Namespace) -> None:
    options.results = options.results.resolve()
    parts = parts_of(options.parts, PARTS)
    settings = {"--at_most": options.at_most, "--bits": options.bits}
    same_settings(options.results, settings, "results")
    folder = Path(tempfile.mkdtemp(prefix="storage_faults-"))  # a TemporaryDirectory's end would come in forks, too
    output, prepared = beside(options.results, ".md"), _Prepared(folder)
    try:
        finish_all(
            options.results, items(options, prepared), parts, lambda found: publish(report(options, found), output)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Prepared:
    """The ground and the unbroken runs, made when they are first asked for."""

    def __init__(self, base: Path):
        self._base = base
        self.ground = cache(self._ground)
        self.unbroken = cache(self._unbroken)

    def _ground(self) -> Ground:
        # Children are forked, and must find one thread: what libraries have for others would be gone.
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false",
                          CUDA_VISIBLE_DEVICES="")  # fmt: skip
        import_all()
        ground = Ground(self._base.resolve())
        ground.prepare()
        return ground

    def _unbroken(self, command: Command) -> Unbroken:
        return Unbroken.of(self.ground(), command)


def items(options: argparse.Namespace, prepared: _Prepared) -> Iterator[Item]:
    """In the order in which they are tried."""
    for name, damage in (
        ("every byte of a checkpoint", checkpoint_bytes),
        ("every byte of `best`", pointer_bytes),
        ("random bits of shards", partial(shard_bits, bits=options.bits)),
    ):
        yield Item(DAMAGE, f"{DAMAGE}: {name}".replace("`", ""), (), partial(_measured, damage, prepared))
    for part, measure in (
        (FULL_DISK, partial(_each, at_most=options.at_most, number=errno.ENOSPC, stays_full=True)),
        (READS, partial(_each, at_most=options.at_most, number=errno.EIO, kinds=(READ,))),
        (STALLS, _stalls),
        (CLOCK, _clock),
    ):
        for command in COMMANDS:
            yield Item(part, f"{part}: {command.name}", (), partial(_of_command, measure, prepared, command))
    for pair in PAIRS:
        yield Item(TWO_JOBS, f"{TWO_JOBS}: {pair.name}", (), partial(_measured, partial(two_jobs, pair=pair), prepared))


def _measured(measure: Callable[[Ground], dict[str, Any]], prepared: _Prepared, _: int) -> dict[str, Any]:
    return measure(prepared.ground())


def _of_command(
    measure: Callable[[Ground, Unbroken], dict[str, Any]], prepared: _Prepared, command: Command, _: int
) -> dict[str, Any]:
    return measure(prepared.ground(), prepared.unbroken(command))


def _each(ground: Ground, unbroken: Unbroken, at_most: int, **fault: Any) -> dict[str, Any]:
    """Refuse each call in turn, in a run of its own."""
    counted = _counted(ground, unbroken, **fault)
    chosen = spread(counted, at_most)
    outcomes = []
    for number in chosen:
        disk = Disk(ground.work, refused=number, **fault)
        outcomes.append(_broken(ground, unbroken, disk, f"call {number}"))
        print(f"\r{unbroken.command.name}: {len(outcomes)} of {len(chosen)}", end="", flush=True)
    print()
    return {**summary(outcomes), "calls": counted}


def _stalls(ground: Ground, unbroken: Unbroken) -> dict[str, Any]:
    """Delay some reads, and some other calls."""
    outcomes = []
    for kinds in ((READ,), Disk(ground.work).kinds):
        for number in spread(_counted(ground, unbroken, kinds=kinds), STALLS_OF_A_COMMAND):
            disk = Disk(ground.work, kinds=kinds, delayed=(number,), seconds=STALL_SECONDS)
            outcomes.append(_broken(ground, unbroken, disk, f"call {number}"))
    return summary(outcomes)


def _clock(ground: Ground, unbroken: Unbroken) -> dict[str, Any]:
    outcomes = []
    for seconds in (-86_400.0, 3.15e8):
        for after in (1, 3, 30):
            ground.begin(unbroken.name)
            ended = ground.run(partial(jumping, unbroken.command, seconds, after))
            outcomes.append(_judged(ground, unbroken, ended, f"by {seconds:+g} s after {after} looks"))
    return summary(outcomes)


def _counted(ground: Ground, unbroken: Unbroken, **fault: Any) -> int:
    """The calls of a run without faults."""
    ground.begin(unbroken.name)
    disk = Disk(ground.work, **fault)
    ground.run(unbroken.command, disk)
    return disk.count


def _broken(ground: Ground, unbroken: Unbroken, disk: Disk, what: str) -> dict[str, Any]:
    ground.begin(unbroken.name)
    ended = ground.run(unbroken.command, disk)
    return _judged(ground, unbroken, ended, f"{what} ({', '.join(disk.what or ['not reached'])})")


def _judged(ground: Ground, unbroken: Unbroken, ended: Ended, what: str) -> dict[str, Any]:
    problems = list(unbroken.problems(ground, ended))
    return {"refused": ended.code == 2, "problem": f"{what}: {'; '.join(problems)}" if problems else None}


def summary(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    problems = [outcome["problem"] for outcome in outcomes if outcome["problem"]]
    return {
        "tried": len(outcomes),
        "survived": len(outcomes) - len(problems),
        "lost": len(problems),
        "refused": sum(outcome["refused"] for outcome in outcomes),
        "problems": problems[:_PROBLEMS],
    }


def report(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[str]:
    yield "# Faults of the storage"
    yield ""
    yield "How each is tried, and what counts as survived: `python -m benchmarks.storage_faults --help`."
    yield ""
    yield "| part | what | tried | survived | lost | of these, ended with an error | note |"
    yield "|---|---|---|---|---|---|---|"
    for name, result in found.items():
        part, _, what = name.partition(": ")
        calls = result.get("calls", 0)
        note = result.get("note") or (f"at equal distances, of {calls} calls" if calls > result["tried"] else "")
        yield (
            f"| {part} | {what} | {result['tried']} | {result['survived']} | {result['lost']} | "
            f"{result.get('refused', '')} | {note} |"
        )
    tried, survived, lost = (sum(result[key] for result in found.values()) for key in ("tried", "survived", "lost"))
    yield f"| all | | {tried} | {survived} | {lost} | | |"
    for name, result in found.items():
        if result["lost"]:
            yield ""
            yield f"Lost of {name}:"
            yield ""
            yield from (f"- {problem}" for problem in result["problems"])
    minutes = sum(result["seconds"] for result in found.values()) / 60
    commits = ", ".join(sorted({result["commit"] for result in found.values()}))
    yield ""
    yield (
        f"{minutes:.0f} minutes on a core of {cpu_model()}, with `--at_most {options.at_most} --bits {options.bits}`; "
        f"measured at commit {commits}. "
        + versions("torch", "deepspeed", "transformers", "safetensors", "tokenizers", "pyarrow", "numpy")
    )


if __name__ == "__main__":
    main()
