"""Pairs of segments for next sentence prediction (Devlin et al. 2019, BERT, section 3.1; Liu et al. 2019, section 4.2).

A document is cut into chunks of as many whole sentences as fit into a sequence, and each chunk is cut in two at a
random border between its sentences. With probability one half the two parts are a pair. Otherwise the first part is
paired with a segment that begins at a random sentence of another document and fills the sequence, and the next chunk
begins with the second part, as in BERT's `create_pretraining_data.py`. So every sentence occurs once per epoch, apart
from the drawn segments. The last sentence of a document, if left over, can only be paired with a drawn segment. Unlike
in BERT, only drawn segments are truncated, and no sequences are short by design.

Segments are drawn from the same shard; if it holds only one document, from the next shard that has any, of the same
source if possible. Everything is a pure function of the data and the packing: epochs and runs share the pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ds_roberta.data.hashing import derive_key, mix64
from ds_roberta.data.sentences import cut_long_sentences, document_bounds, walk, whole_characters
from ds_roberta.data.shards import Split
from ds_roberta.errors import UserError

IS_NEXT, IS_RANDOM = 0, 1
"""Labels, as in transformers' `BertForPreTraining`."""


class Pairs(NamedTuple):
    """The pairs of one shard: six (pairs,) arrays of integers.

    Attributes:
        start, length: where the first segments are in the shard's values.
        second_shard, second_start, second_length: where the second segments are.
        next_sentence_label: `IS_NEXT` or `IS_RANDOM`.
    """

    start: np.ndarray
    length: np.ndarray
    second_shard: np.ndarray
    second_start: np.ndarray
    second_length: np.ndarray
    next_sentence_label: np.ndarray


def pack_pairs(split: Split, shard: int, capacity: int, longest: int | None) -> Pairs:
    """The pairs of a shard.

    Args:
        capacity: tokens of both segments together; at least 2. Sentences longer than half of it are cut.
        longest: the maximum number of sentences in a segment; None for as many as fit.

    Raises:
        UserError: there is no other document in the split.
    """
    # If no sentence is longer than half, a first segment of one sentence leaves room for a second segment.
    starts, ends = cut_long_sentences(*split.sentence_bounds(shard), capacity // 2, split.in_character(shard))
    count, key = len(starts), derive_key("pairs", split.name, shard, capacity, longest or 0)
    number = np.arange(count)
    document_start, document_end = document_bounds(starts, ends)
    chunk_end = np.minimum(np.searchsorted(ends, starts + capacity, side="right"), document_end)
    if longest is not None:
        chunk_end = np.minimum(chunk_end, number + 2 * longest)
    borders = chunk_end - number - 1
    second = number + 1 + _draw(key, "border", number, borders)
    is_random = (borders == 0) | (_draw(key, "label", number, np.full(count, 2)) == 1)

    first = walk(np.where(is_random, second, chunk_end))
    second, chunk_end, is_random = second[first], chunk_end[first], is_random[first]
    last_ends = ends[second - 1]
    second_shards = np.full(len(first), shard)
    second_starts = starts[np.minimum(second, count - 1)]
    second_ends = ends[chunk_end - 1]

    unpaired = first[is_random]
    if len(unpaired):
        other = _other_documents(split, shard)
        second_shards[is_random] = other
        if other == shard:
            other_starts, other_ends, other_document_end = starts, ends, document_end
            own = document_end[unpaired] - document_start[unpaired]
            drawn = _draw(key, "second", unpaired, count - own)
            drawn += np.where(drawn >= document_start[unpaired], own, 0)
        else:
            bounds = split.sentence_bounds(other)
            other_starts, other_ends = cut_long_sentences(*bounds, capacity // 2, split.in_character(other))
            _, other_document_end = document_bounds(other_starts, other_ends)
            drawn = _draw(key, "second", unpaired, np.full(len(unpaired), len(other_starts)))
        room = capacity - (last_ends[is_random] - starts[unpaired])
        limits = other_starts[drawn] + room
        fitting = np.minimum(np.searchsorted(other_ends, limits, side="right"), other_document_end[drawn])
        if longest is not None:
            fitting = np.minimum(fitting, drawn + longest)
        second_starts[is_random] = other_starts[drawn]
        second_ends[is_random] = other_ends[fitting - 1]
        # If the first sentence does not fit, a part of it is taken.
        cut = fitting == drawn
        parts = whole_characters(limits[cut], split.in_character(other))
        second_ends[np.flatnonzero(is_random)[cut]] = np.where(parts > other_starts[drawn[cut]], parts, limits[cut])
    return Pairs(
        starts[first], last_ends - starts[first], second_shards, second_starts, second_ends - second_starts, is_random
    )


def _draw(key: int, purpose: str, sentences: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """For each sentence a random number below its `choices` (0 if there are none): (sentences,) int64."""
    bits = mix64(sentences.astype(np.uint64) ^ np.uint64(derive_key(purpose, key)))
    return ((bits >> np.uint64(1)) % np.maximum(choices, 1).astype(np.uint64)).astype(np.int64)


def _other_documents(split: Split, shard: int) -> int:
    """The shard from which segments of other documents are drawn."""
    shards = split.shards
    if shards[shard].documents > 1:
        return shard
    following = [number % len(shards) for number in range(shard + 1, shard + len(shards))]
    filled = [number for number in following if shards[number].documents]
    same_source = [number for number in filled if shards[number].source == shards[shard].source]
    if not filled:
        raise UserError(
            f"pairs need segments of other documents, but the {split.name} split has only one document: prepare more "
            "text, or use another --packing"
        )
    return (same_source or filled)[0]
