"""Start commands as processes forked from one that has made their imports, which are half of a short run: real
processes with exit codes, signals and output of their own.
"""

import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
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
