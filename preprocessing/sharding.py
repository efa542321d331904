"""From a plan to a data folder: units are tokenized by worker processes in any order, the manifest is written last."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ds_roberta.data.shards import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    InputInfo,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    write_flat_shard,
)
from ds_roberta.errors import UserError
from ds_roberta.files import replaced_folder
from preprocessing.encoders import (
    AUTO,
    HUGGINGFACE,
    BackendDifference,
    Encoded,
    Encoder,
    choose_backend,
    make_encoder,
)
from preprocessing.plan import UNIT_BYTES, Unit, plan_units
from preprocessing.progress import byte_bar
from preprocessing.readers import KEPT, ReadOptions, accepted_documents, sentences
from preprocessing.tokenizer import copy_tokenizer
from preprocessing.workers import run_units

_BATCH_BYTES = 1 << 20
_SPACE_BEFORE_NEWLINE = re.compile(r"\n(?<=\s\n)")  # it opens with a letter, not the look-behind, to be found fast


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
    special_documents: int
    """Documents with the letters of a special token, which stayed text."""


class Totals(NamedTuple):
    """Sums over all units."""

    text_bytes: int
    special_documents: int


def is_data_folder(folder: Path) -> bool:
    """Whether `folder` was written by `shard_corpus`, so that it may be replaced."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {"format_version", "fingerprint", "splits"} <= content.keys()
    except (OSError, ValueError, AttributeError):
        return False


def shard_corpus(
    files: Sequence[str], tokenizer: Path, output: Path, options: ShardOptions, workers: int, backend: str = AUTO
) -> tuple[Manifest, Totals]:
    """Tokenize `files` into the data folder `output`, which appears whole or not at all.

    Returns:
        The manifest, and what the units counted beside it.

    Raises:
        UserError: bad input, a tokenizer of another kind, an output that cannot be written, no training document.
    """
    units = plan_units(files, options.read, options.unit_bytes)
    inside = [path for path in files if output.resolve() in Path(path).resolve().parents]
    if inside:
        raise UserError(f"the input {inside[0]!r} lies in the output {str(output)!r}: give another --output")
    with replaced_folder(output, is_data_folder, "a folder of prepared data") as folder:
        info = copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        backend, choice = choose_backend(backend, folder / TOKENIZER_FOLDER, info)
        print(f"tokenizer backend: {choice}")
        work = partial(_shard_unit, folder, info, options, backend)
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
    return manifest, Totals(*(sum(getattr(result, name) for result in results) for name in Totals._fields))


def split_of(document: bytes | str, validation_fraction: float) -> str:
    """The split of a document, by its sentences alone: it does not move when the corpus grows."""
    place = xxhash.xxh3_64_intdigest(document.encode() if isinstance(document, str) else document) / 2**64
    return VALIDATION_SPLIT if place < validation_fraction else TRAIN_SPLIT


def _shard_unit(folder: Path, info: TokenizerInfo, options: ShardOptions, backend: str, unit: Unit) -> UnitResult:
    """Tokenize a unit; where a fast backend differs from the reference, the whole unit goes by the reference."""
    try:
        return _tokenize_unit(folder, info, options, backend, unit)
    except BackendDifference as difference:
        places = ", ".join(f"{piece.path!r} bytes {piece.start}-{piece.end}" for piece in unit.pieces)
        print(
            f"warning: {backend} {difference}; unit {unit.index} ({places}) is encoded again by {HUGGINGFACE}. "
            f"The other units agreed on their samples only: for certainty use --tokenizer_backend {HUGGINGFACE}",
            file=sys.stderr,
            flush=True,
        )
        return _tokenize_unit(folder, info, options, HUGGINGFACE, unit)


def _tokenize_unit(folder: Path, info: TokenizerInfo, options: ShardOptions, backend: str, unit: Unit) -> UnitResult:
    encoder, special = _encoder(folder / TOKENIZER_FOLDER, info, backend)
    counts = {piece.path: Counter[str]() for piece in unit.pieces}
    texts = (text for piece in unit.pieces for text in accepted_documents(piece, options.read, counts[piece.path]))
    parts: list[Encoded] = []
    held_out: list[bool] = []
    text_bytes = special_documents = 0
    for batch in _batches(map(_sentence_bytes, texts)):
        parts.append(encoder.encode(batch))
        held_out += [split_of(document, options.validation_fraction) == VALIDATION_SPLIT for document in batch]
        text_bytes += sum(map(len, batch))
        special_documents += sum(special.search(document) is not None for document in batch)
    shards = {}
    if parts:
        encoded, validation = Encoded.concatenate(parts), np.array(held_out)
        for split, chosen in ((TRAIN_SPLIT, ~validation), (VALIDATION_SPLIT, validation)):
            if chosen.any():
                rows = encoded.select(chosen)
                shards[split] = write_flat_shard(folder, split, unit.index, *rows, info.vocab_size)
    return UnitResult(unit, shards, counts, text_bytes, special_documents)


@lru_cache(maxsize=2)
def _encoder(folder: Path, info: TokenizerInfo, backend: str) -> tuple[Encoder, re.Pattern[bytes]]:
    """Loaded once in a process; `info` tells two tokenizers apart that lay in the same place one after the other."""
    return make_encoder(backend, folder, info)


def _sentence_bytes(text: str) -> bytes:
    """The sentences of a document, apart by `\\n`; most texts are so already."""
    if text[0] == "\n" or text[-1].isspace() or _SPACE_BEFORE_NEWLINE.search(text):
        text = "\n".join(sentences(text))
    return text.encode("utf-8")


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
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
