"""Held-out loss over time: our recipes and transformers' Trainer as its `run_mlm` example uses it.

    python -m benchmarks.time_to_loss --data_dir data/wiki --model nano --minutes 11 --trainer_minutes 60

All train the same model on the same text, in turn, on one thread, and are measured on the same masked tokens; seconds
are those of optimizer steps, without start, evaluations and saves. The schedules of ours end with their minutes.
The Trainer has its own collator and linear schedule; it gets the best of several learning rates, found in shorter runs.
Writes a Markdown table with the hardware, the versions and the commit, and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.environment import REPOSITORY, cpu_model, publish, python_path, versions
from benchmarks.run_mlm import Case

PACKING = "contiguous"
EVALUATIONS = 12
TRIAL_STEPS = 20
"""Steps of the run that measures the Trainer's speed, by which the steps of the others follow from their minutes."""


class Point(NamedTuple):
    seconds: float
    tokens: float
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--eval_sequences", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=11, help="for each of ours")
    parser.add_argument("--adam_learning_rate", type=float, default=2e-3, help="of the paper's recipe in small batches")
    parser.add_argument("--trainer_minutes", type=float, default=60, help="for the Trainer at its best learning rate")
    parser.add_argument("--trainer_search_minutes", type=float, default=10, help="for each learning rate")
    parser.add_argument("--trainer_learning_rates", default="2e-4,5e-4,1e-3,2e-3")
    parser.add_argument("--train_batch_size", type=int, default=64, help="of all but the fast recipe")
    parser.add_argument("--seeds", default="0,1,2", help="of ours; the Trainer gets the first")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/time_to_loss.md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that this runs
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    seeds = [int(seed) for seed in options.seeds.split(",")]
    adam = ["--deepspeed_config", str(REPOSITORY / "ds_configs/zero1.json"), "--packing", PACKING]
    adam += ["--train_batch_size", str(options.train_batch_size), "--learning_rate", str(options.adam_learning_rate)]
    curves: dict[str, list[list[Point]]] = {}
    lines = {}
    for name, arguments in (("ours, `--recipe fast`", ["--recipe", "fast"]), ("ours, the paper's recipe", adam)):
        for seed in seeds:
            curve, lines = ours(options, arguments, seed, folder / f"{len(curves)}-{seed}")
            curves.setdefault(name, []).append(curve)
    rates = [float(rate) for rate in options.trainer_learning_rates.split(",")]
    trial = trainer(options, rates[0], TRIAL_STEPS, seeds[0])
    per_step = trial[-1].seconds / TRIAL_STEPS
    searched = {
        rate: trainer(options, rate, max(1, int(60 * options.trainer_search_minutes / per_step)), seeds[0])
        for rate in rates
    }
    best = min(rates, key=lambda rate: searched[rate][-1].loss)
    for rate, curve in searched.items():
        curves[f"Trainer at {rate:g}"] = [curve]
    steps = max(1, int(60 * options.trainer_minutes / per_step))
    curves[f"Trainer at {best:g}, longer"] = [trainer(options, best, steps, seeds[0])]
    plot(curves, lines, options.output.with_suffix(".png"))
    publish(report(options, curves, lines), options.output)


def ours(
    options: argparse.Namespace, arguments: Sequence[str], seed: int, output: Path
) -> tuple[list[Point], dict[str, float]]:
    """The losses of a run of the real command, and the lines to compare them with."""
    command = [sys.executable, str(REPOSITORY / "launch/pretrain.py"), *arguments]
    for name in ("data_dir", "model", "max_seq_length", "eval_sequences"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--output_dir", str(output), "--max_minutes", str(options.minutes), "--seed", str(seed)]
    command += ["--eval_interval", "100", "--save_interval", "1000000", "--loss_plateau", "off"]
    run(command)
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points, seconds, tokens = [], 0.0, 0
    for row in rows:
        if "eval_loss" in row:
            points.append(Point(seconds, tokens, row["eval_loss"]))
        else:
            seconds, tokens = seconds + row["step_seconds"], row["consumed_tokens"]
    return points, {name: rows[0][name] for name in ("unigram_loss", "neighbour_loss")}


def trainer(options: argparse.Namespace, rate: float, steps: int, seed: int) -> list[Point]:
    """The losses of a run of transformers' Trainer."""
    case = Case(
        data_dir=str(options.data_dir),
        model=options.model,
        max_seq_length=options.max_seq_length,
        packing=PACKING,
        eval_sequences=options.eval_sequences,
        train_batch_size=options.train_batch_size,
        learning_rate=rate,
        max_steps=steps,
        evaluations=EVALUATIONS,
        seed=seed,
    )
    printed = run([sys.executable, "-m", "benchmarks.run_mlm", json.dumps(asdict(case))])
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith('{"seconds"')]
    return [Point(**row) for row in rows]


def run(command: Sequence[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def report(options: argparse.Namespace, curves: dict[str, list[list[Point]]], lines: dict[str, float]) -> list[str]:
    ends = {name: [curve[-1] for curve in runs] for name, runs in curves.items()}
    longest = next(curve for name, (curve, *_) in curves.items() if name.endswith("longer"))
    table = ["| | seconds | million tokens | held-out loss, by seed | |", "|---|---|---|---|---|"]
    for name, points in ends.items():
        losses = ", ".join(f"{point.loss:.3f}" for point in points)
        worst = max(point.loss for point in points)
        reached = next((point.seconds for point in longest if point.loss <= worst), math.inf)
        about = "" if name.startswith("Trainer") else f"the Trainer needs {reached:,.0f} s for the worst of these"
        if math.isinf(reached) and about:
            about = f"the Trainer has {longest[-1].loss:.3f} after {longest[-1].seconds:,.0f} s"
        table.append(f"| {name} | {points[0].seconds:,.0f} | {points[0].tokens / 1e6:.1f} | {losses} | {about} |")
    vocabulary = json.loads((options.data_dir / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
    return [
        "# Held-out loss over time",
        "",
        f"{cpu_model()}, {os.environ['OMP_NUM_THREADS']} thread. {versions('torch', 'deepspeed', 'transformers')}",
        "",
        f"{options.model} on {options.data_dir.name}, {vocabulary:,} ids, {options.max_seq_length} tokens. The held-out"
        f" loss is {lines['unigram_loss']:.3f} from the frequencies of tokens and {lines['neighbour_loss']:.3f} from "
        "counts of neighbours. Seconds of optimizer steps. All curves are in the picture beside this table.",
        "",
        *table,
    ]


def plot(curves: dict[str, list[list[Point]]], lines: dict[str, float], output: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot(xlabel="seconds of optimizer steps", ylabel="held-out loss, nats per masked token")
    for number, (name, runs) in enumerate(curves.items()):
        for index, curve in enumerate(runs):
            label = {} if index else {"label": name.replace("`", "")}
            axes.plot([p.seconds for p in curve], [p.loss for p in curve], f"C{number}", **label)
    for name, loss in lines.items():
        axes.axhline(loss, color="gray", linestyle="--", linewidth=1)
        axes.annotate(name.replace("_loss", " line"), (0, loss), color="gray")
    axes.legend()
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main()
