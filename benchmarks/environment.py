"""Helpers of benchmarks and tests: the environment of the processes they start, and the machine's name in reports."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ds_roberta.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]


def python_path(program: Path = REPOSITORY) -> str:
    """Return PYTHONPATH with `program` put first; its entries are kept, as packages may be installed only there."""
    return os.pathsep.join(filter(None, (str(program), os.environ.get("PYTHONPATH"))))


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that no process uses, each another one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def publish(lines: Iterable[str], output: Path) -> None:
    """Print a report and write it to a file."""
    report = "\n".join(lines) + "\n"
    print(report)
    write_text(output, report)


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")


def versions(*packages: str) -> str:
    """Return the versions of Python and of the packages, and the commit: the end of every report."""

    def named() -> Iterator[str]:
        yield f"Python {platform.python_version()}"
        for name in packages:
            try:
                yield f"{name} {version(name)}"
            except PackageNotFoundError:
                yield f"no {name}"
        yield f"commit {commit()}."

    return ", ".join(named())


def commit() -> str:
    """Return the commit that is checked out, and whether the program or the benchmarks differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        program = ("ds_roberta", "preprocessing", "launch", "ds_configs", "benchmarks")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *program)
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
