"""From a plan to a data folder: units are tokenized by worker processes in any order, the manifest is written last."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    InputPiece,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    write_flat_shard,
)
from ds_roberta.errors import UserError
from ds_roberta.files import replaced_folder
from preprocessing.accept import accepted_documents
from preprocessing.accounts import MAX_BAD_FRACTION, Account, BadDocuments, input_infos, total_accounts
from preprocessing.encoders import (
    AUTO,
    HUGGINGFACE,
    BackendDifference,
    Encoded,
    Encoder,
    choose_backend,
    make_encoder,
)
from preprocessing.formats import is_url
from preprocessing.pieces import ReadOptions
from preprocessing.plan import UNIT_BYTES, Unit, plan_units
from preprocessing.progress import byte_bar
from preprocessing.sentences import sentences
from preprocessing.tokenizer import copy_tokenizer
from preprocessing.workers import run_units

_BATCH_BYTES = 1 << 20
_SPACE_BEFORE_NEWLINE = re.compile(r"\n(?<=\s\n)")  # it opens with a letter, not the look-behind, to be found fast
_PART_UNITS = 2
"""A unit that turns out larger, such as a compressed file, is written in parts of so many times `unit_bytes`."""


class Prepared(NamedTuple):
    """A document ready to be encoded."""

    sentences: bytes
    """UTF-8, apart by `\\n`."""
    source: str | None
    piece: int
    """Number of the unit's piece that holds it."""


@dataclass(frozen=True)
class ShardOptions:
    """All that the output's bytes depend on beside the input and the tokenizer; and how much of it may be bad."""

    read: ReadOptions = field(default_factory=ReadOptions)
    validation_fraction: float = 0.01
    unit_bytes: int = UNIT_BYTES
    max_bad_fraction: float = MAX_BAD_FRACTION


@dataclass(frozen=True)
class UnitResult:
    """What a unit became: its shards in each split that got a document, and an account by input file."""

    unit: Unit
    shards: dict[str, tuple[ShardInfo, ...]]
    accounts: dict[str, Account]
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
    files: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: ShardOptions,
    workers: int,
    sources: Mapping[str, str] | None = None,
    backend: str = AUTO,
) -> tuple[Manifest, Totals]:
    """Tokenize `files` into the data folder `output`, which appears whole or not at all.

    Args:
        sources: the source's name of every file that has one.
        backend: one of `encoders.BACKENDS`; the ids are the same with each.

    Returns:
        The manifest, and what the units counted beside it.

    Raises:
        UserError: too much bad input, a tokenizer of another kind, an output that cannot be written, or no training
            document.
    """
    units = plan_units(files, options.read, options.unit_bytes, sources)
    inside = [path for path in files if not is_url(path) and output.resolve() in Path(path).resolve().parents]
    if inside:
        raise UserError(f"the input {inside[0]!r} lies in the output {str(output)!r}: give another --output")
    with replaced_folder(output, is_data_folder, "a folder of prepared data") as folder:
        info = copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        backend, choice = choose_backend(backend, folder / TOKENIZER_FOLDER, info)
        print(f"tokenizer backend: {choice}")
        work = partial(_shard_unit, folder, info, options, backend)
        results: list[UnitResult] = []
        waiting: dict[int, UnitResult] = {}
        bad = BadDocuments(options.max_bad_fraction)
        with byte_bar(sum(unit.bytes for unit in units), "tokenizing") as bar:
            for result in run_units(units, work, workers):
                waiting[result.unit.index] = result
                while len(results) in waiting:
                    results.append(waiting.pop(len(results)))
                    bad.add(results[-1].accounts)
                bar.update(result.unit.bytes)
            bad.check()
        manifest = Manifest(
            tokenizer=info,
            options={
                **asdict(options.read),
                "validation_fraction": options.validation_fraction,
                "unit_bytes": options.unit_bytes,
            },
            inputs=input_infos(total_accounts(files, (result.accounts for result in results)), sources or {}),
            splits={split: tuple(s for r in results for s in r.shards[split]) for split in SPLITS},
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
        places = ", ".join(f"{piece.path!r} from {piece.start} to {piece.end}" for piece in unit.pieces)
        print(
            f"warning: {backend} {difference}; unit {unit.index} ({places}) is encoded again by {HUGGINGFACE}. "
            f"The other units agreed on their samples only: for certainty use --tokenizer_backend {HUGGINGFACE}",
            file=sys.stderr,
            flush=True,
        )
        return _tokenize_unit(folder, info, options, HUGGINGFACE, unit)


def _tokenize_unit(folder: Path, info: TokenizerInfo, options: ShardOptions, backend: str, unit: Unit) -> UnitResult:
    encoder, special = _encoder(folder / TOKENIZER_FOLDER, info, backend)
    accounts = {piece.path: Account() for piece in unit.pieces}
    documents = (
        Prepared(_sentence_bytes(document.text, options.read.sentences), document.source, number)
        for number, piece in enumerate(unit.pieces)
        for document in accepted_documents(piece, options.read, accounts[piece.path])
    )
    writers = {split: _Writer(folder, split, unit, info.vocab_size) for split in SPLITS}
    text_bytes = part_bytes = special_documents = 0
    for batch in _batches(documents):
        encoded = encoder.encode([document.sentences for document in batch])
        splits = np.array([split_of(document.sentences, options.validation_fraction) for document in batch])
        for split, writer in writers.items():
            writer.add(encoded, batch, splits == split)
        part_bytes += sum(len(document.sentences) for document in batch)
        special_documents += sum(special.search(document.sentences) is not None for document in batch)
        if part_bytes >= _PART_UNITS * options.unit_bytes:
            for writer in writers.values():
                writer.flush()
            text_bytes, part_bytes = text_bytes + part_bytes, 0
    for writer in writers.values():
        writer.flush()
    shards = {split: tuple(writer.shards) for split, writer in writers.items()}
    return UnitResult(unit, shards, accounts, text_bytes + part_bytes, special_documents)


class _Writer:
    """Gathers the documents of a unit for one split and writes them as shards, part by part."""

    def __init__(self, folder: Path, split: str, unit: Unit, vocab_size: int):
        self.shards: list[ShardInfo] = []
        self._unit, self._place, self._vocab_size = unit, (folder, split, unit.index), vocab_size
        self._parts: list[Encoded] = []
        self._sources: Counter[str] = Counter()
        self._pieces: Counter[int] = Counter()

    def add(self, encoded: Encoded, documents: Sequence[Prepared], chosen: np.ndarray) -> None:
        """Add those of a batch of documents where `chosen`, (documents,) bool, is true."""
        if not chosen.any():
            return
        self._parts.append(encoded.select(chosen))
        for number in np.flatnonzero(chosen).tolist():
            document = documents[number]
            self._pieces[document.piece] += 1
            if document.source:
                self._sources[document.source] += 1

    def flush(self) -> None:
        if self._parts:
            rows = Encoded.concatenate(self._parts)
            shard = write_flat_shard(*self._place, *rows, self._vocab_size, part=len(self.shards))
            sources = dict(sorted(self._sources.items()))
            self.shards.append(replace(shard, sources=sources, pieces=_input_pieces(self._unit, self._pieces)))
        self._parts, self._sources, self._pieces = [], Counter(), Counter()


def _input_pieces(unit: Unit, documents: Counter[int]) -> tuple[InputPiece, ...]:
    """The unit's pieces that gave a shard documents, with their numbers."""
    pieces = ((unit.pieces[number], count) for number, count in sorted(documents.items()))
    return tuple(InputPiece(piece.path, piece.start, piece.end, count) for piece, count in pieces)


@lru_cache(maxsize=2)
def _encoder(folder: Path, info: TokenizerInfo, backend: str) -> tuple[Encoder, re.Pattern[bytes]]:
    """Loaded once in a process; `info` tells two tokenizers apart that lay in the same place one after the other."""
    return make_encoder(backend, folder, info)


def _sentence_bytes(text: str, kind: str) -> bytes:
    """The sentences of a document, apart by `\\n`; most texts are so already where sentences are lines."""
    if kind != "lines" or text[0] == "\n" or text[-1].isspace() or _SPACE_BEFORE_NEWLINE.search(text):
        text = "\n".join(sentences(text, kind))
    return text.encode("utf-8")


def _batches(documents: Iterable[Prepared]) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.sentences)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_train_split(manifest: Manifest, options: ShardOptions) -> None:
    if manifest.documents(TRAIN_SPLIT):
        return
    if manifest.documents(VALIDATION_SPLIT):
        raise UserError(
            f"all {manifest.documents(VALIDATION_SPLIT)} documents fell into validation: "
            f"lower --validation_fraction {options.validation_fraction} or give more documents"
        )
    rejected: Counter[str] = sum((Counter(entry.rejected) for entry in manifest.inputs), Counter())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items()))
    raise UserError(
        f"the corpus is empty: no document with text is kept of {len(manifest.inputs)} input file(s)"
        + (f"; rejected: {reasons}; see --documents, --min_characters, --max_characters, --filter" if reasons else "")
    )
