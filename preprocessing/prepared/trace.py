"""`preprocess trace`: list the documents in the global batch of any past or future step.

The order is a pure function of (numbers of sequences, seed, weights of sources, place) and a step's places follow from
the run's stages, so only the run's options are needed, and a late step costs no more than an early one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ds_roberta.config import PackingConfig, Stage
from ds_roberta.data.global_batch import EMPTY_PLACE, split_places, step_places
from ds_roberta.data.manifest import TRAIN_SPLIT
from ds_roberta.data.mixture import parse_source_weights, sample_order
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import PackedSplit, build_index, open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import SkippedPlaces, make_stages, read_skipped, stage_number
from ds_roberta.errors import UserError
from ds_roberta.options import add_options, require_positive
from preprocessing.prepared.stored_documents import OFFSETS_HELP, Decoder, Origins, StoredDocument, StoredDocuments


@dataclass(frozen=True)
class TracedSequence:
    """One row of a global batch: the tokens `start … end` of a shard's values, and their documents.

    If sources have weights, `epoch` is that of its source.
    """

    max_seq_length: int
    place: int
    epoch: int
    sequence: int
    file: str
    source: str
    start: int
    end: int
    documents: tuple[StoredDocument, ...]


class BatchTracer:
    """Names the documents of any global batch of a run.

    Args:
        packing: the packing of the run's last stage; other stages' packings differ in length.
        stages, seed, source_weights, skipped: the run's.

    Raises:
        UserError: a value is out of range, or the packing index cannot be written.
    """

    def __init__(
        self,
        corpus: Corpus,
        packing: PackingConfig,
        stages: Sequence[Stage],
        seed: int,
        source_weights: dict[str, int] | None = None,
        skipped: Sequence[SkippedPlaces] = (),
    ):
        if seed < 0:
            raise UserError(f"--seed must not be negative, got {seed}")
        self._corpus, self._packing, self._stages, self._seed = corpus, packing, stages, seed
        self._source_weights, self._skipped = source_weights, skipped
        self.documents = StoredDocuments(corpus, TRAIN_SPLIT)
        self._data = cache(self._open)

    def _open(self, max_seq_length: int) -> tuple[PackedSplit, SampleOrder]:
        packing = replace(self._packing, max_seq_length=max_seq_length)
        build_index(self._corpus, TRAIN_SPLIT, packing)
        packed = open_index(self._corpus, TRAIN_SPLIT, packing)
        return packed, sample_order(packed, self._source_weights, self._seed)

    def _stage(self, step: int) -> Stage:
        require_positive("--step", step)
        return self._stages[stage_number(self._stages, step - 1)]

    def places(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the places of a step's batch, or of one process's part of it in that process's order: int64.

        Args:
            step: as in `metrics.jsonl`: step 1 is the first, on global batch 0.
        """
        stage = self._stage(step)
        _, order = self._data(stage.max_seq_length)
        places = step_places(order, self._stages, step - 1, self._skipped)
        own = np.concatenate(split_places(places, rank, world_size, stage.train_batch_size))
        return own[own != EMPTY_PLACE]

    def trace(self, step: int, places: np.ndarray) -> Iterator[TracedSequence]:
        """Yield the sequence at each of `places` in the step's order; for a pair, each of its segments."""
        length = self._stage(step).max_seq_length
        packed, order = self._data(length)
        sequences = order.sequences(places)
        rows = zip(places.tolist(), order.epochs(places).tolist(), sequences.tolist(), strict=True)
        segments = [np.stack(each, axis=1).tolist() for each in packed.segments(sequences)]
        for (place, epoch, sequence), *found in zip(rows, *segments, strict=True):
            for shard, start, end in found:
                documents = tuple(self.documents.overlapping(shard, start, end))
                info = self.documents.split.shards[shard]
                yield TracedSequence(length, place, epoch, sequence, info.file, info.source, start, end, documents)


def rows(step: int, traced: TracedSequence, origins: Origins | None = None) -> Iterator[dict[str, Any]]:
    """Yield what the command prints about each document of a sequence, by column.

    `tokens_start … tokens_end` are the document's tokens in the sequence; `input_start … input_end` is the part of the
    input that contains the document, or with `origins` the document's own bytes (in tables: rows).
    """
    for document in traced.documents:
        piece = document.source
        place = None if piece is None else (piece.start, piece.end) if origins is None else origins.span(document)
        start, end = (None, None) if place is None or isinstance(place, str) else place
        yield {
            "step": step,
            "max_seq_length": traced.max_seq_length,
            "place": traced.place,
            "epoch": traced.epoch,
            "sequence": traced.sequence,
            "source": traced.source or None,
            "document": document.number,
            "tokens_start": max(traced.start, document.start) - document.start,
            "tokens_end": min(traced.end, document.end) - document.start,
            "shard": document.file,
            "row": document.row,
            "input": None if piece is None else piece.path,
            "input_start": start,
            "input_end": end,
        }


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `trace` to the command line."""
    parser = commands.add_parser("trace", help="list the documents in any global batch of a run")
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="a folder that 'preprocess shard' made")
    parser.add_argument(
        "--step", type=int, nargs="+", required=True, metavar="N", help="steps as in metrics.jsonl: 1 is the first"
    )
    parser.add_argument("--train_batch_size", type=int, required=True, help="batch size of the run")
    parser.add_argument("--max_seq_length", type=int, required=True, help="sequence length of the run")
    parser.add_argument("--train_batch_size_schedule", help="schedule of the run, if any, in steps")
    parser.add_argument("--max_seq_length_schedule", help="schedule of the run, if any, in steps")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="checkpoint of a run that rolled back; it lists what was skipped"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0, as in training)")
    add_options(parser, PackingConfig, only=("packing",))
    parser.add_argument("--source_weights", metavar="NAME=WEIGHT,…", help="source weights of the run (default: none)")
    parser.add_argument(
        "--rank", default="0/1", metavar="R/W", help="only the part of process R (0 to W - 1), in its order"
    )
    parser.add_argument("--offsets", action="store_true", help=OFFSETS_HELP)
    parser.add_argument("--json", action="store_true", help="one object per line instead of columns")
    parser.set_defaults(run=_trace)


def _trace(arguments: argparse.Namespace) -> None:
    rank, world_size = _rank(arguments.rank)
    packing = PackingConfig(arguments.max_seq_length, arguments.packing)
    stages = make_stages(
        arguments.max_seq_length,
        arguments.train_batch_size,
        arguments.max_seq_length_schedule,
        arguments.train_batch_size_schedule,
    )
    skipped = [] if arguments.checkpoint is None else read_skipped(arguments.checkpoint)
    corpus = Corpus.open(arguments.data_dir)
    weights = parse_source_weights(arguments.source_weights, corpus.manifest)
    tracer = BatchTracer(corpus, packing, stages, arguments.seed, weights, skipped)
    origins = Origins(corpus, tracer.documents, Decoder(corpus)) if arguments.offsets else None
    header = not arguments.json
    for step in arguments.step:
        for traced in tracer.trace(step, tracer.places(step, rank, world_size)):
            for row in rows(step, traced, origins):
                if header:
                    print("\t".join(row))
                    header = False
                values = ("-" if value is None else str(value) for value in row.values())
                print(json.dumps(row, ensure_ascii=False) if arguments.json else "\t".join(values))


def _rank(text: str) -> tuple[int, int]:
    try:
        rank, world_size = map(int, text.split("/"))
    except ValueError:
        rank, world_size = -1, 0
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {text!r} is not a process of a run: write R/W with 0 ≤ R < W, such as 0/8")
    return rank, world_size
