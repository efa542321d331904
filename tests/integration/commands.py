"""Run the real commands, and interrupt them.

Half of the processor time of a short run goes into imports. So `launch`, and what is built on it, forks the commands of
`launch/` from one process that has imported what they need: real processes with exit codes, signals and output of their
own. `run` starts programs as a shell does.
"""

import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PRETRAIN = REPOSITORY / "launch/pretrain.py"
CONFIG = REPOSITORY / "ds_configs/zero2.json"


def environment(cwd: Path) -> dict[str, str]:
    """With a user cache for each workspace, so that its runs take the same micro-batch, and with one thread: threads of
    small operations wait for each other on busy cores, and one makes two runs bit-identical anywhere.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")}


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command to its end and check its exit code; return what it printed on both streams."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert result.returncode == code, result.stdout[-6000:]
    return result.stdout


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


def _start(script: Path, *arguments: str | Path, cwd: Path) -> tuple[BaseProcess, Path]:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        log = Path(file.name)
    words = [str(script), *map(str, arguments)]
    process = _prepared().Process(target=_be, args=(words, cwd, environment(cwd), log))
    process.start()
    return process, log


def launch(script: Path, *arguments: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command of `launch/` to its end and check its exit code; return what it printed on both streams."""
    process, log = _start(script, *arguments, cwd=cwd)
    process.join(280)
    process.kill()
    printed = log.read_text(encoding="utf-8")
    assert process.exitcode == code, printed[-6000:]
    return printed


def pretrain(cwd: Path, *arguments: str | Path, code: int = 0) -> str:
    return launch(PRETRAIN, "--deepspeed_config", CONFIG, *arguments, cwd=cwd, code=code)


def pretrain_until(cwd: Path, condition, number: signal.Signals, *arguments: str | Path) -> tuple[int, str]:
    """Start pretraining in a new process group, and send a signal to the whole group once `condition()` holds."""
    process, log = _start(PRETRAIN, "--deepspeed_config", CONFIG, *arguments, cwd=cwd)
    try:
        deadline = time.monotonic() + 120
        while not condition() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.is_alive(), log.read_text(encoding="utf-8")[-6000:]
        os.killpg(process.pid, number)
        process.join(120)
        return process.exitcode, log.read_text(encoding="utf-8")
    finally:
        process.kill()
