"""Megatron-LM's indexed dataset: `preprocess export` writes one, `preprocess import` prepares data from one.

PREFIX.bin has the ids of all sequences, one after the other; PREFIX.idx, little-endian, says where they are:

    9 bytes   "MMIDIDX", two zero bytes
    uint64    version, 1
    uint8     type of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64    S, the number of sequences
    uint64    D + 1, the number of documents plus one
    int32     (S,) tokens of each sequence
    int64     (S,) the byte of PREFIX.bin at which each begins
    int64     (D + 1,) the sequence with which each document begins, and S

A sequence is a sentence, as when Megatron's own tool splits sentences (for its BERT and T5), so that our sentence
borders survive the round trip. The separator `</s>` at the end of our documents is not exported: Megatron adds what its
model needs. An import puts it back, unless a document already ends with it. A dataset with one sequence per document,
as for GPT, can be imported too: each of its documents is then one sentence.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ds_roberta.data.manifest import (
    PACKING_VERSION,
    SPLITS,
    TOKENIZER_FOLDER,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    InputInfo,
    InputPiece,
    Manifest,
    ShardInfo,
    is_data_folder,
)
from ds_roberta.data.shards import Corpus, Split, write_shard
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, created_parents, errors_of_the_disk, replaced_folder
from preprocessing.tokens.corpus_tokenizer import copy_tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_VERSION = 1
_TYPES = {code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8"), start=1)}
_TYPES[8] = np.dtype("<u2")
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_SHARD_TOKENS = 1 << 21
"""Tokens per shard of an import: about as many as a work unit of text has."""
_EMPTY = "empty"


def export_split(corpus: Corpus, split_name: str, prefix: Path) -> tuple[int, int]:
    """Write one split as PREFIX.bin and PREFIX.idx, one sequence per sentence, with one shard in memory at a time.

    Returns:
        The numbers of documents and of sentences.

    Raises:
        UserError: the split is empty, or a file exists already or cannot be written.
    """
    split = corpus.split(split_name)
    if not split.shards:
        raise UserError(f"no documents in split {split_name!r} of {str(corpus.folder)!r}: choose another --split")
    binary, index = _paths(prefix)
    for path in (binary, index):
        if path.exists():
            raise UserError(f"{str(path)!r} exists already: remove it or choose another --output")
    shards = range(len(split.shards))
    dtype = np.dtype("<u2" if split.values(0).dtype == np.uint16 else "<i4")
    documents = sum(info.documents for info in split.shards)
    sentences = sum(len(_lengths(split, shard)) for shard in shards)
    with errors_of_the_disk(prefix), created_parents(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The index is renamed last: without it the other file does not count.
            with atomic_path(index) as index_part, atomic_path(binary) as binary_part:
                with binary_part.open("wb") as file:
                    for shard in shards:
                        file.write(_without_separators(split, shard).astype(dtype, copy=False).tobytes())
                with index_part.open("wb") as file:
                    file.write(_HEAD.pack(_MAGIC, _VERSION, _CODES[dtype], sentences, documents + 1))
                    _write_arrays(file, split, dtype.itemsize)
        except BaseException:
            binary.unlink(missing_ok=True)
            raise
    return documents, sentences


def _write_arrays(file: BinaryIO, split: Split, itemsize: int) -> None:
    """Write the three arrays of the index, each in its own pass over the shards."""
    shards = range(len(split.shards))
    for shard in shards:
        file.write(_lengths(split, shard).astype("<i4").tobytes())
    begin = 0
    for shard in shards:
        ends = begin + np.cumsum(_lengths(split, shard) * itemsize)
        file.write(np.concatenate([[begin], ends[:-1]]).astype("<i8").tobytes())
        begin = int(ends[-1])
    sentence = 0
    file.write(np.array([0], "<i8").tobytes())
    for shard in shards:
        starts = split.sentence_bounds(shard)[0]
        ends_of_documents = np.searchsorted(starts, split.document_offsets(shard)[1:]) + sentence
        file.write(ends_of_documents.astype("<i8").tobytes())
        sentence += len(starts)


def _lengths(split: Split, shard: int) -> np.ndarray:
    starts, ends = split.sentence_bounds(shard)
    return ends - starts


def _without_separators(split: Split, shard: int) -> np.ndarray:
    values = split.checked(shard, split.values(shard))
    kept = np.ones(len(values), dtype=bool)
    kept[split.document_offsets(shard)[1:] - 1] = False
    return values[kept]


@dataclass(frozen=True)
class IndexedDataset:
    """A Megatron dataset, memory-mapped.

    Attributes:
        lengths, pointers: (S,) tokens of each sequence, and the byte of the .bin at which it begins.
        documents: (D + 1,) the sequence with which each document begins, and S.
    """

    binary: Path
    dtype: np.dtype[Any]
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray
    data: np.ndarray

    @classmethod
    def open(cls, prefix: Path) -> IndexedDataset:
        """Open PREFIX.idx and PREFIX.bin and check that they fit together.

        Raises:
            UserError: a file is missing, truncated, inconsistent or in another format.
        """
        binary, index = _paths(prefix)
        try:
            size = binary.stat().st_size
            data = np.asarray(np.memmap(binary, np.uint8, "r")) if size else np.empty(0, np.uint8)
            content = np.asarray(np.memmap(index, np.uint8, "r"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read the Megatron dataset {str(prefix)!r} ({error}): PREFIX is the path without .bin and .idx"
            ) from error
        if len(content) < _HEAD.size or bytes(content[:9]) != _MAGIC:
            raise UserError(
                f"{str(index)!r} is not the index of a Megatron dataset (MMIDIDX): create it again with Megatron"
            )
        _, version, code, sequences, borders = _HEAD.unpack(bytes(content[: _HEAD.size]))
        if version != _VERSION or code not in _TYPES:
            raise UserError(
                f"{str(index)!r} has version {version} and token type {code}: only version {_VERSION} with whole "
                "numbers can be read, so create it again with Megatron"
            )
        expected = _HEAD.size + 12 * sequences + 8 * borders
        if len(content) != expected:
            raise UserError(
                f"{str(index)!r} has {len(content)} bytes, but {sequences} sequences and {borders - 1} documents take "
                f"{expected}: it is truncated, or has several modes, which cannot be read"
            )
        at = _HEAD.size + np.array([0, 4 * sequences, 12 * sequences, expected - _HEAD.size])
        lengths, pointers, documents = (
            content[start:end].view(dtype)
            for start, end, dtype in zip(at[:-1], at[1:], ("<i4", "<i8", "<i8"), strict=True)
        )
        dataset = cls(binary, _TYPES[code], lengths, pointers, documents, data)
        dataset._check(index)
        return dataset

    def _check(self, index: Path) -> None:
        size = len(self.data)
        ends = self.pointers + self.lengths.astype(np.int64) * self.dtype.itemsize
        borders = self.documents
        if (
            not len(borders)
            or borders[0] != 0
            or borders[-1] != len(self.lengths)
            or (np.diff(borders) < 0).any()
            or (len(ends) and (self.lengths.min() < 0 or self.pointers.min() < 0 or ends.max() > size))
        ):
            raise UserError(
                f"{str(index)!r} does not fit {str(self.binary)!r} of {size} bytes: one of them is truncated or "
                "belongs to another dataset"
            )

    def tokens(self, sequence: int) -> np.ndarray:
        """Return the ids of one sequence: (tokens,), in the dataset's own type."""
        begin = int(self.pointers[sequence])
        return self.data[begin : begin + int(self.lengths[sequence]) * self.dtype.itemsize].view(self.dtype)

    def byte_range(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of bytes of the .bin for the documents `first … last - 1`, which must have a sequence."""
        chosen = slice(int(self.documents[first]), int(self.documents[last]))
        ends = self.pointers[chosen] + self.lengths[chosen].astype(np.int64) * self.dtype.itemsize
        return int(self.pointers[chosen].min()), int(ends.max())


def import_dataset(prefixes: dict[str, Path], tokenizer: Path, output: Path) -> Manifest:
    """Make the data folder `output` from Megatron datasets, one per split; it appears whole or not at all.

    Raises:
        UserError: a dataset or the tokenizer cannot be read, an id is not in the tokenizer, no training document.
    """
    datasets = {split: IndexedDataset.open(prefix) for split, prefix in prefixes.items()}
    inside = [prefix for prefix in prefixes.values() if output.resolve() in prefix.resolve().parents]
    if inside:
        raise UserError(f"the input {str(inside[0])!r} is inside the output {str(output)!r}: choose another --output")
    with replaced_folder(output, is_data_folder, "a folder of prepared data") as folder:
        info = copy_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
        splits: dict[str, tuple[ShardInfo, ...]] = dict.fromkeys(SPLITS, ())
        inputs = []
        for split, dataset in datasets.items():
            splits[split] = tuple(_import_shards(dataset, folder, split, info))
            read, kept = len(dataset.documents) - 1, sum(shard.documents for shard in splits[split])
            rejected = {_EMPTY: read - kept} if read > kept else {}
            inputs.append(InputInfo(dataset.binary.as_posix(), read, kept, rejected))
        manifest = Manifest(info, {"format": "megatron", "packing_version": PACKING_VERSION}, tuple(inputs), splits)
        if not manifest.documents(TRAIN_SPLIT):
            raise UserError(f"{str(prefixes[TRAIN_SPLIT])!r} has no document with tokens: choose another PREFIX")
        manifest.write(folder)
    return manifest


def _import_shards(dataset: IndexedDataset, folder: Path, split: str, info: TokenizerInfo) -> Iterator[ShardInfo]:
    separator = np.array([info.eos_token_id])
    for index, (begin, end) in enumerate(pairwise(_shard_borders(dataset))):
        ids, ends = [], []
        for number in range(begin, end):
            first, last = dataset.documents[number : number + 2].tolist()
            document, document_ends = _document([dataset.tokens(at) for at in range(first, last)], info.eos_token_id)
            if not len(document):
                continue
            for extreme in (int(document.min()), int(document.max())):
                if not 0 <= extreme < info.vocab_size:
                    raise UserError(
                        f"{str(dataset.binary)!r}: document {number} has id {extreme}, but the tokenizer has "
                        f"{info.vocab_size} ids: choose the --tokenizer that made the dataset"
                    )
            ids.append(np.concatenate([document, separator]))
            ends.append(document_ends)
        if ids:
            shard = write_shard(folder, split, index, ids, ends, info.vocab_size)
            yield replace(shard, pieces=(InputPiece(str(dataset.binary), *dataset.byte_range(begin, end), len(ids)),))


def _shard_borders(dataset: IndexedDataset) -> list[int]:
    """Return the first document of each shard, followed by the number of documents."""
    tokens = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])[dataset.documents]
    first_of_shard = np.flatnonzero(np.diff(tokens[:-1] // _SHARD_TOKENS)) + 1
    return [0, *first_of_shard.tolist(), len(dataset.documents) - 1]


def _document(sentences: list[np.ndarray], separator: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's ids without a closing separator, and the offset after each sentence that has ids."""
    if not sentences:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ids = np.concatenate(sentences)
    ends = np.cumsum([len(sentence) for sentence in sentences])
    if len(ids) and ids[-1] == separator:
        ids = ids[:-1]
    return ids, np.unique(ends.clip(max=len(ids))[ends > 0])


def _paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `export` and `import` to the command line."""
    export = commands.add_parser("export", help="write a split of prepared data in another system's format")
    export.add_argument("data_dir", type=Path, metavar="DIR", help="a folder that 'preprocess shard' made")
    export.add_argument("--format", choices=("megatron",), required=True, help="Megatron-LM's .bin and .idx")
    export.add_argument(
        "--split", choices=SPLITS, default=TRAIN_SPLIT, help=f"which documents (default: {TRAIN_SPLIT})"
    )
    export.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="path of PREFIX.bin and PREFIX.idx"
    )
    export.set_defaults(run=_export)

    import_ = commands.add_parser("import", help="prepare data from a Megatron-LM dataset (.bin and .idx)")
    import_.add_argument("prefix", type=Path, metavar="PREFIX", help="training documents: path without .bin and .idx")
    import_.add_argument("--validation", type=Path, metavar="PREFIX", help="held-out documents, likewise")
    import_.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="the tokenizer that made the ids")
    import_.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the prepared data")
    import_.set_defaults(run=_import)


def _export(arguments: argparse.Namespace) -> None:
    documents, sentences = export_split(Corpus.open(arguments.data_dir), arguments.split, arguments.output)
    binary, index = _paths(arguments.output)
    print(f"{documents} documents as {sentences} sequences, one per sentence: {binary}, {index}")


def _import(arguments: argparse.Namespace) -> None:
    prefixes = {TRAIN_SPLIT: arguments.prefix}
    if arguments.validation:
        prefixes[VALIDATION_SPLIT] = arguments.validation
    manifest = import_dataset(prefixes, arguments.tokenizer, arguments.output)
    for split in prefixes:
        print(f"{split:<11} {manifest.documents(split)} documents, {manifest.tokens(split)} tokens")
    print(f"prepared data: {arguments.output}")
