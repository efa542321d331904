"""Packing: the slices of the shards that become training sequences.

A sequence of `max_seq_length` tokens is `<s>` + a contiguous slice of a shard's token ids + `</s>` (+ `<pad>`).
Where the slice crosses documents, the separator that closes the earlier one is between them. Slices never cross shards,
so each shard is packed on its own.

Formats (Liu et al. 2019, RoBERTa, section 4.2):

* `full-sentences` — as many whole sentences as fit, across document borders.
* `doc-sentences` — the same within one document. Sequences at documents' ends are shorter. The batch keeps its number
  of sequences, while the paper adds some to keep its number of tokens.
* `contiguous` — every sequence is full except a shard's last; sentences are ignored.
* `segment-pair`, `sentence-pair` — `<s> A </s></s> B </s>`: A and B are slices of several sentences, or of one, and B
  follows A or comes from another document (`pairs.py`). For next sentence prediction.

A sentence longer than a sequence is cut into pieces that fill one. A token may hold only part of a character, so a
piece or a contiguous sequence that would end inside one is up to three tokens shorter.

The index of a split is two files: the slices, six bytes each (pairs: 17), and the number of the first sequence of each
shard. Both are memory-mapped for reading and written shard by shard, so memory does not grow with the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ds_roberta.config import PackingConfig
from ds_roberta.data.pairs import IS_NEXT, pack_pairs
from ds_roberta.data.sentences import InCharacter, cut_long_sentences, document_bounds, nowhere, walk
from ds_roberta.data.shards import Corpus, Split
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, errors_of_the_disk, json_fingerprint, remove_leftovers

INDEX_FOLDER = "index"


def pack_full_sentences(
    starts: np.ndarray, ends: np.ndarray, capacity: int, in_character: InCharacter = nowhere
) -> np.ndarray:
    """Greedy packing of whole sentences.

    Args:
        starts, ends: bounds of the sentences of one shard in its values, ascending: two (sentences,) int64.
        capacity: tokens of a sequence between `<s>` and `</s>`.

    Returns:
        Bounds of the slices: (sequences, 2) int64.
    """
    starts, ends = cut_long_sentences(starts, ends, capacity, in_character)
    return _chain(starts, ends, np.searchsorted(ends, starts + capacity, side="right"))


def pack_doc_sentences(
    starts: np.ndarray, ends: np.ndarray, capacity: int, in_character: InCharacter = nowhere
) -> np.ndarray:
    """Greedy packing of whole sentences of one document; arguments and result as in `pack_full_sentences`."""
    starts, ends = cut_long_sentences(starts, ends, capacity, in_character)
    _, own_end = document_bounds(starts, ends)
    return _chain(starts, ends, np.minimum(np.searchsorted(ends, starts + capacity, side="right"), own_end))


def pack_contiguous(tokens: int, capacity: int, in_character: InCharacter = nowhere) -> np.ndarray:
    """Slices of `capacity` tokens, cut between characters, the last one shorter: (sequences, 2) int64."""
    whole = np.arange(min(tokens, 1))
    return np.stack(cut_long_sentences(whole, whole + tokens, capacity, in_character), axis=1)


def _chain(starts: np.ndarray, ends: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Slices from the first sentence on; a sequence that begins at i ends before sentence `following[i]`."""
    first_sentences = walk(following)
    last_sentences = np.append(first_sentences[1:], len(starts)) - 1
    return np.stack([starts[first_sentences], ends[last_sentences[: len(first_sentences)]]], axis=1)


def pack_shard(split: Split, shard: int, packing: PackingConfig) -> np.ndarray:
    """The slices of one shard, or its pairs of slices: (sequences,) of the index's type.

    Raises:
        UserError: `pairs.pack_pairs` has no other document.
    """
    if packing.is_paired:
        pairs = pack_pairs(split, shard, packing.capacity, 1 if packing.format == "sentence-pair" else None)
        slices = np.empty(len(pairs.start), _slice_type(packing))
        for name, column in pairs._asdict().items():
            slices[name] = column
        return slices
    if packing.format == "contiguous":
        # The separator that closes the last document would come right before the sequence's own.
        bounds = pack_contiguous(len(split.values(shard)) - 1, packing.capacity, split.in_character(shard))
    else:
        pack = {"full-sentences": pack_full_sentences, "doc-sentences": pack_doc_sentences}[packing.format]
        bounds = pack(*split.sentence_bounds(shard), packing.capacity, split.in_character(shard))
    slices = np.empty(len(bounds), _slice_type(packing))
    slices["start"], slices["length"] = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
    return slices


def packed_tokens(slices: np.ndarray, packing: PackingConfig) -> int:
    """The number of tokens in `pack_shard`'s sequences, including the special tokens that frame them."""
    lengths = [slices[name].sum(dtype=np.int64) for name in slices.dtype.names or () if name.endswith("length")]
    return int(sum(lengths)) + len(slices) * (packing.max_seq_length - packing.capacity)


class PackedSplit:
    """The sequences of a split, read through the index that `build_index` made.

    Args:
        slices: (sequences,) of `_slice_type`, start and length of each in its shard's values; or pairs of them.
        first_sequence: (shards + 1,) int64, the number of each shard's first sequence, and last the number of all.
        packing: of the index.
        separator_id: the id of the token that is put twice between the segments of a pair.
    """

    def __init__(
        self,
        split: Split,
        slices: np.ndarray,
        first_sequence: np.ndarray,
        packing: PackingConfig,
        separator_id: int,
    ):
        self._split, self._slices, self._first_sequence = split, slices, first_sequence
        self._packing, self._separator_id = packing, separator_id
        self._tokens = np.array([shard.tokens for shard in split.shards], dtype=np.int64)
        self.is_paired = packing.is_paired

    def __len__(self) -> int:
        return len(self._slices)

    def source_ranges(self) -> dict[str, np.ndarray]:
        """For each source, the bounds of its shards' sequences, first and last (exclusive): (shards, 2) int64."""
        sources = np.array([shard.source for shard in self._split.shards], dtype=object)
        ranges = np.stack([self._first_sequence[:-1], self._first_sequence[1:]], axis=1)
        return {source: ranges[sources == source] for source in dict.fromkeys(sources.tolist())}

    def segments(self, sequences: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Locate sequences: their shards, and the beginning and end of each in its shard's values.

        Args:
            sequences: (B,) int64.

        Returns:
            Three (B,) int64 arrays; for pairs, three for the first segments and three for the second ones.

        Raises:
            UserError: the index is damaged.
        """
        slices = self._slices[sequences]
        shards = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        starts = slices["start"].astype(np.int64)
        found = [(shards, starts, starts + slices["length"])]
        if self.is_paired:
            starts = slices["second_start"].astype(np.int64)
            found.append((slices["second_shard"].astype(np.int64), starts, starts + slices["second_length"]))
        for shards, _, ends in found:
            if (shards >= len(self._tokens)).any() or (ends > self._tokens[shards]).any():
                raise self._damaged("a sequence ends after its shard")
        self._check_capacity(sum(ends - starts for _, starts, ends in found))
        return found

    def next_sentence_labels(self, sequences: np.ndarray) -> np.ndarray:
        """For pairs, 0 if the second segment follows the first, 1 if it comes from another document: (B,) int64.

        The numbers are those of transformers' `BertForPreTraining`.
        """
        return self._slices["next_sentence_label"][sequences].astype(np.int64)

    def lengths(self, sequences: np.ndarray) -> np.ndarray:
        """The tokens between `<s>` and the last `</s>` of each sequence: (B,) int64.

        Raises:
            UserError: the index is damaged.
        """
        slices = self._slices[sequences]
        lengths = slices["length"].astype(np.int64)
        if not self.is_paired:
            return self._check_capacity(lengths)
        return self._check_capacity(lengths + slices["second_length"]) + 2

    def _check_capacity(self, lengths: np.ndarray) -> np.ndarray:
        """The tokens of sequences, without special ones; raises `UserError` if there are more than fit."""
        if (longest := lengths.max(initial=0)) > self._packing.capacity:
            raise self._damaged(f"a sequence has {longest} tokens")
        return lengths

    def _damaged(self, what: object) -> UserError:
        folder = self._split.folder / INDEX_FOLDER
        return UserError(f"a packing index in {str(folder)!r} is damaged ({what}): remove the folder")

    def gather(self, sequences: np.ndarray, out: np.ndarray) -> None:
        """Copy the slices of `sequences` into the rows of `out`, from column 1 on; two separators divide a pair.

        Args:
            sequences: (B,) int64.
            out: (B, T) integers, all in the vocabulary; only the places between `<s>` and the last `</s>` are
                written.

        Raises:
            UserError: the index or a shard is damaged.
        """
        columns = np.ones(len(sequences), dtype=np.int64)
        for number, (shards, starts, ends) in enumerate(self.segments(sequences)):
            if number:  # two separators between the segments of a pair
                out[np.arange(len(sequences)), columns] = self._separator_id
                out[np.arange(len(sequences)), columns + 1] = self._separator_id
                columns += 2
            values = {shard: self._split.values(shard) for shard in np.unique(shards).tolist()}
            places = zip(columns.tolist(), shards.tolist(), starts.tolist(), ends.tolist(), strict=True)
            for row, (column, shard, start, end) in zip(out, places, strict=True):
                row[column : column + end - start] = values[shard][start:end]
            columns += ends - starts
            if out.max(initial=0) >= self._split.vocab_size:
                for shard, ids in values.items():
                    self._split.checked(shard, ids)


def _slice_type(packing: PackingConfig) -> np.dtype[Any]:
    length = "<u2" if packing.capacity < 1 << 16 else "<u4"
    fields = [("start", "<u4"), ("length", length)]
    if packing.is_paired:
        fields += [("second_shard", "<u4"), ("second_start", "<u4"), ("second_length", length)]
        fields.append(("next_sentence_label", "u1"))
    return np.dtype(fields)


def _index_paths(corpus: Corpus, split: str, packing: PackingConfig) -> tuple[Path, Path]:
    """The files of the slices and of each shard's first sequence; if the latter exists, the index is complete."""
    fingerprint = json_fingerprint(
        {
            "version": corpus.manifest.packing_version,
            "data": corpus.manifest.fingerprint,
            "format": packing.format,
            "max_seq_length": packing.max_seq_length,
        }
    )
    name = f"{split}-{packing.format}-{packing.max_seq_length}-{fingerprint[:16]}"
    return corpus.folder / INDEX_FOLDER / f"{name}.slices", corpus.folder / INDEX_FOLDER / f"{name}.first"


def build_index(corpus: Corpus, split_name: str, packing: PackingConfig) -> None:
    """Compute and store the index of a split unless it exists; only one process of a run at a time calls this in a
    folder.

    Raises:
        UserError: the data folder cannot be written; or there is nothing to make pairs from.
    """
    slices_path, first_path = _index_paths(corpus, split_name, packing)
    if not first_path.is_file():
        remedy = "make the data folder writable for the first run with this packing and max_seq_length"
        with errors_of_the_disk(slices_path.parent, "the packing index ", remedy):
            try:
                _write_index(corpus, split_name, packing, slices_path, first_path)
            except FileNotFoundError:
                if not first_path.is_file():  # otherwise another run finished it, and took ours for a leftover
                    raise
    for path in (slices_path, first_path):
        remove_leftovers(path.parent, path.name)


def _write_index(corpus: Corpus, split_name: str, packing: PackingConfig, slices_path: Path, first_path: Path) -> None:
    split = corpus.split(split_name)
    first_sequence, following = [0], 0
    slices_path.parent.mkdir(exist_ok=True)
    with atomic_path(slices_path) as temporary, temporary.open("wb") as file:
        for shard in range(len(split.shards)):
            slices = pack_shard(split, shard, packing)
            file.write(slices.tobytes())
            following += int(np.sum(slices["next_sentence_label"] == IS_NEXT)) if packing.is_paired else 0
            first_sequence.append(first_sequence[-1] + len(slices))
        if packing.is_paired and not following and not _has_several_sentences(split):
            remedy = "prepare the data again with --sentences rules"
            if corpus.manifest.options.get("sentences") == "rules":
                remedy = (
                    "--sentences rules, which the data was prepared with, found no second sentence in any (Thai "
                    "and Lao do not mark the ends of sentences): put one sentence on a line, or use another "
                    "--packing"
                )
            raise UserError(
                f"--packing {packing.format} needs documents with several sentences, but none in the {split_name} "
                f"split has two: {remedy}"
            )
    with atomic_path(first_path) as temporary:
        temporary.write_bytes(np.array(first_sequence, dtype="<i8").tobytes())


def _has_several_sentences(split: Split) -> bool:
    """Whether any document of a split has several sentences."""
    return any(len(split.sentence_bounds(shard)[0]) > info.documents for shard, info in enumerate(split.shards))


def open_index(corpus: Corpus, split_name: str, packing: PackingConfig) -> PackedSplit:
    """Open the index that `build_index` made, by memory map; shards are opened when first read.

    Raises:
        UserError: it is damaged, as far as the numbers of sequences say.
    """
    slices_path, first_path = _index_paths(corpus, split_name, packing)
    split, separator_id = corpus.split(split_name), corpus.manifest.tokenizer.eos_token_id
    try:
        slices = np.memmap(slices_path, _slice_type(packing), mode="r")
        first_sequence = np.frombuffer(first_path.read_bytes(), dtype="<i8")
        if len(first_sequence) != len(split.shards) + 1 or first_sequence[-1] != len(slices):
            raise ValueError(f"it has {len(slices):,} sequences in {len(first_sequence) - 1} shards")
        if first_sequence[0] or (np.diff(first_sequence) < 0).any():
            raise ValueError("the shards' first sequences do not ascend")
    except FileNotFoundError as error:
        raise UserError(f"the packing index {error.filename!r} is missing: start again, which makes it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the packing index {str(first_path)!r} is damaged ({error}): remove it") from error
    return PackedSplit(split, slices, first_sequence, packing, separator_id)


def pack_split(corpus: Corpus, split_name: str, packing: PackingConfig) -> PackedSplit:
    """Pack a split in memory, without an index in the data folder."""
    split = corpus.split(split_name)
    slices = [pack_shard(split, shard, packing) for shard in range(len(split.shards))]
    first_sequence, separator_id = np.cumsum([0, *map(len, slices)]), corpus.manifest.tokenizer.eos_token_id
    return PackedSplit(split, np.concatenate(slices), first_sequence, packing, separator_id)
