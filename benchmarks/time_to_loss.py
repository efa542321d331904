"""Held-out loss over CPU time: our recipes and transformers' Trainer as its `run_mlm` example uses it.

    python -m benchmarks.time_to_loss --data_dir data/wiki --model nano --minutes 11 --trainer_minutes 60

All train the same model on the same text, on one thread of the CPU, and are measured on the same masked tokens. Seconds
are the CPU time of the training process and its threads in optimizer steps, without start, evaluations and saves, so
other work on the machine changes them little. The schedules of ours end with their minutes, which include the start.
The Trainer has its own collator and linear schedule; it gets the best of several learning rates, found in shorter runs.

Each curve is kept in the folder of results as soon as it is finished, and the same command again goes on from the last
run's checkpoint. Calls with different `--contenders` may use the folder at the same time. Each call ends with a
Markdown table of what is finished, and a picture, beside the folder; `--contenders ''` only makes these.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, commit, cpu_model, publish
from benchmarks.run_mlm import POINTS_NAME, Case, read_points
from benchmarks.studies import IN_CPU_TIME, PACKING, beside, execute, only_here, recipe_name, same_settings
from benchmarks.time_to_loss_report import Curve, Point, plot, report
from ds_roberta.command_line import ArgumentParser, positive, positive_number, run_command, several
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json
from ds_roberta.training.metrics import METRICS_NAME, read_metrics

EVALUATIONS = 30
"""Of a run of the Trainer."""
TRIAL_STEPS = 20
"""Steps of the run that measures the Trainer's speed, by which the steps of the others follow from their minutes."""
SAVE_INTERVAL = 100
CONTENDERS = {
    "fast": "ours, `--recipe fast`",
    "paper": "ours, AdamW with the paper's masks and dropout",
    "trainer": "the Trainer",
}
LINES = ("unigram_loss", "neighbour_loss")


@dataclass(frozen=True)
class Run:
    """One run, and the name of its curve. `rate` is None where the recipe has its own."""

    contender: str
    rate: float | None
    seed: int
    minutes: float

    @property
    def name(self) -> str:
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"{self.contender}{rate}-seed{self.seed}-{self.minutes:g}min"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which to run (default: %(default)s)")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--max_seq_length", type=positive, default=128)
    parser.add_argument("--eval_sequences", type=positive, default=512)
    parser.add_argument("--minutes", type=positive_number, default=11, help="for each of ours")
    parser.add_argument("--adam_learning_rate", type=positive_number, default=2e-3, help="of the paper's recipe")
    parser.add_argument("--trainer_minutes", type=positive_number, default=60, help="at its best learning rate")
    parser.add_argument("--trainer_search_minutes", type=positive_number, default=10, help="for each learning rate")
    parser.add_argument("--trainer_learning_rates", type=several(positive_number), default=(2e-4, 5e-4, 1e-3, 2e-3))
    parser.add_argument("--train_batch_size", type=positive, default=64, help="of all but the fast recipe")
    parser.add_argument("--seeds", type=several(int), default=(0, 1, 2), help="of ours; the Trainer gets the first")
    parser.add_argument(
        "--results", type=Path, help="folder of the curves (default: the model's in benchmarks/results)"
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that this runs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # subprocess then ends the command that runs
    run_command(lambda: compare(parser.parse_args()))


def compare(options: argparse.Namespace) -> None:
    options.results = options.results or REPOSITORY / "benchmarks/results/time_to_loss" / options.model
    contenders = [name for name in options.contenders.split(",") if name]
    if unknown := set(contenders) - CONTENDERS.keys():
        raise UserError(f"--contenders names {min(unknown)!r}: choose from {', '.join(CONTENDERS)}")
    same_settings(options.results, settings_of(options), "curves")
    for contender in contenders:
        with only_here(options.results, contender) as lock:
            for run in runs_of(options, contender):
                measure(options, run, lock)
            if contender == "trainer" and (longest := longest_run(options)):
                measure(options, longest, lock)
    rows = table_rows(options)
    plot(rows, beside(options.results, ".png"))
    publish(report(options, rows), beside(options.results, ".md"))


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the curves of a folder have in common."""
    data = Corpus.open(options.data_dir).manifest.fingerprint
    settings = {"data": data, "cpu": cpu_model(), "recipe": recipe_name()}
    names = ("model", "max_seq_length", "eval_sequences", "train_batch_size")
    return settings | {f"--{name}": getattr(options, name) for name in names}


def runs_of(options: argparse.Namespace, contender: str) -> list[Run]:
    """All runs of a contender but the Trainer's longest."""
    if contender == "trainer":
        minutes = options.trainer_search_minutes
        return [Run(contender, rate, options.seeds[0], minutes) for rate in options.trainer_learning_rates]
    rate = options.adam_learning_rate if contender == "paper" else None
    return [Run(contender, rate, seed, options.minutes) for seed in options.seeds]


def longest_run(options: argparse.Namespace) -> Run | None:
    """The Trainer's run at its best learning rate, once it is known."""
    ends = {run: curve.points[-1].loss for run in runs_of(options, "trainer") if (curve := finished(options, run.name))}
    if len(ends) < len(options.trainer_learning_rates):
        return None
    best = min(ends, key=lambda run: ends[run])
    return Run("trainer", best.rate, best.seed, options.trainer_minutes)


def finished(options: argparse.Namespace, name: str) -> Curve | None:
    path = options.results / f"{name}.json"
    if not path.exists():
        return None
    kept = read_json(path)
    return Curve([Point(*point) for point in kept["points"]], kept["lines"], kept["commit"])


def measure(options: argparse.Namespace, run: Run, lock: int) -> None:
    """Run what has no curve yet, and keep its curve."""
    if finished(options, run.name):
        print(f"{run.name}: finished before", flush=True)
        return
    print(f"{run.name}: running", flush=True)
    if run.contender == "trainer":
        keep(options, run.name, trainer(options, run, run.name, steps_of(options, run, lock), lock), {})
    else:
        keep(options, run.name, *ours(options, run, lock))


def keep(options: argparse.Namespace, name: str, points: Sequence[Point], lines: dict[str, float]) -> None:
    write_json(options.results / f"{name}.json", asdict(Curve(list(points), lines, commit())))


def ours(options: argparse.Namespace, run: Run, lock: int) -> tuple[list[Point], dict[str, float]]:
    """The losses of a run of the real command with CPU time as its clock, and the lines to compare them with."""
    output = options.results / run.name
    command = [sys.executable, "-c", IN_CPU_TIME, str(REPOSITORY / "launch/pretrain.py")]
    if run.contender == "fast":
        command += ["--recipe", "fast"]
    else:
        command += ["--deepspeed_config", str(REPOSITORY / "ds_configs/zero1.json"), "--packing", PACKING]
        command += ["--train_batch_size", str(options.train_batch_size), "--learning_rate", str(run.rate)]
    for name in ("data_dir", "model", "max_seq_length", "eval_sequences"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--output_dir", str(output), "--max_minutes", str(run.minutes), "--seed", str(run.seed)]
    command += ["--eval_interval", "100", "--save_interval", str(SAVE_INTERVAL), "--loss_plateau", "off"]
    execute(command, lock)
    rows, _ = read_metrics(output / METRICS_NAME)
    return points_of(rows), {name: rows[0][name] for name in LINES}


def points_of(rows: Sequence[Mapping[str, Any]], processes: Callable[[int], int] = lambda step: 1) -> list[Point]:
    """The evaluations of a run whose clock was CPU time.

    Args:
        rows: of its `metrics.jsonl`.
        processes: the number that trained at a step.
    """
    points, seconds, tokens = [], 0.0, 0
    for row in rows:
        if "eval_loss" in row:
            points.append(Point(seconds, tokens, row["eval_loss"]))
        else:
            seconds += row["step_seconds"] * processes(row["global_step"])
            tokens = row["consumed_tokens"]
    return points


def steps_of(options: argparse.Namespace, run: Run, lock: int) -> int:
    """The steps of the Trainer that take the run's minutes, by the speed of a trial, which is kept as a curve too."""
    name = "trainer-trial"
    if not finished(options, name):
        keep(options, name, trainer(options, run, name, TRIAL_STEPS, lock), {})
    trial = finished(options, name)
    assert trial is not None
    return max(1, int(60 * run.minutes / trial.points[-1].seconds * TRIAL_STEPS))


def trainer(options: argparse.Namespace, run: Run, name: str, steps: int, lock: int) -> list[Point]:
    """The losses of a run of transformers' Trainer, in a folder with this name."""
    assert run.rate is not None
    case = Case(
        data_dir=str(options.data_dir),
        model=options.model,
        max_seq_length=options.max_seq_length,
        packing=PACKING,
        eval_sequences=options.eval_sequences,
        train_batch_size=options.train_batch_size,
        learning_rate=run.rate,
        max_steps=steps,
        evaluations=EVALUATIONS,
        seed=run.seed,
    )
    folder = options.results / name
    execute([sys.executable, "-m", "benchmarks.run_mlm", json.dumps(asdict(case)), str(folder)], lock)
    return [Point(**row) for row in read_points(folder / POINTS_NAME)]


def table_rows(options: argparse.Namespace) -> dict[str, list[Curve | None]]:
    """The curves of each row of the table, None for those that are missing."""
    rows = {CONTENDERS[name]: [finished(options, run.name) for run in runs_of(options, name)]
            for name in ("fast", "paper")}  # fmt: skip
    for run in runs_of(options, "trainer"):
        rows[f"{CONTENDERS['trainer']} at {run.rate:g}"] = [finished(options, run.name)]
    longest = longest_run(options)
    rows["the Trainer at the best of these, longest"] = [finished(options, longest.name) if longest else None]
    return rows


if __name__ == "__main__":
    main()
