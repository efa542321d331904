"""Start commands as processes forked from one that has made their imports, which are half of a short run: real
processes with exit codes, signals and output of their own.
"""

import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import time
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch


@cache
def _prepared() -> ForkServerContext:
    """Where processes begin with the imports of the commands."""
    context = multiprocessing.get_context("forkserver")
    # CUDA works in no process whose parent has looked for devices, as DeepSpeed does at its import.
    context.set_forkserver_preload([] if torch.cuda.is_available() else ["launched"])
    with pytest.MonkeyPatch.context() as patch:  # the numbers of threads are read at the imports
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parent), os.getenv("PYTHONPATH")])))
        multiprocessing.forkserver.ensure_running()
    return context


def _be(words: list[str], cwd: Path, variables: dict[str, str], log: Path) -> None:
    """Become the command, in a new process group."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    with open(log, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start(script: Path, *arguments: str | Path, cwd: Path, environment: dict[str, str]) -> tuple[BaseProcess, Path]:
    """Start a Python script in a new process group; return the process, and the file of what it prints."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        log = Path(file.name)
    words = [str(script), *map(str, arguments)]
    process = _prepared().Process(target=_be, args=(words, cwd, environment, log))
    process.start()
    return process, log


def run_ranks(
    processes: int, script: Path, *arguments: str | Path, cwd: Path, environment: dict[str, str], seconds: float
) -> None:
    """Run a Python script as the ranks of one run, as the `deepspeed` launcher does; the first that fails ends all."""
    size = {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")}
    # Rank 0 finds a free port for all, as LOCAL_SIZE says that they are on one host.
    together = {**environment, **size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ranks = {}
    try:
        for rank in map(str, range(processes)):
            variables = {**together, "RANK": rank, "LOCAL_RANK": rank}
            process, log = start(script, *arguments, cwd=cwd, environment=variables)
            ranks[process.sentinel] = process, log
        deadline, running = time.monotonic() + seconds, set(ranks)
        while running:
            ended = multiprocessing.connection.wait(running, deadline - time.monotonic())
            assert ended, f"the processes did not end in {seconds} s"
            for sentinel in ended:
                process, log = ranks[sentinel]
                process.join()
                assert process.exitcode == 0, log.read_text(encoding="utf-8")[-6000:]
                running.remove(sentinel)
    finally:
        for process, _ in ranks.values():
            process.kill()
            process.join()
