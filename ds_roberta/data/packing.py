"""Packing: which slices of the shards are the training sequences.

A sequence of `max_seq_length` tokens is `<s>` + a contiguous slice of a shard's token ids + `</s>` (+ `<pad>`).
Where the slice crosses documents, the separator that closes the earlier one stands between them. Slices never cross a
shard, so each shard is packed alone.

Formats (Liu et al. 2019, RoBERTa, section 4.2):

* `full-sentences` — as many whole sentences as fit, across document borders.

A sentence longer than a sequence is cut into pieces that fill one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ds_roberta.config import PackingConfig
from ds_roberta.data.shards import Corpus, Split
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, json_fingerprint

PACKING_VERSION = 1
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
    if not len(starts):
        return np.empty((0, 2), dtype=np.int64)
    # Where the next sequence begins if one begins at this sentence: all at once, then a walk along the chain.
    following = np.searchsorted(ends, starts + capacity, side="right").tolist()
    first, sentence = [], 0
    while sentence < len(following):
        first.append(sentence)
        sentence = following[sentence]
    first_sentences = np.array(first)
    last_sentences = np.append(first_sentences[1:], len(starts)) - 1
    return np.stack([starts[first_sentences], ends[last_sentences]], axis=1)


_PACKERS = {"full-sentences": pack_full_sentences}


def pack_shard(split: Split, shard: int, packing: PackingConfig) -> np.ndarray:
    """The slices of one shard: their bounds in its values, (sequences, 2) int64."""
    return _PACKERS[packing.format](*split.sentence_bounds(shard), packing.capacity)


class PackedSplit:
    """The sequences of a split, read through an index that is made once and kept beside the shards.

    The index is memory-mapped too, so that memory does not grow with the data.
    """

    def __init__(self, split: Split, starts: np.ndarray, lengths: np.ndarray, first_sequence: np.ndarray):
        self._split = split
        self._starts, self._lengths, self._first_sequence = starts, lengths, first_sequence

    def __len__(self) -> int:
        return len(self._starts)

    def slices(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where sequences lie: their shards, and the beginning and end of each in its shard's values.

        Args:
            sequences: (B,) int64.

        Returns:
            Three (B,) int64.
        """
        shards = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        starts = self._starts[sequences].astype(np.int64)
        return shards, starts, starts + self._lengths[sequences]

    def gather(self, sequences: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the slices of `sequences` into the rows of `out`, from column 1 on.

        Args:
            sequences: (B,) int64.
            out: (B, T) integers; only the slices' places are written.

        Returns:
            The slices' lengths: (B,) int64.
        """
        shards, starts, ends = self.slices(sequences)
        for row, shard, start, end in zip(out, shards.tolist(), starts.tolist(), ends.tolist(), strict=True):
            row[1 : 1 + end - start] = self._split.values(shard)[start:end]
        return ends - starts


def _index_path(corpus: Corpus, split: str, packing: PackingConfig) -> Path:
    fingerprint = json_fingerprint(
        {
            "version": PACKING_VERSION,
            "data": corpus.manifest.fingerprint,
            "format": packing.format,
            "max_seq_length": packing.max_seq_length,
        }
    )
    return corpus.folder / INDEX_FOLDER / f"{split}-{packing.format}-{packing.max_seq_length}-{fingerprint[:16]}"


def build_index(corpus: Corpus, split_name: str, packing: PackingConfig) -> None:
    """Compute and store the index of a split unless it is there already. One process of a run does this.

    Raises:
        UserError: the data folder cannot be written.
    """
    base = _index_path(corpus, split_name, packing)
    if base.with_suffix(".first.npy").is_file():
        return
    split = corpus.split(split_name)
    capacity = packing.capacity
    starts, lengths, first_sequence = [], [], [0]
    for shard in range(len(split.shards)):
        slices = pack_shard(split, shard, packing)
        starts.append(slices[:, 0].astype(np.uint32))
        lengths.append((slices[:, 1] - slices[:, 0]).astype(np.uint16 if capacity < 1 << 16 else np.uint32))
        first_sequence.append(first_sequence[-1] + len(slices))
    try:
        base.parent.mkdir(exist_ok=True)
        # "first" is written last: where it stands, the index is whole.
        for suffix, array in (
            (".starts.npy", np.concatenate(starts)),
            (".lengths.npy", np.concatenate(lengths)),
            (".first.npy", np.array(first_sequence)),
        ):
            with atomic_path(base.with_suffix(suffix)) as temporary, temporary.open("wb") as file:
                np.save(file, array)
    except OSError as error:
        raise UserError(
            f"cannot write the packing index into {str(base.parent)!r} ({error.strerror}): make the data folder "
            "writable for the first run at this max_seq_length"
        ) from error


def open_index(corpus: Corpus, split_name: str, packing: PackingConfig) -> PackedSplit:
    """Open the index that `build_index` made, by memory map."""
    base = _index_path(corpus, split_name, packing)
    starts, lengths, first_sequence = (
        np.load(base.with_suffix(suffix), mmap_mode="r") for suffix in (".starts.npy", ".lengths.npy", ".first.npy")
    )
    return PackedSplit(corpus.split(split_name), starts, lengths, first_sequence)
