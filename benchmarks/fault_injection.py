"""Kill a training run at random moments, start it again, and compare its result with that of an unbroken run.

    python -m benchmarks.fault_injection --kills 20
    python -m benchmarks.fault_injection --kills 20 --signal

Every kill is SIGKILL to the launcher and all its processes at a random moment: while starting, within a micro-step,
within a save, between an evaluation and the save of the best. With --signal it is SIGTERM or SIGUSR1 to one process, as
schedulers send them; all must then save and exit within a minute. The runs pass when the final state, weights, both
Adam moments and all metrics but times are bit-identical (dropout is on; sequences have 32 tokens, one block of
keys, so that a GPU's attention rounds identically too).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from benchmarks.environment import REPOSITORY, python_path
from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.errors import UserError

STEPS = 40
SETTINGS = f"--model tiny --max_seq_length 32 --train_batch_size 24 --learning_rate 1e-3 --max_steps {STEPS}"
SETTINGS += " --warmup_steps 4 --save_interval 3 --eval_interval 10 --eval_sequences 64"
SECONDS_TO_LEAVE = 60
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
TIMES = ("tokens_per_second", "mfu", "step_seconds", "data_wait_share", "memory_gb")


def prepare(folder: Path) -> None:
    source = str(REPOSITORY / "examples/corpus/ethan-frome.txt")
    for command in (
        ["train-tokenizer", "--input", source, "--vocab_size", "1000", "--output", "tokenizer"],
        ["shard", "--input", source, "--tokenizer", "tokenizer", "--output", "data", "--validation_fraction", "0.05"],
    ):
        command = [sys.executable, "-m", "preprocessing.cli", *command]
        subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)


def start(folder: Path, output: str, processes: int, deepspeed_config: Path) -> subprocess.Popen[str]:
    """Start the run; its output goes to OUTPUT.log."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(REPOSITORY / "launch/pretrain.py"), *SETTINGS.split()]
    command += ["--deepspeed_config", str(deepspeed_config), "--data_dir", "data", "--output_dir", output]
    with (folder / f"{output}.log").open("a") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all its descendants: the launcher puts its workers into other process groups."""
    launcher = psutil.Process(pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def signal_one(pid: int, chosen: random.Random) -> str:
    """Send a stop signal to one training process, wait until all have exited, and return what was sent, in words."""
    launcher = psutil.Process(pid)
    workers = [child for child in launcher.children() if "launch/pretrain.py" in " ".join(child.cmdline())]
    if not workers:  # the launcher is still starting
        kill_tree(pid)
        return "SIGKILL to the launcher"
    number, worker = chosen.choice([signal.SIGTERM, signal.SIGUSR1]), chosen.choice(workers)
    worker.send_signal(number)
    _, alive = psutil.wait_procs(workers, timeout=SECONDS_TO_LEAVE)
    if alive:
        raise UserError(
            f"{len(alive)} of {len(workers)} processes had not left {SECONDS_TO_LEAVE} s after {number.name}"
        )
    psutil.wait_procs([launcher], timeout=SECONDS_TO_LEAVE)
    return f"{number.name} to rank {workers.index(worker)}"


def finish(folder: Path, output: str, process: subprocess.Popen[str]) -> float:
    """Wait for the end of the run; return how many seconds it took."""
    began = time.monotonic()
    if process.wait() != 0:
        last_lines = " ".join((folder / f"{output}.log").read_text(encoding="utf-8").split()[-60:])
        raise UserError(f"the run ended with exit code {process.returncode}: … {last_lines}")
    return time.monotonic() - began


def result(folder: Path, output: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the metrics without times and the final state; and the final weights and moments."""
    lines = (folder / output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    checkpoint = folder / output / f"checkpoints/global_step{STEPS}"
    rows.append(json.loads((checkpoint / "train_state.json").read_text(encoding="utf-8")))
    rows.append({"best": (checkpoint.parent / "best").read_text(encoding="utf-8")})
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("state-*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return rows, tensors


def ended_alike(folder: Path) -> bool:
    """Return whether the broken run ended like the unbroken one, and clear the broken run's folder."""
    (rows, tensors), (broken_rows, broken_tensors) = result(folder, "unbroken"), result(folder, "broken")
    shutil.rmtree(folder / "broken")
    same_tensors = tensors.keys() == broken_tensors.keys() and all(
        torch.equal(tensors[name], broken_tensors[name]) for name in tensors
    )
    print(
        f"    at its end: metrics and state identical: {rows == broken_rows}, tensors identical: {same_tensors}",
        flush=True,
    )
    return rows == broken_rows and same_tensors


def inject(arguments: argparse.Namespace, folder: Path) -> int:
    prepare(folder)
    seconds = finish(folder, "unbroken", start(folder, "unbroken", arguments.processes, arguments.deepspeed_config))
    print(f"unbroken run: {STEPS} steps, {seconds:.0f} s, {arguments.processes} processes", flush=True)
    moments, alike = random.Random(arguments.seed), True
    for kill in range(1, arguments.kills + 1):
        process = start(folder, "broken", arguments.processes, arguments.deepspeed_config)
        # From a kill during the start to one after several saves: the run must make progress in any case.
        delay, sent = moments.uniform(0.25, 0.6) * seconds, "SIGKILL to all"
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            if arguments.signal:
                sent = signal_one(process.pid, moments)
            else:
                kill_tree(process.pid)
            process.wait()
        saved = sorted((folder / "broken").glob("checkpoints/global_step*"), key=lambda path: int(path.name[11:]))
        newest = saved[-1].name if saved else "none"
        print(f"{sent} after {delay:5.1f} s ({kill}), newest checkpoint: {newest}", flush=True)
        if newest == f"global_step{STEPS}":
            alike = ended_alike(folder) and alike
    finish(folder, "broken", start(folder, "broken", arguments.processes, arguments.deepspeed_config))
    alike = ended_alike(folder) and alike
    what = "signals" if arguments.signal else "kills"
    print(f"{arguments.kills} {what}: {'every run ended as the unbroken one' if alike else 'A RUN DIFFERED'}")
    return 0 if alike else 1


def main() -> int:
    parser = ArgumentParser(description="Kill a run at random moments and compare its end with an unbroken run's.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", action="store_true", help="send a stop signal to one process, not SIGKILL to all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--deepspeed_config", type=Path, default=REPOSITORY / "ds_configs/zero2.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fault_injection-") as folder:
        return inject(arguments, Path(folder))


if __name__ == "__main__":
    run_command(main)
