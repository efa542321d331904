"""Compare masked language modelling with random token substitution: tokens per second, and fine-tuned accuracy.

    python -m benchmarks.objectives --data_dir data/corpus --finetune_data data/sst2

Both pretrain on the same data with the real command and the fast recipe: first in short alternating runs, which measure
their speed, then for the same minutes. Both models, and an untrained encoder, are fine-tuned with the same settings and
seeds. Writes a Markdown table with the hardware, the versions and the commit.
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

ROUNDS, STEPS_OF_A_ROUND, STEPS_LEFT_OUT = 3, 40, 5
PRETRAINING: dict[str, dict[str, Any]] = {
    "mlm": {},
    # The share of Di Liello et al. 2022, in place of the recipe's for masks.
    "rts": {"mlm_probability": 0.15, "mlm_probability_end": 0.15},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--finetune_data", type=Path, required=True, help="for launch/finetune.py: classification")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--max_seq_length", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=11, help="minutes of pretraining for each objective")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of fine-tuning")
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--finetune_learning_rate", default="1e-4", help="one or several; each objective gets its best")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/objectives.md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that this runs
    with tempfile.TemporaryDirectory() as folder:
        publish(compare(options, Path(folder)), options.output)


def compare(options: argparse.Namespace, folder: Path) -> list[str]:
    rates: dict[str, list[float]] = {objective: [] for objective in PRETRAINING}
    for number in range(ROUNDS):
        for objective, settings in PRETRAINING.items():
            rows = pretrain(
                options, folder / f"{objective}-{number}", objective=objective, max_steps=STEPS_OF_A_ROUND, **settings
            )
            rates[objective] += [row["tokens_per_second"] for row in rows if "loss" in row][STEPS_LEFT_OUT:]
    median = {objective: statistics.median(found) for objective, found in rates.items()}
    table = [
        "| objective | tokens/s | ratio | million tokens seen | held-out loss | rate | accuracy, by seed | median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    unigram_loss = 0.0
    for objective, settings in PRETRAINING.items():
        run = folder / objective
        rows = pretrain(options, run, objective=objective, max_minutes=options.minutes, **settings)
        last = next(row for row in reversed(rows) if "eval_loss" in row)
        unigram_loss = rows[0].get("unigram_loss", unigram_loss)  # which masked LM has
        table.append(
            f"| {objective} | {median[objective]:,.0f} | {median[objective] / median['mlm']:.2f} "
            f"| {rows[-1]['consumed_tokens'] / 1e6:.1f} | {last['eval_loss']:.3f} "
            f"| {accuracies(options, run / 'hf', folder / f'{objective}-tuned')} |"
        )
    untrained = folder / "untrained"
    pretrain(options, untrained, max_steps=1, learning_rate=1e-12, muon_lr=1e-12)
    tuned = accuracies(options, untrained / "hf", folder / "untrained-tuned")
    table.append(f"| not pretrained | | | 0 | | {tuned} |")
    vocabulary = json.loads((options.data_dir / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    return [
        "# Objectives",
        "",
        f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores, {os.environ['OMP_NUM_THREADS']} threads. "
        f"{versions('torch', 'deepspeed', 'transformers')}",
        "",
        f"{options.model}, `--recipe fast`, {options.max_seq_length} tokens, a vocabulary of {vocabulary:,}, "
        f"{options.minutes:g} minutes of pretraining. Rates are medians of {ROUNDS} alternating runs of each. The "
        f"frequencies of tokens alone give `mlm` a held-out loss of {unigram_loss:.3f}; the losses of two objectives "
        f"cannot be compared. Fine-tuned on {options.finetune_data.name}: {options.num_train_epochs} epochs at "
        f"{options.finetune_learning_rate}, the rate with the best median, each run's best epoch on the validation "
        "split.",
        "",
        *table,
    ]


def pretrain(options: argparse.Namespace, output: Path, **settings: Any) -> list[dict[str, Any]]:
    """Pretrain with the command and return its metrics."""
    given = {
        "recipe": "fast",
        "data_dir": options.data_dir,
        "output_dir": output,
        "model": options.model,
        "max_seq_length": options.max_seq_length,
        "save_interval": 1_000_000,
        "eval_interval": 1_000_000,
    }
    run("pretrain.py", {**given, **settings})
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


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
