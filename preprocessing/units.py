"""The work of one unit: turn a part of the input into shards, and rewrite these without repeated documents."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import compress, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from ds_roberta.data.manifest import SPLITS, TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT, InputPiece, ShardInfo
from ds_roberta.data.shards import write_flat_shard, write_shard
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.options import Settings, option, require_fraction
from preprocessing import dedup
from preprocessing.jobs.job import Record
from preprocessing.reading.accounts import KEPT, MAX_BAD_FRACTION, Account, kept_documents
from preprocessing.reading.documents import ReadOptions
from preprocessing.reading.planning import UNIT_BYTES, Unit
from preprocessing.tokens.encoders import HUGGINGFACE, BackendDifference, Encoded, Encoder, SpecialLetters, make_encoder
from preprocessing.tokens.sentence_splitting import sentence_bytes

_BATCH_BYTES = 1 << 20
_SOURCES_AT_MOST = 256
"""The most sources in one part of a unit: each source has its own shards, which would become too many and too small."""
RECORD_VERSION = 5
"""Version of a unit's record: a job does not resume from records of another version."""
_PART_UNITS = 2
"""A unit that turns out larger, such as a compressed file, is written in parts of this many times `unit_bytes`."""


class Prepared(NamedTuple):
    """A document ready to be encoded."""

    sentences: bytes
    """The document's sentences, as `sentence_bytes` gives them."""
    source: str | None
    piece: int
    """Number of the piece, within the unit, that holds the document."""


@dataclass(frozen=True)
class ShardOptions(Settings):
    """How documents become shards, and how much of the input may be bad.

    The output's bytes depend on these, the input and the tokenizer, and on nothing else.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    validation_fraction: float = option("fraction of the documents that is held out", 0.01, check=require_fraction)
    unit_bytes: int = UNIT_BYTES
    max_bad_fraction: float = option(
        "stop if more than this fraction of the documents is broken: not UTF-8, bad JSON, no text column",
        MAX_BAD_FRACTION,
        check=require_fraction,
    )
    dedup: str = option(
        "which repeated documents to drop: exact copies, or also near copies (MinHash)",
        "none",
        choices=dedup.DEDUP_KINDS,
    )
    allow_damaged_files: bool = option(
        "read what can be read of truncated or corrupt files and of .csv files with an unclosed quote, and list the "
        "losses at the end, instead of stopping at the first",
        False,
    )


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit: its shards in each split, an account by input file, and the sources in its table."""

    shards: dict[str, tuple[ShardInfo, ...]]
    accounts: dict[str, Account]
    text_bytes: int
    special_documents: int
    """Documents that contain the letters of a special token, which stayed text."""
    unknown_tokens: int
    """Tokens `<unk>`, each for one or more characters that the tokenizer does not know."""
    sources: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        return sum(account.counts[KEPT] for account in self.accounts.values())

    @property
    def is_damaged(self) -> bool:
        """Whether a part of an input could not be read."""
        return any(account.damage for account in self.accounts.values())

    def record(self) -> Record:
        """Return the result as JSON values."""
        return {
            "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
            "accounts": {path: vars(account) for path, account in self.accounts.items()},
            "text_bytes": self.text_bytes,
            "special_documents": self.special_documents,
            "unknown_tokens": self.unknown_tokens,
            "sources": self.sources,
        }

    @classmethod
    def from_record(cls, record: Record) -> UnitResult:
        """Make a result from what `record` returned, after a trip through JSON."""
        shards = {split: tuple(map(ShardInfo.from_json, shards)) for split, shards in record["shards"].items()}
        accounts = {
            path: Account(**{**account, "counts": Counter(account["counts"])})
            for path, account in record["accounts"].items()
        }
        return cls(
            shards,
            accounts,
            record["text_bytes"],
            record["special_documents"],
            record["unknown_tokens"],
            tuple(record["sources"]),
        )


def split_of(document: bytes | str, validation_fraction: float) -> str:
    """Return the split of a document. It depends only on the sentences, so it does not change when the corpus grows."""
    position = xxhash.xxh3_64_intdigest(document.encode() if isinstance(document, str) else document) / 2**64
    return VALIDATION_SPLIT if position < validation_fraction else TRAIN_SPLIT


def shard_unit(
    data: Path, info: TokenizerInfo, options: ShardOptions, backend: str, unit: Unit, scratch: Path
) -> Record:
    """Tokenize a unit with the tokenizer in `data`, into `scratch/data` or, if deduplication follows, `scratch/staged`.

    If a fast backend differs from the reference, the reference encodes the whole unit.
    """
    try:
        return _tokenize_unit(data, info, options, backend, unit, scratch)
    except BackendDifference as difference:
        places = ", ".join(f"{piece.path!r} from {piece.start} to {piece.end}" for piece in unit.pieces)
        print(
            f"warning: {backend} {difference}; unit {unit.index} ({places}) is encoded again by {HUGGINGFACE}. "
            f"Only samples of the other units were compared: to be certain, use --tokenizer_backend {HUGGINGFACE}",
            file=sys.stderr,
            flush=True,
        )
        return _tokenize_unit(data, info, options, HUGGINGFACE, unit, scratch)


def _tokenize_unit(
    data: Path, info: TokenizerInfo, options: ShardOptions, backend: str, unit: Unit, scratch: Path
) -> Record:
    encoder, special = _encoder(data / TOKENIZER_FOLDER, info, backend)
    folder = scratch / ("data" if options.dedup == "none" else "staged")
    table = dedup.DocumentTable(options.dedup)
    accounts = {piece.path: Account() for piece in unit.pieces}
    documents = (
        Prepared(sentence_bytes(document.text, options.read.sentences), document.source, number)
        for number, piece in enumerate(unit.pieces)
        for document in kept_documents(piece, options.read, accounts[piece.path])
    )
    writers = {split: _Writer(folder, split, unit, info.vocab_size) for split in SPLITS}
    text_bytes = part_bytes = special_documents = unknown_tokens = part = 0
    for batch in _batches(documents):
        texts = [document.sentences for document in batch]
        encoded = encoder.encode(texts)
        splits = np.array([split_of(text, options.validation_fraction) for text in texts])
        has_special = list(map(special.occur_in, texts))
        unknown = encoder.unknown_tokens(encoded)
        if options.dedup != "none":
            for document, split, *found in zip(batch, splits, has_special, unknown.tolist(), strict=True):
                place = SPLITS.index(split), part, document.piece
                table.add(document.sentences, *place, document.source or "", *found)
        for split, writer in writers.items():
            writer.add(encoded, batch, splits == split)
        part_bytes += sum(map(len, texts))
        special_documents += sum(has_special)
        unknown_tokens += int(unknown.sum())
        if part_bytes >= _PART_UNITS * options.unit_bytes:
            for writer in writers.values():
                writer.flush()
            text_bytes, part_bytes, part = text_bytes + part_bytes, 0, part + 1
    for writer in writers.values():
        writer.flush()
    shards = {split: tuple(writer.shards) for split, writer in writers.items()}
    if options.dedup != "none":
        table.write(scratch, unit.index)
    counts = (text_bytes + part_bytes, special_documents, unknown_tokens)
    return UnitResult(shards, accounts, *counts, table.sources).record()


def thin_unit(
    job: Path, info: TokenizerInfo, kind: str, documents: int, unit: Unit, result: UnitResult, scratch: Path
) -> Record:
    """Rewrite the staged shards of a unit without repeated documents. `documents` counts those of all units."""
    rows = dedup.load_rows(job, unit.index)
    keep, text_bytes, special_documents = np.ones(len(rows), bool), result.text_bytes, result.special_documents
    unknown_tokens = result.unknown_tokens
    accounts = {path: replace(a, counts=Counter(a.counts)) for path, a in result.accounts.items()}
    for reason, dropped in dedup.dropped_rows(job, kind, documents, unit.index).items():
        keep[dropped] = False
        text_bytes -= int(rows["bytes"][dropped].sum(dtype=np.int64))
        special_documents -= int(rows["special"][dropped].sum(dtype=np.int64))
        unknown_tokens -= int(rows["unknown"][dropped].sum(dtype=np.int64))
        for piece, number in Counter(rows["piece"][dropped].tolist()).items():
            counts = accounts[unit.pieces[piece].path].counts
            counts[KEPT] -= number
            counts[reason] += number
    shards = {}
    for split, infos in result.shards.items():
        thinned = []
        in_split, source = rows["split"] == SPLITS.index(split), rows["source"]
        origins = sorted(
            (part, result.sources[number]) for part, number in np.unique(rows[["part", "source"]][in_split]).tolist()
        )
        for number, (shard, (part, name)) in enumerate(zip(infos, origins, strict=True)):
            here = in_split & (rows["part"] == part) & (source == result.sources.index(name))
            staged, target = job / "staged" / shard.file, scratch / "data"
            if keep[here].all():
                _link(staged, target / shard.file)
                thinned.append(shard)
            elif keep[here].any():
                batch = pa.ipc.open_stream(pa.memory_map(str(staged))).read_next_batch()
                ids, ends = (_lists(batch.column(name), keep[here]) for name in ("input_ids", "sentence_ends"))
                new = write_shard(target, split, unit.index, ids, ends, info.vocab_size, part=number)
                pieces = _input_pieces(unit, Counter(rows["piece"][here & keep].tolist()))
                thinned.append(replace(new, source=shard.source, pieces=pieces))
        shards[split] = tuple(thinned)
    return UnitResult(shards, accounts, text_bytes, special_documents, unknown_tokens).record()


class _Writer:
    """Gathers the documents of a unit for one split and writes them as shards, part by part and source by source."""

    def __init__(self, folder: Path, split: str, unit: Unit, vocab_size: int):
        self.shards: list[ShardInfo] = []
        self._unit, self._place, self._vocab_size = unit, (folder, split, unit.index), vocab_size
        self._gathered: dict[str, tuple[list[Encoded], Counter[int]]] = {}
        """For each source, the documents and how many of them came from each of the unit's pieces."""

    def add(self, encoded: Encoded, documents: Sequence[Prepared], chosen: np.ndarray) -> None:
        """Add the documents of a batch where `chosen`, (documents,) bool, is true."""
        for source in {document.source for document in compress(documents, chosen)}:
            of_source = chosen & np.fromiter((document.source == source for document in documents), bool)
            parts, pieces = self._gathered.setdefault(source or "", ([], Counter()))
            parts.append(encoded.select(of_source))
            pieces.update([document.piece for document in compress(documents, of_source)])
        if len(self._gathered) > _SOURCES_AT_MOST:
            raise UserError(
                f"--source_column gives more than {_SOURCES_AT_MOST} sources in one part of "
                f"{self._unit.pieces[0].path!r}, and each gets its own shards: use fewer, larger sources "
                "(a --filter can look at --id_column instead)"
            )

    def flush(self) -> None:
        for source, (parts, pieces) in sorted(self._gathered.items()):
            rows = Encoded.concatenate(parts)
            shard = write_flat_shard(*self._place, *rows, self._vocab_size, part=len(self.shards))
            self.shards.append(replace(shard, source=source, pieces=_input_pieces(self._unit, pieces)))
        self._gathered = {}


def _input_pieces(unit: Unit, documents: Counter[int]) -> tuple[InputPiece, ...]:
    """Return the unit's pieces that a shard's documents come from, and how many come from each."""
    pieces = ((unit.pieces[number], count) for number, count in sorted(documents.items()))
    return tuple(InputPiece(piece.path, piece.start, piece.end, count) for piece, count in pieces)


@lru_cache(maxsize=2)
def _encoder(folder: Path, info: TokenizerInfo, backend: str) -> tuple[Encoder, SpecialLetters]:
    """Load the encoder once per process; `info` distinguishes tokenizers that replaced each other at the same path."""
    return make_encoder(backend, folder, info)


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


def _lists(column: pa.ListArray, keep: np.ndarray) -> list[np.ndarray]:
    """Return the rows of a column where `keep`, (rows,) bool, is true."""
    values, offsets = np.from_dlpack(column.values), np.from_dlpack(column.offsets)  # `to_numpy` imports pandas
    return [values[begin:end] for (begin, end), kept in zip(pairwise(offsets), keep, strict=True) if kept]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
