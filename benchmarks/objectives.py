"""Compare masked language modelling with random token substitution: tokens per second, and fine-tuned accuracy.

    python -m benchmarks.objectives --data_dir data/corpus --finetune_data data/sst2

To measure their speed, both pretrain on the same data with the real command, in short alternating runs. Then each
pretrains for as many steps as take the same time at that speed, with a learning rate schedule of that length. Both
models, and an untrained encoder, are fine-tuned with the same settings and seeds. Writes a Markdown table with the
hardware, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from ds_roberta.model.objectives import SUMMARIES as OBJECTIVES

CONFIG = REPOSITORY / "ds_configs/zero1.json"
ROUNDS, STEPS_OF_A_ROUND, STEPS_LEFT_OUT = 3, 12, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--finetune_data", type=Path, required=True, help="for launch/finetune.py: classification")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--init_from", type=Path, help="a transformers folder to start from, for another size")
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--minutes", type=float, default=5, help="minutes of pretraining for each objective")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of fine-tuning")
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--finetune_learning_rate", default="1e-4", help="one or several; each objective gets its best")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/objectives.md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that this runs
    with tempfile.TemporaryDirectory() as folder:
        publish(compare(options, Path(folder)), options.output)


def compare(options: argparse.Namespace, folder: Path) -> list[str]:
    seconds: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    tokens: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    for number in range(ROUNDS):
        for objective in OBJECTIVES:
            rows = pretrain(options, objective, STEPS_OF_A_ROUND, folder / f"{objective}-{number}")
            seconds[objective] += [row["step_seconds"] for row in rows[STEPS_LEFT_OUT:]]
            tokens[objective] += [row["tokens_per_second"] for row in rows[STEPS_LEFT_OUT:]]
    table = [
        "| objective | tokens/s | ratio | steps | seconds | tokens seen | rate | accuracy, by seed | median |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for objective in OBJECTIVES:
        steps = round(60 * options.minutes / statistics.median(seconds[objective]))
        run = folder / objective
        rows = pretrain(options, objective, steps, run)
        rate = statistics.median(tokens[objective])
        ratio = rate / statistics.median(tokens["mlm"])
        spent = sum(row["step_seconds"] for row in rows)
        table.append(
            f"| {objective} | {rate:,.0f} | {ratio:.2f} | {steps:,} | {spent:,.0f} | {rows[-1]['consumed_tokens']:,} | "
            f"{accuracies(options, run / 'hf', folder / f'{objective}-tuned')} |"
        )
    untrained = folder / "untrained"
    pretrain(options, "mlm", 1, untrained, learning_rate=1e-12)
    tuned = accuracies(options, untrained / "hf", folder / "untrained-tuned")
    table.append(f"| not pretrained | | | 0 | 0 | 0 | {tuned} |")
    vocabulary = json.loads((options.data_dir / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    return [
        "# Objectives",
        "",
        f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores, {os.environ['OMP_NUM_THREADS']} threads. "
        f"{versions('torch', 'deepspeed', 'transformers')}",
        "",
        f"{size(options)}, {options.max_seq_length} tokens a sequence, a vocabulary of {vocabulary:,}, "
        f"{options.train_batch_size} sequences a step at a peak of {options.learning_rate:g}. Rates are medians of "
        f"{ROUNDS} alternating runs of each; the steps take {options.minutes:g} minutes at these rates. Fine-tuned on "
        f"{options.finetune_data.name}: {options.num_train_epochs} epochs at {options.finetune_learning_rate}, the "
        "rate with the best median, each run's best epoch on the validation split.",
        "",
        *table,
    ]


def size(options: argparse.Namespace) -> str:
    if options.init_from is None:
        return options.model
    config = json.loads((options.init_from / "config.json").read_text(encoding="utf-8"))
    return f"{config['num_hidden_layers']} layers of {config['hidden_size']}"


def pretrain(
    options: argparse.Namespace, objective: str, steps: int, output: Path, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Pretrain with the command and return the metrics of its steps."""
    settings = {
        "deepspeed_config": CONFIG,
        "data_dir": options.data_dir,
        "output_dir": output,
        "objective": objective,
        **({"init_from": options.init_from} if options.init_from else {"model": options.model}),
        "max_seq_length": options.max_seq_length,
        "train_batch_size": options.train_batch_size,
        "learning_rate": learning_rate or options.learning_rate,
        "max_steps": steps,
        "save_interval": 10 * steps,
        "eval_interval": 10 * steps,
    }
    run("pretrain.py", settings)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def accuracies(options: argparse.Namespace, model: Path, output: Path) -> str:
    """Return three cells: the rate with the best median, the accuracy with each seed, and their median."""
    settings = {
        "model": model,
        "task": "classification",
        "data": options.finetune_data,
        "output_dir": output,
        "seeds": options.seeds,
        "num_train_epochs": options.num_train_epochs,
        "learning_rate": options.finetune_learning_rate,
    }
    run("finetune.py", settings)
    settings_tried = json.loads((output / "results.json").read_text(encoding="utf-8"))["settings"]
    found = {
        setting["learning_rate"]: [entry["epochs"][entry["epoch"] - 1]["accuracy"] for entry in setting["runs"]]
        for setting in settings_tried
    }
    rate = max(found, key=lambda rate: statistics.median(found[rate]))
    by_seed = ", ".join(f"{accuracy:.1%}" for accuracy in found[rate])
    return f"{rate:g} | {by_seed} | {statistics.median(found[rate]):.1%}"


def run(script: str, settings: dict[str, Any]) -> None:
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, REPOSITORY / "launch" / script, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode:
        sys.exit(result.stdout.decode(errors="replace")[-3000:])


if __name__ == "__main__":
    main()
