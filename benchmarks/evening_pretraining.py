"""The three models of an evening: ours, through kills and a change of processes; transformers' Trainer; untrained."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.environment import REPOSITORY, python_path
from benchmarks.studies import IN_CPU_TIME, WITH_THE_STUDY, execute
from benchmarks.time_to_loss import LINES, Run, finished, longest_run, measure, points_of, runs_of
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json
from ds_roberta.finetuning.trainer_checkpoints import last_checkpoint
from ds_roberta.training.budget import PLAN_NAME
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER, saved_steps
from ds_roberta.training.metrics import METRICS_NAME, read_metrics

STARTS_NAME = "ours-starts.json"
SECONDS_BETWEEN_LOOKS = 0.5
KILLED, FINISHED, ENDED, UNSEEN = "SIGKILL", "finished", "ended with the study", "not seen"
NO_RATE = "1e-12"


class Stretch(NamedTuple):
    """A part of the run: it ends with a SIGKILL when `share` of the steps are done, or with the run if that is 1."""

    share: float
    processes: int


def stretches(text: str) -> tuple[Stretch, ...]:
    """Parse SHARE:PROCESSES pairs; a `type` for argparse."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        found = tuple(Stretch(float(share), int(processes)) for share, processes in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of SHARE:PROCESSES") from error
    shares = [stretch.share for stretch in found]
    if shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1 or min(each[1] for each in found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: shares must rise to 1, with at least one process each")
    return found


def ours(options: argparse.Namespace, lock: int) -> dict[str, Any]:
    """Train with the real command and CPU time as its clock, and say what came of each start."""
    output = options.results / f"ours-seed{options.seed}"
    starts = _starts(options)
    while not starts or starts[-1]["end"] != FINISHED:
        killed = sum(start["end"] == KILLED for start in starts)
        _start(options, output, options.stretches[killed], starts, lock)
    rows, _ = read_metrics(output / METRICS_NAME)
    return {
        "hf": f"{output.name}/hf",
        "points": points_of(rows, lambda step: processes_at(step, starts)),
        "lines": {name: rows[0][name] for name in LINES},
        "starts": starts,
        "cpu_seconds": sum(start["cpu_seconds"] for start in starts),
    }


def _starts(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = options.results / STARTS_NAME
    return read_json(path) if path.exists() else []


def _start(
    options: argparse.Namespace, output: Path, stretch: Stretch, starts: list[dict[str, Any]], lock: int
) -> None:
    """Start the run, and end it where the stretch does; the start is kept as it goes.

    Raises:
        UserError: the run failed.
    """
    words = [sys.executable, "-c", IN_CPU_TIME, *_pretrain(options, output), "--max_minutes", str(options.minutes)]
    if stretch.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc_per_node"]
        words = [sys.executable, *launcher, str(stretch.processes), *words]
    start: dict[str, Any] = {"processes": stretch.processes, "from_step": _saved(output), "last_step": 0}
    start |= {"cpu_seconds": 0.0, "end": UNSEEN}
    starts.append(start)
    environment = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen([*WITH_THE_STUDY, *words], env=environment, stdout=subprocess.DEVNULL, pass_fds=[lock])
    try:
        while start["end"] == UNSEEN:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            start["last_step"] = last_step(output)
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
                start |= {"cpu_seconds": usage.ru_utime + usage.ru_stime, "end": FINISHED}
                break
            start["cpu_seconds"] = _cpu_seconds(process.pid)
            steps = _planned_steps(output)
            if stretch.share < 1 and steps and start["last_step"] >= stretch.share * steps:
                _kill_tree(process.pid)
                start["end"] = KILLED
            write_json(options.results / STARTS_NAME, starts)
        if process.returncode:
            start["end"] = f"exit code {process.returncode}"
            raise UserError(f"exit code {process.returncode}: {' '.join(words)}")
    finally:
        if start["end"] == UNSEEN:
            _kill_tree(process.pid)
            start["end"] = ENDED
        write_json(options.results / STARTS_NAME, starts)


def _kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all its descendants: the launcher puts its workers into other process groups."""
    launcher = psutil.Process(pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def _pretrain(options: argparse.Namespace, output: Path) -> list[str]:
    words = [str(REPOSITORY / "launch/pretrain.py"), "--recipe", "fast", "--output_dir", str(output)]
    for name in ("data_dir", "model", "objective", "max_seq_length", "train_batch_size", "eval_sequences", "seed"):
        words += [f"--{name}", str(getattr(options, name))]
    interval = str(options.interval)
    words += shlex.split(options.pretrain_options)
    return [*words, "--eval_interval", interval, "--save_interval", interval, "--loss_plateau", "off"]


def _saved(output: Path) -> int:
    return max(saved_steps(output / CHECKPOINTS_FOLDER), default=0)


def _planned_steps(output: Path) -> int | None:
    path = output / PLAN_NAME
    return int(read_json(path)["max_steps"]) if path.exists() else None


def last_step(output: Path) -> int:
    """The newest step in a running run's metrics, 0 without one."""
    path = output / METRICS_NAME
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 13)))
        *lines, _ = file.read().split(b"\n")  # what follows the last line end may be part of a line
    return int(json.loads(lines[-1])["global_step"]) if lines else 0


def _cpu_seconds(pid: int) -> float:
    """Of a process, its descendants, and those of them that have ended."""
    seconds = 0.0
    try:
        launcher = psutil.Process(pid)
        for process in (launcher, *launcher.children(recursive=True)):
            seconds += sum(process.cpu_times()[:4])  # its own user and system time, and of children that have ended
    except psutil.NoSuchProcess:  # it ended meanwhile: the next look has the whole sum
        return seconds
    return seconds


def processes_at(step: int, starts: Sequence[dict[str, Any]]) -> int:
    """The number of processes of the last start that trained a step: earlier ones lost what they made of it."""
    return next(int(start["processes"]) for start in reversed(starts) if start["from_step"] < step)


def trainer(options: argparse.Namespace, lock: int) -> dict[str, Any]:
    """Train with transformers' Trainer, at the best of several learning rates if there are more than one."""
    case = argparse.Namespace(**vars(options), seeds=(options.seed,), trainer_minutes=options.minutes)
    run: Run | None = Run("trainer", options.trainer_learning_rates[0], options.seed, options.minutes)
    if len(options.trainer_learning_rates) > 1:
        for shorter in runs_of(case, "trainer"):
            measure(case, shorter, lock)
        run = longest_run(case)
    assert run is not None
    measure(case, run, lock)
    curve, checkpoint = finished(case, run.name), last_checkpoint(options.results / run.name)
    assert curve is not None
    assert checkpoint is not None
    return {
        "hf": f"{run.name}/{checkpoint.name}",
        "learning_rate": run.rate,
        "points": curve.points,
        "lines": {},
        "cpu_seconds": curve.points[-1].seconds,
    }


def untrained(options: argparse.Namespace, lock: int) -> dict[str, Any]:
    """Export the initial weights of ours: a step at a rate of nothing leaves them as they were."""
    output = options.results / f"untrained-seed{options.seed}"
    words = [sys.executable, *_pretrain(options, output), "--max_steps", "1"]
    execute([*words, "--learning_rate", NO_RATE, "--muon_lr", NO_RATE], lock)
    return {"hf": f"{output.name}/hf", "points": [], "lines": {}, "cpu_seconds": 0.0}
