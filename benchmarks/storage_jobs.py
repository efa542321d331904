"""Two jobs on one folder, and a clock that jumps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.refused_calls import Ended
from benchmarks.storage_commands import COMMANDS, Command, Ground, Unbroken, errors_of

DELAYS = (0.0, 0.3, 0.6, 0.9)
"""When the second begins, as shares of the time that one takes."""


@dataclass(frozen=True)
class Pair:
    """A command that runs twice at a time."""

    name: str
    command: Command


PAIRS = tuple(Pair(command.name, command) for command in COMMANDS)


def jumping(command: Callable[[], None], seconds: float, after: int) -> None:
    """Run a command while the clock of its process jumps, after it has been read so often."""
    looks, nanoseconds, plain = 0, time.time_ns, time.time

    def jump() -> float:
        nonlocal looks
        looks += 1
        return seconds if looks > after else 0.0

    time.time = lambda: plain() + jump()
    time.time_ns = lambda: nanoseconds() + int(jump() * 1e9)
    command()


def two_jobs(ground: Ground, pair: Pair) -> dict[str, Any]:
    """Start a command, and again after a share of its time; one of them must succeed, the other may be refused."""
    unbroken = Unbroken.of(ground, pair.command)
    began = time.monotonic()
    ground.begin(unbroken.name)
    ground.finish(pair.command)
    takes = time.monotonic() - began
    problems, refused = [], 0
    for delay in DELAYS:
        ground.begin(unbroken.name)
        both = ground.run_both(pair.command, delay * takes)
        refused += sum(ended.code == 2 for ended in both)
        if wrong := [*_of_both(both), *unbroken.differences(ground, "both")]:
            problems.append(f"the second after {delay:.0%} of the time: {'; '.join(wrong)}")
    return {
        "tried": len(DELAYS), "survived": len(DELAYS) - len(problems), "lost": len(problems), "refused": refused,
        "problems": problems,
    }  # fmt: skip


def _of_both(both: tuple[Ended, Ended]) -> list[str]:
    found = []
    for which, ended in zip(("first", "second"), both, strict=True):
        if ended.code == 2:
            found += [f"the {which}: {problem}" for problem in errors_of(ended)]
        elif ended.code != 0:
            found.append(f"the {which}: exit code {ended.code}: {' '.join(ended.errors.split()[-12:])}")
    if all(ended.code for ended in both):
        found.append("neither ended well")
    return found
