"""The texts of an evening's evaluations, without those that overlap the training text."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overlap import is_too_short, near_copies
from ds_roberta.data.manifest import TRAIN_SPLIT
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path
from ds_roberta.inputs.streams import format_of
from ds_roberta.inputs.tables import TABULAR, read_table
from preprocessing.prepared.stored_documents import Decoder, StoredDocuments

TEXTS_FOLDER = "texts"
"""In the folder of results: a folder for each task, with tables as JSON lines."""
PAIRS = "minimal-pairs"
COLUMNS = ("sentence", "sentence1", "sentence2", "text", "tokens", "sentence_good", "sentence_bad")


def tasks_of(options: argparse.Namespace, known: Mapping[str, Any]) -> list[str]:
    """The known tasks that there are data for."""
    found = [task for task in known if (options.tasks / task).is_dir()]
    if not found:
        raise UserError(f"--tasks {str(options.tasks)!r} has no folder of a known task: {', '.join(known)}")
    return found


def without_overlap(options: argparse.Namespace, tasks: list[str]) -> dict[str, Any]:
    """Write all tables without the rows that overlap the training text; return how many there are, by table."""
    began = time.process_time()
    tables = {f"{task}/{name}": rows for task in tasks for name, rows in _tables(options.tasks / task)}
    tables |= {f"{PAIRS}/{name}": rows for name, rows in _tables(options.pairs)}
    rows_texts = [(row, text) for rows in tables.values() for row in rows for text in _texts(row)]
    found = near_copies([text for _, text in rows_texts], texts_of(Corpus.open(options.data_dir), TRAIN_SPLIT))
    overlapping = {id(row) for (row, _), flag in zip(rows_texts, found, strict=True) if flag}
    counts = {}
    for name, rows in tables.items():
        kept = [row for row in rows if id(row) not in overlapping]
        write_table(options.results / TEXTS_FOLDER / f"{name}.jsonl", kept)
        short = sum(all(map(is_too_short, _texts(row))) for row in rows)
        counts[name] = {"rows": len(rows), "overlapping": len(rows) - len(kept), "too short to be compared": short}
    return {"tables": counts, "cpu_seconds": time.process_time() - began}


def _tables(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for path in sorted(folder.iterdir()):
        if format_of(path.name, TABULAR):
            yield path.name.partition(".")[0], read_table(path).rows


def _texts(row: Mapping[str, Any]) -> list[str]:
    given = (row[column] for column in COLUMNS if row.get(column))
    return [value if isinstance(value, str) else " ".join(value) for value in given]


def texts_of(corpus: Corpus, split: str) -> Iterator[str]:
    """The documents of a split."""
    documents, decoder = StoredDocuments(corpus, split), Decoder(corpus)
    for number in range(len(documents)):
        yield decoder.text(documents.sentences(documents.document(number)))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
