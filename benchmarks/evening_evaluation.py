"""What is measured of each model of an evening, by the real commands."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY
from benchmarks.evening_texts import PAIRS, TEXTS_FOLDER
from benchmarks.studies import execute
from benchmarks.time_to_loss import PACKING
from ds_roberta.data.shards import TOKENIZER_FOLDER, VALIDATION_SPLIT, Corpus, Manifest
from ds_roberta.files import read_json
from ds_roberta.finetuning.task import RESULTS
from ds_roberta.inputs.tables import read_table
from ds_roberta.training.device import fastest_precision

SEQUENCES = 2048
"""Of each source's held-out documents."""
EVERYTHING = "all"
VALIDATION_FRACTION = "0.1"
"""Of the training examples, for tasks that have no validation split."""


@dataclass(frozen=True)
class Task:
    """How a task is fine-tuned and measured; `--task` and `--metric` of `launch/finetune.py`."""

    kind: str
    metric: str


TASKS = {
    "sst2": Task("classification", "accuracy"),
    "cola": Task("classification", "matthews_correlation"),
    "mrpc": Task("classification", "accuracy"),
    "rte": Task("classification", "accuracy"),
    "stsb": Task("regression", "pearson"),
    "banking77": Task("classification", "accuracy"),
    "wnut17": Task("token-classification", "f1"),
}


def held_out(options: argparse.Namespace, model: Path, lock: int) -> dict[str, Any]:
    """The loss on all held-out documents and on those of each source, by its name."""
    corpus, found = Corpus.open(options.data_dir), {}
    for source in (EVERYTHING, *corpus.manifest.sources(VALIDATION_SPLIT)):
        path = model.parent / f"evaluation-{source}.json"
        data = options.data_dir if source == EVERYTHING else of_source(corpus, source, model.parent / f"data-{source}")
        words = ["perplexity", "--data", str(data), "--max_seq_length", str(options.max_seq_length)]
        words += ["--packing", PACKING, "--eval_sequences", str(SEQUENCES)]
        _evaluate(model, words, path, lock)
        found[source] = {name: read_json(path)[name] for name in ("loss", "masked_tokens")}
    return found


def of_source(corpus: Corpus, source: str, folder: Path) -> Path:
    """Make a data folder that has only the held-out documents of a source, as links, and return it."""
    shards = tuple(shard for shard in corpus.manifest.splits[VALIDATION_SPLIT] if shard.source == source)
    for file in (*(shard.file for shard in shards), *_tokenizer_files(corpus)):
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((corpus.folder / file).resolve())
    Manifest(corpus.manifest.tokenizer, corpus.manifest.options, (), {VALIDATION_SPLIT: shards}).write(folder)
    return folder


def _tokenizer_files(corpus: Corpus) -> list[str]:
    return [f"{TOKENIZER_FOLDER}/{path.name}" for path in (corpus.folder / TOKENIZER_FOLDER).iterdir()]


def minimal_pairs(options: argparse.Namespace, model: Path, lock: int) -> dict[str, Any]:
    """Accuracies over all pairs, by paradigm, and by the phenomenon that paradigms belong to."""
    data, path = options.results / TEXTS_FOLDER / PAIRS, model.parent / f"{PAIRS}.json"
    _evaluate(model, ["minimal-pairs", "--data", str(data)], path, lock)
    report = read_json(path)
    paradigms = report["phenomena"]
    of_phenomenon: dict[str, list[float]] = {}
    for paradigm, phenomenon in _phenomena(data).items():
        of_phenomenon.setdefault(phenomenon, []).append(paradigms[paradigm]["accuracy"])
    return {
        "accuracy": report["mean_accuracy"],
        "pairs": sum(each["pairs"] for each in paradigms.values()),
        "phenomena": {name: statistics.fmean(found) for name, found in sorted(of_phenomenon.items())},
        "paradigms": {name: each["accuracy"] for name, each in paradigms.items()},
    }


def _phenomena(folder: Path) -> dict[str, str]:
    """By paradigm; BLiMP has these terms of linguistics in `linguistics_term`, copies of it in `term`."""
    rows = [row for path in sorted(folder.iterdir()) for row in read_table(path).rows]
    return {row["UID"]: str(row.get("linguistics_term") or row.get("term") or row["field"]) for row in rows}


def _evaluate(model: Path, words: Sequence[str], path: Path, lock: int) -> None:
    command = [sys.executable, str(REPOSITORY / "launch/evaluate.py"), *words]
    execute([*command, "--model", str(model), "--json", str(path)], lock)


def fine_tuned(options: argparse.Namespace, model: Path, name: str, lock: int) -> dict[str, Any]:
    """Fine-tune at each learning rate with each seed; the scores of the rate with the best median."""
    task, data = TASKS[name], options.results / TEXTS_FOLDER / name
    output = model.parent / name
    words = [sys.executable, str(REPOSITORY / "launch/finetune.py"), "--model", str(model), "--task", task.kind]
    words += ["--data", str(data), "--output_dir", str(output), "--metric", task.metric]
    if not any(path.stem in ("validation", "dev") for path in data.iterdir()):
        words += ["--validation_fraction", VALIDATION_FRACTION]
    words += ["--seeds", ",".join(map(str, options.finetune_seeds))]
    words += ["--learning_rate", ",".join(f"{rate:g}" for rate in options.finetune_learning_rates)]
    for option in ("max_seq_length", "num_train_epochs", "max_train_samples"):
        words += [f"--{option}", str(getattr(options, option))]
    precision = fastest_precision()
    execute([*words, "--bf16"] if precision == "bf16" else words, lock)
    results = read_json(output / RESULTS)
    scores = scores_by_rate(results["settings"], task.metric)
    rate = best_rate(scores)
    return {
        "metric": task.metric,
        "precision": precision,
        "examples": results["examples"],
        "scores_by_rate": {f"{each:g}": found for each, found in scores.items()},
        "learning_rate": rate,
        "scores": scores[rate],
        "test": results["best"].get("test", {}).get(task.metric),
    }


def scores_by_rate(settings: Sequence[Mapping[str, Any]], metric: str) -> dict[float, list[float]]:
    """The validation score of each seed's best epoch, from the settings of a `results.json`."""
    return {
        setting["learning_rate"]: [run["epochs"][run["epoch"] - 1][metric] for run in setting["runs"]]
        for setting in settings
    }


def best_rate(scores: Mapping[float, Sequence[float]]) -> float:
    """The rate with the highest median, the first if several are equal."""
    return max(scores, key=lambda rate: statistics.median(scores[rate]))


def is_above(ours: Sequence[float], other: Sequence[float]) -> bool:
    """Whether all seeds of ours are above all of the other's: their ranges do not overlap."""
    return min(ours) > max(other)
