"""Run the real commands, and interrupt them.

`launch`, and what is built on it, forks the commands of `launch/`; `run` starts programs as a shell does.
"""

import os
import runpy
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from forked import start

REPOSITORY = Path(__file__).parents[2]
PRETRAIN = REPOSITORY / "launch/pretrain.py"
CONFIG = REPOSITORY / "ds_configs/zero2.json"
NEEDED = {  # by scripts, of the packages that a user may lack
    "examples/use/sentence_embeddings.py": ["sentence_transformers"],
    "examples/use/lora.py": ["peft"],
    "examples/use/onnx_export.py": ["onnxruntime", "onnxscript"],
}


def names_of(script: str) -> dict[str, Any]:
    """What a script defines; the test is skipped if a package that the script needs is missing."""
    for package in NEEDED.get(script, ()):
        pytest.importorskip(package, reason=f"{script} needs {package}: pip install 'ds_roberta[examples]'")
    return runpy.run_path(str(REPOSITORY / script))


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


def launch(script: Path, *arguments: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command of `launch/` to its end and check its exit code; return what it printed on both streams."""
    process, log = start(script, *arguments, cwd=cwd, environment=environment(cwd))
    process.join(280)
    process.kill()
    printed = log.read_text(encoding="utf-8")
    assert process.exitcode == code, printed[-6000:]
    return printed


def pretrain(cwd: Path, *arguments: str | Path, code: int = 0) -> str:
    return launch(PRETRAIN, "--deepspeed_config", CONFIG, *arguments, cwd=cwd, code=code)


def pretrain_until(cwd: Path, condition, number: signal.Signals, *arguments: str | Path) -> tuple[int, str]:
    """Start pretraining in a new process group, and send a signal to the whole group once `condition()` holds."""
    command = (PRETRAIN, "--deepspeed_config", CONFIG, *arguments)
    process, log = start(*command, cwd=cwd, environment=environment(cwd))
    try:
        deadline = time.monotonic() + 120
        while not (has_come := condition()) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        printed = log.read_text(encoding="utf-8")[-6000:]
        assert process.is_alive(), printed
        assert has_come, printed
        os.killpg(process.pid, number)
        process.join(120)
        return process.exitcode, log.read_text(encoding="utf-8")
    finally:
        process.kill()
