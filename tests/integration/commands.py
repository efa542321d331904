"""Run the real commands, and interrupt them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def pretrain(cwd: Path, *arguments: str | Path, code: int = 0) -> str:
    return run(sys.executable, PRETRAIN, "--deepspeed_config", CONFIG, *arguments, cwd=cwd, code=code)


def pretrain_until(cwd: Path, condition, number: signal.Signals, *arguments: str | Path) -> tuple[int, str]:
    """Start pretraining in a new process group, and send a signal to the whole group once `condition()` holds."""
    command = [sys.executable, PRETRAIN, "--deepspeed_config", CONFIG, *arguments]
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not condition() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.stdout.read()[-6000:]
        os.killpg(process.pid, number)
        return process.wait(timeout=120), process.stdout.read()
