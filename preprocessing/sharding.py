"""From a plan to a data folder: units are tokenized by worker processes in any order, the manifest is written last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import xxhash

from ds_roberta.data.shards import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    InputInfo,
    InputPiece,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    write_shard,
)
from ds_roberta.errors import UserError
from ds_roberta.files import replaced_folder
from preprocessing.plan import UNIT_BYTES, Unit, plan_units
from preprocessing.progress import byte_bar
from preprocessing.readers import KEPT, ReadOptions, accepted_documents, sentences, tokenizer_lines
from preprocessing.tokenizer import Encoder, copy_tokenizer
from preprocessing.workers import run_units

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1_000, 1_000_000


@dataclass(frozen=True)
class ShardOptions:
    """All that the output's bytes depend on beside the input and the tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    validation_fraction: float = 0.01
    unit_bytes: int = UNIT_BYTES


@dataclass(frozen=True)
class UnitResult:
    """What a unit became: its shard in each split that got a document, and counts by input file."""

    unit: Unit
    shards: dict[str, ShardInfo]
    counts: dict[str, Counter[str]]
    text_bytes: int


def is_data_folder(folder: Path) -> bool:
    """Whether `folder` was written by `shard_corpus`, so that it may be replaced."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {"format_version", "fingerprint", "splits"} <= content.keys()
    except (OSError, ValueError, AttributeError):
        return False


def shard_corpus(
    files: Sequence[str], tokenizer: Path, output: Path, options: ShardOptions, workers: int
) -> tuple[Manifest, int]:
    """Tokenize `files` into the data folder `output`, which appears whole or not at all.

    Returns:
        The manifest, and the bytes of text that were kept.

    Raises:
        UserError: bad input, a tokenizer of another kind, an output that cannot be written, no training document.
    """
    units = plan_units(files, options.read, options.unit_bytes)
    inside = [path for path in files if output.resolve() in Path(path).resolve().parents]
    if inside:
        raise UserError(f"the input {inside[0]!r} lies in the output {str(output)!r}: give another --output")
    with replaced_folder(output, is_data_folder, "a folder of prepared data") as folder:
        info = copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        work = partial(_shard_unit, folder, info, options)
        results = []
        with byte_bar(sum(unit.bytes for unit in units), "tokenizing") as bar:
            for result in run_units(units, work, workers):
                results.append(result)
                bar.update(result.unit.bytes)
        results.sort(key=lambda result: result.unit.index)
        manifest = Manifest(
            tokenizer=info,
            options={
                **asdict(options.read),
                "validation_fraction": options.validation_fraction,
                "unit_bytes": options.unit_bytes,
            },
            inputs=_input_infos(files, results),
            splits={split: tuple(r.shards[split] for r in results if split in r.shards) for split in SPLITS},
        )
        _check_train_split(manifest, options)
        manifest.write(folder)
    return manifest, sum(result.text_bytes for result in results)


def split_of(text: str, validation_fraction: float) -> str:
    """The split of a document, by its text alone: it does not move when the corpus grows."""
    place = xxhash.xxh3_64_intdigest(text.encode("utf-8")) / 2**64
    return VALIDATION_SPLIT if place < validation_fraction else TRAIN_SPLIT


def _shard_unit(folder: Path, info: TokenizerInfo, options: ShardOptions, unit: Unit) -> UnitResult:
    encoder = _encoder(folder / TOKENIZER_FOLDER, info)
    counts = {piece.path: Counter[str]() for piece in unit.pieces}
    origins: list[int] = []  # the piece of each document, in the order in which they are encoded

    def texts() -> Iterator[str]:
        for number, piece in enumerate(unit.pieces):
            for text in accepted_documents(piece, options.read, counts[piece.path]):
                origins.append(number)
                yield text

    rows: dict[str, list[tuple[np.ndarray, np.ndarray, int]]] = {split: [] for split in SPLITS}
    encoded = 0
    text_bytes = 0
    for batch in _batches(sentences(text) for text in texts()):
        for document, row in zip(batch, encoder.encode([tokenizer_lines(lines) for lines in batch]), strict=True):
            text = "\n".join(document)
            text_bytes += len(text.encode("utf-8"))
            rows[split_of(text, options.validation_fraction)].append((*row, origins[encoded]))
            encoded += 1
    shards = {}
    for split, split_rows in rows.items():
        if split_rows:
            ids, ends, pieces = zip(*split_rows, strict=True)
            shard = write_shard(folder, split, unit.index, ids, ends, info.vocab_size)
            shards[split] = replace(shard, pieces=_input_pieces(unit, Counter(pieces)))
    return UnitResult(unit, shards, counts, text_bytes)


def _input_pieces(unit: Unit, documents: Counter[int]) -> tuple[InputPiece, ...]:
    """The unit's pieces that gave a shard documents, with their numbers."""
    pieces = ((unit.pieces[number], count) for number, count in sorted(documents.items()))
    return tuple(InputPiece(piece.path, piece.start, piece.end, count) for piece, count in pieces)


@lru_cache(maxsize=1)
def _encoder(folder: Path, info: TokenizerInfo) -> Encoder:
    """Loaded once in a process; `info` tells two tokenizers apart that lay in the same place one after the other."""
    return Encoder(folder, info)


def _batches(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document))
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _input_infos(files: Sequence[str], results: Iterable[UnitResult]) -> tuple[InputInfo, ...]:
    totals = {path: Counter[str]() for path in files}
    for result in results:
        for path, counts in result.counts.items():
            totals[path] += counts
    return tuple(
        InputInfo(path, counts.total(), counts.pop(KEPT, 0), dict(sorted(counts.items())))
        for path, counts in totals.items()
    )


def _check_train_split(manifest: Manifest, options: ShardOptions) -> None:
    if manifest.documents(TRAIN_SPLIT):
        return
    if manifest.documents(VALIDATION_SPLIT):
        raise UserError(
            f"all {manifest.documents(VALIDATION_SPLIT)} documents fell into validation: "
            f"lower --validation_fraction {options.validation_fraction} or give more documents"
        )
    raise UserError(f"the corpus is empty: no document with text in {len(manifest.inputs)} input file(s)")
