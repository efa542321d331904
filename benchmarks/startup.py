"""Measure what a start costs, from the command to the end of the first step, by phase and by launcher.

    python -m benchmarks.startup

The launchers take turns, with one process each. All starts except an untimed first one are warm: files are in memory,
the index is built and the micro-batch known. Writes a Markdown table with the hardware, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import REPOSITORY, cpu_model, free_ports, publish, python_path, versions
from benchmarks.loader import example_corpus, spread

MODULE = "benchmarks.startup_marks"  # run by name: by path, modules here would hide the standard library's
PHASES = ("python", "imports", "data", "engine", "micro-batch", "evaluation", "first step")
BAR = 12
"""The most seconds that plain python should take from the start to the end of the first step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/startup.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish(lines(arguments.repetitions, Path(folder)), arguments.output)


def lines(repetitions: int, folder: Path) -> Iterator[str]:
    """Yield the lines of the report."""
    corpus = example_corpus(folder)
    first = start("python", corpus, folder / "first")
    runs: dict[str, list[dict[str, float]]] = {"python": [], "torchrun": [], "deepspeed": []}
    for repetition in range(repetitions):
        for launcher, measured in runs.items():
            measured.append(start(launcher, corpus, folder / f"{launcher}{repetition}"))
    yield "# A start: from the command to the end of the first step"
    yield ""
    yield f"| launcher | to the end of the first step | {' | '.join(PHASES)} | CPU of the process | whole command |"
    yield "|---|" + "---|" * (len(PHASES) + 3)
    for launcher, measured in runs.items():
        median = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        phases = " | ".join(f"{median[phase]:.2f} s" for phase in PHASES)
        total = spread([run["total"] for run in measured])
        yield f"| {launcher} | {total} s | {phases} | {median['CPU']:.2f} s | {median['command']:.2f} s |"
    yield ""
    yield (
        f"Wall time, medians of {repetitions} (lowest to highest), the launchers in turn, one process each, tiny at "
        "128 tokens, 32 sequences a step, ZeRO stage 1. *python*: until the script's first line, its launcher's work "
        "included. *data*: options, joining the processes, index. *evaluation*: the held-out loss before the first "
        "step. *CPU*: of the training process until the first step's end. *Whole command*: with the second evaluation, "
        f"the save, the export and its check. The bar for plain python is {BAR} s."
    )
    yield ""
    yield (
        f"The first start on a machine looks for the micro-batch: its phase takes {first['micro-batch']:.2f} s, "
        f"once; in all {first['total']:.2f} s to the end of the first step."
    )
    yield ""
    yield (
        f"{cpu_model()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}. "
        f"{versions('torch', 'deepspeed', 'transformers', 'pyarrow')}"
    )


def start(launcher: str, corpus: Path, output: Path) -> dict[str, float]:
    """Run one step; return seconds by phase, "total" to the end of the first step, its "CPU", and the whole
    "command"."""
    (port,) = free_ports(1)
    commands = {
        "python": ["-m"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"],
        "deepspeed": [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus=1",
            f"--master_port={port}",
            "--module",
        ],
    }
    marks_path = output.with_suffix(".json")
    environment = {**os.environ, "STARTUP_MARKS": str(marks_path), "XDG_CACHE_HOME": str(corpus.parent / "cache")}
    environment["PYTHONPATH"] = python_path()
    environment.pop("OMP_NUM_THREADS", None)  # benchmarks.loader sets it
    command = [sys.executable, *commands[launcher], MODULE, "--model", "tiny", "--train_batch_size", "32"]
    command += ["--deepspeed_config", str(REPOSITORY / "ds_configs/zero1.json"), "--data_dir", str(corpus)]
    command += ["--output_dir", str(output), "--max_steps", "1"]
    began = time.time()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{launcher} ended with {done.returncode}:\n{done.stdout}")
    marks = json.loads(marks_path.read_text(encoding="utf-8"))
    times = [began, *(marks[phase] for phase in PHASES)]
    seconds = {phase: after - before for phase, before, after in zip(PHASES, times[:-1], times[1:], strict=True)}
    cpu = marks["first step CPU"]
    return {**seconds, "total": times[-1] - began, "CPU": cpu, "command": ended - began}


if __name__ == "__main__":
    main()
