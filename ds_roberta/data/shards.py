"""The shard format, which preprocessing writes and training reads.

    DIR/manifest.json            what is in the folder, and its fingerprint
    DIR/tokenizer/               the tokenizer that made the ids
    DIR/dataset_dict.json        so that datasets.load_from_disk(DIR) opens the folder
    DIR/<split>/shard-NNNNN.arrow, and shard-NNNNN-PPPPP.arrow for further parts or sources of one work unit

A shard is an uncompressed Arrow IPC stream of one record batch, one row per document. `input_ids` holds the document's
token ids, with the separator `</s>` at the end; `sentence_ends` holds, for every sentence, the offset in the document
after its last token, so its last value is the number of tokens without the separator. Because documents follow one
another in a single values buffer with their separators between them, a packed sequence is one contiguous slice of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ds_roberta.data.manifest import TOKENIZER_FOLDER, Manifest, ShardInfo
from ds_roberta.data.sentences import InCharacter, bounds_of_sentences, nowhere
from ds_roberta.data.tokenizer import ids_inside_characters, token_type
from ds_roberta.errors import LocalError, UserError
from ds_roberta.files import atomic_path

CHUNK_BYTES = 1 << 20
"""Bytes covered by one chunk checksum."""
OPEN_SHARDS = 30_000
"""The most shards that a process keeps mapped: Linux allows it 65,530 maps in all."""
_MAX_BATCH_TOKENS = 2**31 - 1  # offsets of an Arrow list are int32


def write_shard(
    folder: Path,
    split: str,
    index: int,
    documents: Sequence[np.ndarray],
    sentence_ends: Sequence[np.ndarray],
    vocab_size: int,
    part: int = 0,
) -> ShardInfo:
    """As `write_flat_shard`, but with one array of token ids and one of sentence ends for each document."""
    (ids, lengths), (ends, counts) = _flatten(documents), _flatten(sentence_ends)
    return write_flat_shard(folder, split, index, ids, lengths, ends, counts, vocab_size, part)


def write_flat_shard(
    folder: Path,
    split: str,
    index: int,
    ids: np.ndarray,
    lengths: np.ndarray,
    sentence_ends: np.ndarray,
    sentence_counts: np.ndarray,
    vocab_size: int,
    part: int = 0,
) -> ShardInfo:
    """Write one shard, atomically, and return its entry for the manifest.

    Args:
        ids: token ids, (tokens,), one document after the other, each closed by the separator.
        lengths: tokens of each document, separator included, (documents,).
        sentence_ends: offsets in the document after each sentence, ascending, (sentences,); the last of a document is
            its length without the separator.
        sentence_counts: sentences of each document, (documents,).
        part: number of the shard, if work unit `index` makes more than one.
    """
    name = f"{split}/shard-{index:05d}{f'-{part:05d}' if part else ''}.arrow"
    columns = [
        _list_array(ids, lengths, token_type(vocab_size)),
        _list_array(sentence_ends, sentence_counts, np.dtype(np.uint32)),
    ]
    batch = pa.record_batch(columns, names=["input_ids", "sentence_ends"])
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    checksum, chunks = _checksums(content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES))
    return ShardInfo(name, len(lengths), len(ids), len(content), checksum, chunks)


def checksums(path: Path) -> tuple[int, str, tuple[str, ...]]:
    """Size, XXH3-128 and the XXH3-64 of every `CHUNK_BYTES` of a file."""
    with path.open("rb") as file:
        return (path.stat().st_size, *_checksums(iter(lambda: file.read(CHUNK_BYTES), b"")))


def _checksums(chunks: Iterable[bytes | memoryview]) -> tuple[str, tuple[str, ...]]:
    """XXH3-128 of all chunks, and XXH3-64 of each."""
    whole, digests = xxhash.xxh3_128(), []
    for chunk in chunks:
        whole.update(chunk)
        digests.append(xxhash.xxh3_64_hexdigest(chunk))
    return whole.hexdigest(), tuple(digests)


class Split:
    """Memory-mapped, zero-copy access to the shards of one split. A shard is opened when it is needed, and closed when
    `OPEN_SHARDS` others were used since.

    Arrays are passed by DLPack, because pyarrow's own `to_numpy` imports pandas.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shards: Sequence[ShardInfo],
        vocab_size: int,
        between_characters: bool = False,
    ):
        self.folder, self.name, self.shards, self.vocab_size = folder, split, tuple(shards), vocab_size
        self._between_characters = between_characters

    @lru_cache(maxsize=OPEN_SHARDS)  # noqa: B019 - of all splits of a process together
    def _columns(self, shard: int) -> tuple[pa.Array, pa.Array]:
        info = self.shards[shard]
        path = self.folder / info.file
        try:
            if path.stat().st_size != info.bytes:
                raise UserError(
                    f"{str(path)!r} has {path.stat().st_size} bytes, the manifest says {info.bytes}: it was cut or "
                    "replaced; prepare the data again"
                )
            batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
            batch.validate(full=True)  # offsets outside the values would be read as memory
            columns = batch.column("input_ids"), batch.column("sentence_ends")
            for column in columns:
                is_of_integers = pa.types.is_list(column.type) and pa.types.is_unsigned_integer(column.type.value_type)
                if not is_of_integers or column.null_count or column.values.null_count:
                    raise TypeError(f"a column has the type {column.type}, or nulls")
            if (len(batch), len(columns[0].values)) != (info.documents, info.tokens):
                raise ValueError("it has another number of documents or tokens than the manifest says")
        except (OSError, pa.ArrowException, KeyError, StopIteration, TypeError, ValueError) as error:
            raise self._damaged(shard, error) from error
        return columns

    def _damaged(self, shard: int, what: object) -> LocalError:
        path = str(self.folder / self.shards[shard].file)
        return LocalError(f"cannot read the shard {path!r}: {what}; see what else is damaged with 'preprocess verify'")

    def values(self, shard: int) -> np.ndarray:
        """All token ids of a shard, one document after the other: (tokens,) uint16 or uint32, a view of the file.

        What is read of them is to be `checked`: to look at all when a shard is opened would read the whole file.
        """
        return np.from_dlpack(self._columns(shard)[0].values)

    def checked(self, shard: int, ids: np.ndarray) -> np.ndarray:
        """The same ids of a shard. Raises `UserError` if one is not in the vocabulary."""
        if (largest := ids.max(initial=0)) >= self.vocab_size:
            raise self._damaged(
                shard, f"it has the token id {largest}, the largest of its tokenizer is {self.vocab_size - 1}"
            )
        return ids

    def in_character(self, shard: int) -> InCharacter:
        """Where packing must not cut the shard's values, if it can avoid it; packing version 2 may cut anywhere."""
        if not self._between_characters:
            return nowhere
        inside, values = ids_inside_characters(self.folder / TOKENIZER_FOLDER), self.values(shard)
        return lambda places: inside[self.checked(shard, values[places])]

    def document_offsets(self, shard: int) -> np.ndarray:
        """Where each document begins in `values`, and the end of the last: (documents + 1,) int32."""
        return np.from_dlpack(self._columns(shard)[0].offsets)

    def sentence_bounds(self, shard: int, row: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Start and end (without separator) in `values` of every sentence, or of those of one document: two
        (sentences,) int64; raises `UserError` if the shard is damaged."""
        first, end = (0, self.shards[shard].documents) if row is None else (row, row + 1)
        column = self._columns(shard)[1].slice(first, end - first)
        counts, ends = np.diff(np.from_dlpack(column.offsets)), np.from_dlpack(column.flatten())
        try:
            return bounds_of_sentences(self.document_offsets(shard)[first : end + 1], counts, ends)
        except ValueError as error:
            raise self._damaged(shard, error) from error


@dataclass(frozen=True)
class Corpus:
    """A prepared data folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open a data folder; raises `UserError` as `Manifest.read` does."""
        return cls(Path(folder), Manifest.read(Path(folder)))

    def split(self, name: str) -> Split:
        manifest = self.manifest
        shards, vocab_size = manifest.splits.get(name, ()), manifest.tokenizer.vocab_size
        return Split(self.folder, name, shards, vocab_size, manifest.cuts_between_characters)


def _flatten(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All values of the rows, and the length of each."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    return np.concatenate(rows) if len(rows) else np.empty(0, np.int64), lengths


def _list_array(values: np.ndarray, lengths: np.ndarray, dtype: np.dtype[Any]) -> pa.ListArray:
    if len(values) > _MAX_BATCH_TOKENS:
        raise ValueError(f"a shard holds at most {_MAX_BATCH_TOKENS} tokens, got {len(values)}")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    # From buffers: pa.array() would import pandas, which takes longer than a small corpus.
    flat = pa.Array.from_buffers(item.type, len(values), [None, pa.py_buffer(values.astype(dtype, copy=False))])
    return pa.Array.from_buffers(pa.list_(item), len(lengths), [None, pa.py_buffer(offsets)], children=[flat])
