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
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ds_roberta.data.datasets_files import DATASETS_FILES, write_datasets_files
from ds_roberta.data.sentences import InCharacter, bounds_of_sentences, nowhere
from ds_roberta.data.tokenizer import TokenizerInfo, ids_inside_characters, token_type
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, file_checksum, is_within, json_fingerprint, load_json, write_json

FORMAT_VERSION = 2
PACKING_VERSION = _BETWEEN_CHARACTERS = 3
"""The first format version with which sequences are cut only between characters."""
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"
SPLITS = (TRAIN_SPLIT, VALIDATION_SPLIT)
CHUNK_BYTES = 1 << 20
"""Bytes covered by one chunk checksum."""
_MAX_BATCH_TOKENS = 2**31 - 1  # offsets of an Arrow list are int32


@dataclass(frozen=True)
class InputPiece:
    """A part of an input, `start … end` as in the plan's pieces, and how many of a shard's documents came from it."""

    path: str
    start: int
    end: int
    documents: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest describes it; `file` is relative to the data folder.

    `pieces` are in the order of the documents, so their counts say which document came from which piece. All documents
    have the same `source`, empty if they have none.
    """

    file: str
    documents: int
    tokens: int
    bytes: int
    checksum: str
    chunk_checksums: tuple[str, ...]
    pieces: tuple[InputPiece, ...] = ()
    source: str = ""

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ShardInfo:
        """The inverse of `dataclasses.asdict`, after a round trip through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not such an entry, or its file is outside of the data folder.
        """
        pieces = tuple(InputPiece(**piece) for piece in entry["pieces"])
        info = cls(**{**entry, "chunk_checksums": tuple(entry["chunk_checksums"]), "pieces": pieces})
        texts = (info.file, info.checksum, info.source, *info.chunk_checksums, *(piece.path for piece in pieces))
        counts = (info.documents, info.tokens, info.bytes, *(piece.documents for piece in pieces))
        if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
            raise TypeError(f"not a shard: {entry!r}")
        if not is_within(info.file):
            raise ValueError(f"the shard {info.file!r} is outside of the folder")
        return info


@dataclass(frozen=True)
class InputInfo:
    """The outcome of reading one input file: documents_read = documents_kept + the sum over `rejected`.

    `source` is the name that the user gave it, if any. `places` are the first bad documents: `reason`, `byte` or `row`
    in the file, counted from 0, and `detail`. `damage` are the first places, in the same form, where a part of the file
    is lost; its documents are counted only if their number is known. `too_long_bytes` is the size of the documents that
    were rejected as too long.
    """

    path: str
    documents_read: int
    documents_kept: int
    rejected: dict[str, int]
    source: str = ""
    places: tuple[dict[str, Any], ...] = ()
    damage: tuple[dict[str, Any], ...] = ()
    too_long_bytes: int = 0

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> InputInfo:
        """The inverse of `dataclasses.asdict`, after a round trip through JSON."""
        lists = {name: tuple(entry.get(name, ())) for name in ("places", "damage")}
        return cls(**{**entry, **lists})


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    tokenizer: TokenizerInfo
    options: dict[str, Any]
    inputs: tuple[InputInfo, ...]
    splits: dict[str, tuple[ShardInfo, ...]]

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and their sources, independent of the inputs' paths; a checkpoint is bound to it."""
        shards = {split: [shard.checksum for shard in shards] for split, shards in self.splits.items()}
        content: dict[str, Any] = {"tokenizer": self.tokenizer.fingerprint, "splits": shards}
        if any(map(self.sources, self.splits)):
            content["sources"] = {split: [shard.source for shard in shards] for split, shards in self.splits.items()}
        return json_fingerprint(content)

    @property
    def packing_version(self) -> int:
        """The version of packing when the data was prepared, which resumed runs keep to find the same sequences."""
        return int(self.options.get("packing_version", _BETWEEN_CHARACTERS - 1))

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits.get(split, ()))

    def sources(self, split: str) -> list[str]:
        """The names of a split's sources, sorted."""
        return sorted({shard.source for shard in self.splits.get(split, ())} - {""})

    def write(self, folder: Path) -> None:
        """Write the manifest and the small files by which `datasets` opens the folder; the manifest comes last."""
        names = [split for split in SPLITS if self.splits.get(split)]
        for split in names:
            names_of_shards = [Path(shard.file).name for shard in self.splits[split]]
            write_datasets_files(folder / split, split, names_of_shards, self.fingerprint)
        write_json(folder / "dataset_dict.json", {"splits": names})
        files = [folder / "dataset_dict.json", *(folder / TOKENIZER_FOLDER).iterdir()]
        files += [folder / split / name for split in names for name in DATASETS_FILES]
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "files": {path.relative_to(folder).as_posix(): file_checksum(path) for path in sorted(files)},
            **asdict(self),
        }
        write_json(folder / MANIFEST_NAME, {**content, "checksum": json_fingerprint(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check a data folder's manifest.

        Raises:
            UserError: as `parse` and `check_tokenizer` do.
        """
        manifest = cls.parse(folder)
        manifest.check_tokenizer(folder)
        return manifest

    @classmethod
    def parse(cls, folder: Path) -> Manifest:
        """Read a data folder's manifest without checking the other files.

        Raises:
            UserError: the folder or manifest is missing, of another format version or damaged.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"no prepared data in {str(folder)!r} ({MANIFEST_NAME} is missing): make it with "
                f"'preprocess shard --input TEXT --tokenizer DIR --output {folder}'"
            )
        try:
            content = load_json(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{str(path)!r} has format version {version}, this program reads {FORMAT_VERSION}: "
                    "prepare the data again with 'preprocess shard'"
                )
            if not isinstance(content["options"], dict) or not isinstance(content.get("files", {}), dict):
                raise TypeError("the options or files are not an object")
            if outside := next((name for name in content.get("files", {}) if not is_within(name)), None):
                raise ValueError(f"the file {outside!r} is outside of the folder")
            manifest = cls(
                tokenizer=TokenizerInfo.from_json(content["tokenizer"]),
                options=content["options"],
                inputs=tuple(map(InputInfo.from_json, content["inputs"])),
                splits={split: tuple(map(ShardInfo.from_json, shards)) for split, shards in content["splits"].items()},
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{str(path)!r} is damaged ({error!r}): prepare the data again") from error
        if manifest.fingerprint != content.get("fingerprint"):
            raise UserError(f"{str(path)!r} does not match its own fingerprint: prepare the data again")
        return manifest

    def check_tokenizer(self, folder: Path) -> None:
        """Raise `UserError` unless the tokenizer folder holds the tokenizer that made the ids."""
        tokenizer = TokenizerInfo.read(folder / TOKENIZER_FOLDER)
        if tokenizer != self.tokenizer:
            raise UserError(
                f"the data in {str(folder)!r} was made with another tokenizer (fingerprint "
                f"{self.tokenizer.fingerprint}) than the one in its tokenizer folder ({tokenizer.fingerprint}): "
                "put the right one back or prepare the data again"
            )


def is_data_folder(folder: Path) -> bool:
    """Whether `folder` has a manifest, even of another version: then new data may replace it."""
    try:
        content = load_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {"format_version", "fingerprint", "splits"} <= content.keys()
    except (OSError, ValueError, AttributeError):
        return False


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
    """Memory-mapped, zero-copy access to the shards of one split; a shard is opened when it is first needed.

    Arrays are passed by DLPack, because pyarrow's own `to_numpy` imports pandas.
    """

    def __init__(self, folder: Path, split: str, shards: Sequence[ShardInfo], between_characters: bool = False):
        self.folder, self.name, self.shards = folder, split, tuple(shards)
        self._between_characters = between_characters

    @cache  # noqa: B019 - a split lives as long as its process
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
                is_of_integers = pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type)
                if not is_of_integers or column.null_count or column.values.null_count:
                    raise TypeError(f"a column has the type {column.type}, or nulls")
        except (OSError, pa.ArrowException, KeyError, StopIteration, TypeError) as error:
            raise self._damaged(shard, error) from error
        return columns

    def _damaged(self, shard: int, what: object) -> UserError:
        path = str(self.folder / self.shards[shard].file)
        return UserError(f"cannot read the shard {path!r}: {what}; see what else is damaged with 'preprocess verify'")

    @cache  # noqa: B019
    def values(self, shard: int) -> np.ndarray:
        """All token ids of a shard, one document after the other: (tokens,) uint16 or uint32, a view of the file."""
        return np.from_dlpack(self._columns(shard)[0].values)

    def in_character(self, shard: int) -> InCharacter:
        """Where packing must not cut the shard's values, if it can avoid it; data of version 2 may be cut anywhere."""
        if not self._between_characters:
            return nowhere
        inside, values = ids_inside_characters(self.folder / TOKENIZER_FOLDER), self.values(shard)
        return lambda places: inside[values[places]]

    def document_offsets(self, shard: int) -> np.ndarray:
        """Where each document begins in `values`, and the end of the last: (documents + 1,) int32."""
        return np.from_dlpack(self._columns(shard)[0].offsets)

    def sentence_ends(self, shard: int, row: int) -> np.ndarray:
        """The offset in a document after the last token of each of its sentences: (sentences,) uint32."""
        return np.from_dlpack(self._columns(shard)[1][row].values)

    def sentence_bounds(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Start and end (without separator) of every sentence in `values`: two (sentences,) int64; raises `UserError`
        if the shard is damaged."""
        column = self._columns(shard)[1]
        counts, ends = np.diff(np.from_dlpack(column.offsets)), np.from_dlpack(column.flatten())
        try:
            return bounds_of_sentences(self.document_offsets(shard), counts, ends)
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
        between_characters = self.manifest.packing_version >= _BETWEEN_CHARACTERS
        return Split(self.folder, name, self.manifest.splits.get(name, ()), between_characters)


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
