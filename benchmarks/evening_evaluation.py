"""What is measured of each model of an evening, by the real commands."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.evening_texts import PAIRS, TEXTS_FOLDER
from benchmarks.studies import Task, evaluate, fine_tuned, held_out_loss
from ds_roberta.data.manifest import TOKENIZER_FOLDER, VALIDATION_SPLIT, Manifest
from ds_roberta.data.shards import Corpus
from ds_roberta.files import read_json
from ds_roberta.inputs.tables import read_table

EVERYTHING = "all"
TASKS = {
    "cola": Task("classification", "matthews_correlation"),
    "mrpc": Task("classification", "accuracy"),
    "rte": Task("classification", "accuracy"),
    "stsb": Task("regression", "pearson"),
    "banking77": Task("classification", "accuracy"),
    "wnut17": Task("token-classification", "f1"),
    "sst2": Task("classification", "accuracy"),
}


def held_out(options: argparse.Namespace, model: Path, lock: int) -> dict[str, Any]:
    """The loss on all held-out documents and on those of each source, by its name."""
    corpus, found = Corpus.open(options.data_dir), {}
    for source in (EVERYTHING, *corpus.manifest.sources(VALIDATION_SPLIT)):
        path = model.parent / f"evaluation-{source}.json"
        data = options.data_dir if source == EVERYTHING else of_source(corpus, source, model.parent / f"data-{source}")
        found[source] = held_out_loss(model, data, options.max_seq_length, path, lock)
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
    evaluate(model, ["minimal-pairs", "--data", str(data)], path, lock)
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


def task_score(options: argparse.Namespace, model: Path, name: str, lock: int) -> dict[str, Any]:
    """What `studies.fine_tuned` gives for one of the tasks."""
    data = options.results / TEXTS_FOLDER / name
    return fine_tuned(options, model, TASKS[name], data, model.parent / name, options.finetune_seeds, lock)
