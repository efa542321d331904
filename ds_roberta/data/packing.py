"""Packing: which slices of the shards are the training sequences.

A sequence of `max_seq_length` tokens is `<s>` + a contiguous slice of a shard's token ids + `</s>` (+ `<pad>`).
Where the slice crosses documents, the separator that closes the earlier one stands between them. Slices never cross a
shard, so each shard is packed alone.

Formats (Liu et al. 2019, RoBERTa, section 4.2):

* `full-sentences` — as many whole sentences as fit, across document borders.
* `doc-sentences` — the same within one document. Sequences at documents' ends are shorter; the batch stays as many
  sequences, where the paper adds some to hold the number of tokens.
* `contiguous` — every sequence is full but a shard's last, whatever the sentences.

A sentence longer than a sequence is cut into pieces that fill one.

The index of a split is two files: the slices, six bytes each, and the number of the first sequence of each shard. Both
are read by memory map and written shard by shard, so that memory does not grow with the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ds_roberta.config import PackingConfig
from ds_roberta.data.shards import Corpus, Split
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, json_fingerprint

PACKING_VERSION = 2
INDEX_FOLDER = "index"


def cut_long_sentences(starts: np.ndarray, ends: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace every sentence longer than `capacity` tokens by consecutive pieces of at most that length."""
    pieces = np.maximum(1, -(-(ends - starts) // capacity))
    piece_number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_starts = np.repeat(starts, pieces) + piece_number * capacity
    return piece_starts, np.minimum(piece_starts + capacity, np.repeat(ends, pieces))


def pack_full_sentences(starts: np.ndarray, ends: np.ndarray, capacity: int) -> np.ndarray:
    """Greedy packing of whole sentences.

    Args:
        starts, ends: bounds of the sentences of one shard in its values, rising: two (sentences,) int64.
        capacity: tokens that a sequence holds between `<s>` and `</s>`.

    Returns:
        Bounds of the slices: (sequences, 2) int64.
    """
    starts, ends = cut_long_sentences(starts, ends, capacity)
    return _chain(starts, ends, np.searchsorted(ends, starts + capacity, side="right"))


def pack_doc_sentences(starts: np.ndarray, ends: np.ndarray, capacity: int) -> np.ndarray:
    """Greedy packing of whole sentences of one document; arguments and result as of `pack_full_sentences`."""
    starts, ends = cut_long_sentences(starts, ends, capacity)
    # Sentences of one document touch; between documents stands a separator.
    document_ends = np.append(np.flatnonzero(starts[1:] != ends[:-1]) + 1, len(starts))
    own_end = document_ends[np.searchsorted(document_ends, np.arange(len(starts)), side="right")]
    return _chain(starts, ends, np.minimum(np.searchsorted(ends, starts + capacity, side="right"), own_end))


def pack_contiguous(tokens: int, capacity: int) -> np.ndarray:
    """Slices of `capacity` tokens, the last one shorter: (sequences, 2) int64."""
    starts = np.arange(0, tokens, capacity)
    return np.stack([starts, np.minimum(starts + capacity, tokens)], axis=1)


def _chain(starts: np.ndarray, ends: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Slices from the first sentence on, where a sequence that begins at i ends before sentence `following[i]`."""
    first, sentence, steps = [], 0, following.tolist()
    while sentence < len(steps):
        first.append(sentence)
        sentence = steps[sentence]
    first_sentences = np.array(first, dtype=np.int64)
    last_sentences = np.append(first_sentences[1:], len(starts)) - 1
    return np.stack([starts[first_sentences], ends[last_sentences[: len(first)]]], axis=1)


def pack_shard(split: Split, shard: int, packing: PackingConfig) -> np.ndarray:
    """The slices of one shard: their bounds in its values, (sequences, 2) int64."""
    if packing.format == "contiguous":
        # The separator that closes the last document would stand before the sequence's own.
        return pack_contiguous(len(split.values(shard)) - 1, packing.capacity)
    pack = {"full-sentences": pack_full_sentences, "doc-sentences": pack_doc_sentences}[packing.format]
    return pack(*split.sentence_bounds(shard), packing.capacity)


class PackedSplit:
    """The sequences of a split, read through the index that `build_index` made.

    Args:
        slices: (sequences,) of `_slice_type`, start and length of each in its shard's values.
        first_sequence: (shards + 1,) int64, the number of the first sequence of each shard, and of all.
    """

    def __init__(self, split: Split, slices: np.ndarray, first_sequence: np.ndarray):
        self._split, self._slices, self._first_sequence = split, slices, first_sequence

    def __len__(self) -> int:
        return len(self._slices)

    def source_ranges(self) -> dict[str, np.ndarray]:
        """By source, the first sequence of each of its shards and the one behind the last: (shards, 2) int64."""
        sources = np.array([shard.source for shard in self._split.shards], dtype=object)
        ranges = np.stack([self._first_sequence[:-1], self._first_sequence[1:]], axis=1)
        return {source: ranges[sources == source] for source in dict.fromkeys(sources.tolist())}

    def slices(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where sequences lie: their shards, and the beginning and end of each in its shard's values.

        Args:
            sequences: (B,) int64.

        Returns:
            Three (B,) int64.
        """
        shards = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        slices = self._slices[sequences]
        starts = slices["start"].astype(np.int64)
        return shards, starts, starts + slices["length"]

    def gather(self, sequences: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the slices of `sequences` into the rows of `out`, from column 1 on.

        Args:
            sequences: (B,) int64.
            out: (B, T) integers; only the slices' places are written.

        Returns:
            The slices' lengths: (B,) int64.
        """
        shards, starts, ends = self.slices(sequences)
        values = {shard: self._split.values(shard) for shard in np.unique(shards).tolist()}
        for row, shard, start, end in zip(out, shards.tolist(), starts.tolist(), ends.tolist(), strict=True):
            row[1 : 1 + end - start] = values[shard][start:end]
        return ends - starts


def _slice_type(capacity: int) -> np.dtype[Any]:
    return np.dtype([("start", "<u4"), ("length", "<u2" if capacity < 1 << 16 else "<u4")])


def _index_paths(corpus: Corpus, split: str, packing: PackingConfig) -> tuple[Path, Path]:
    """The files of the slices and of each shard's first sequence; where the latter stands, the index is whole."""
    fingerprint = json_fingerprint(
        {
            "version": PACKING_VERSION,
            "data": corpus.manifest.fingerprint,
            "format": packing.format,
            "max_seq_length": packing.max_seq_length,
        }
    )
    name = f"{split}-{packing.format}-{packing.max_seq_length}-{fingerprint[:16]}"
    return corpus.folder / INDEX_FOLDER / f"{name}.slices", corpus.folder / INDEX_FOLDER / f"{name}.first.npy"


def build_index(corpus: Corpus, split_name: str, packing: PackingConfig) -> None:
    """Compute and store the index of a split unless it is there already. One process of a run does this.

    Raises:
        UserError: the data folder cannot be written.
    """
    slices_path, first_path = _index_paths(corpus, split_name, packing)
    if first_path.is_file():
        return
    split, dtype = corpus.split(split_name), _slice_type(packing.capacity)
    first_sequence = [0]
    try:
        slices_path.parent.mkdir(exist_ok=True)
        with atomic_path(slices_path) as temporary, temporary.open("wb") as file:
            for shard in range(len(split.shards)):
                bounds = pack_shard(split, shard, packing)
                slices = np.empty(len(bounds), dtype)
                slices["start"], slices["length"] = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
                slices.tofile(file)
                first_sequence.append(first_sequence[-1] + len(slices))
        with atomic_path(first_path) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(first_sequence))
    except OSError as error:
        raise UserError(
            f"cannot write the packing index into {str(slices_path.parent)!r} ({error.strerror}): make the data folder "
            "writable for the first run at this packing and max_seq_length"
        ) from error


def open_index(corpus: Corpus, split_name: str, packing: PackingConfig) -> PackedSplit:
    """Open the index that `build_index` made, by memory map; shards are opened when first read."""
    slices_path, first_path = _index_paths(corpus, split_name, packing)
    slices = np.memmap(slices_path, _slice_type(packing.capacity), mode="r")
    return PackedSplit(corpus.split(split_name), slices, np.load(first_path))
