"""The bounds of a shard's sentences in its values, and walks along them; all packing formats use this."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

InCharacter = Callable[[np.ndarray], np.ndarray]
"""For places in the tokens, (N,) int64, whether the token there begins inside a character: (N,) bool."""
_MOST_INSIDE = 3
"""The maximum number of tokens that can begin inside one character, which has at most four bytes."""


def nowhere(places: np.ndarray) -> np.ndarray:
    """An `InCharacter` for tokens that may be cut anywhere."""
    return np.zeros(len(places), dtype=bool)


def bounds_of_sentences(offsets: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (without separator) of every sentence in a shard's values: two (sentences,) int64.

    Args:
        offsets: where each document begins, and the end of the last, (documents + 1,).
        counts: sentences of each document, (documents,).
        ends: the offset in the document after the last token of each sentence, (sentences,).

    Raises:
        ValueError: the sentences do not follow one another from the beginning of each document to its separator.
    """
    if (counts < 1).any():
        raise ValueError("a document has no sentence")
    offsets = offsets.astype(np.int64)
    ends = np.repeat(offsets[:-1], counts) + ends
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1]
    last = np.cumsum(counts) - 1
    starts[last + 1 - counts] = offsets[:-1]
    if (starts > ends).any() or (ends[last] != offsets[1:] - 1).any():
        raise ValueError("the sentences of a document do not follow one another to its end")
    return starts, ends


def cut_long_sentences(
    starts: np.ndarray, ends: np.ndarray, capacity: int, in_character: InCharacter = nowhere
) -> tuple[np.ndarray, np.ndarray]:
    """Replace every sentence longer than `capacity` tokens by consecutive pieces that fill it, cut between characters.

    A piece that would end inside a character ends before it, and the next one begins there.
    """
    pieces = np.maximum(1, -(-(ends - starts) // capacity))
    sentence = np.repeat(np.arange(len(starts)), pieces)
    piece_number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_starts = starts[sentence] + piece_number * capacity
    piece_ends = np.minimum(piece_starts + capacity, ends[sentence])
    wrong = np.unique(sentence[(piece_number > 0) & in_character(piece_starts)])
    if not len(wrong):
        return piece_starts, piece_ends
    others = ~np.isin(sentence, wrong)
    parts = [(piece_starts[others], piece_ends[others])]
    for start, end in zip(starts[wrong].tolist(), ends[wrong].tolist(), strict=True):
        cuts = np.array(_cuts(start, end, capacity, in_character))
        parts.append((cuts[:-1], cuts[1:]))
    piece_starts, piece_ends = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(piece_starts, kind="stable")
    return piece_starts[order], piece_ends[order]


def _cuts(start: int, end: int, capacity: int, in_character: InCharacter) -> list[int]:
    """The bounds of one sentence's pieces: `start`, the places between characters to cut at, `end`."""
    inside, cuts = in_character(np.arange(start, end)).tobytes(), [start]
    while end - cuts[-1] > capacity:
        full = cuts[-1] + capacity
        places = range(full, max(cuts[-1], full - _MOST_INSIDE - 1), -1)
        cuts.append(next((place for place in places if not inside[place - start]), full))
    return [*cuts, end]


def whole_characters(cuts: np.ndarray, in_character: InCharacter) -> np.ndarray:
    """Places to cut, moved back out of characters.

    Args:
        cuts: (C,) int64, places in the tokens before which to cut.

    Returns:
        (C,) int64. At most three tokens begin inside a character: a place with more such tokens before it, which
        text never has, is not moved.
    """
    moved = cuts
    for _ in range(_MOST_INSIDE):
        moved = moved - (in_character(moved) & (moved > 0))
    return np.where(in_character(moved), cuts, moved)


def document_bounds(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each sentence, its document's first sentence and the one after its last: two (sentences,) int64."""
    # Sentences of one document touch; between documents there is a separator.
    borders = np.concatenate([[0], np.flatnonzero(starts[1:] != ends[:-1]) + 1, [len(starts)]])
    sizes = np.diff(borders)
    return np.repeat(borders[:-1], sizes), np.repeat(borders[1:], sizes)


def walk(following: np.ndarray) -> np.ndarray:
    """The sentences visited from the first one on, if `following[i]` > i comes after sentence i: int64, ascending."""
    met, sentence, steps = [], 0, following.tolist()
    while sentence < len(steps):
        met.append(sentence)
        sentence = steps[sentence]
    return np.array(met, dtype=np.int64)
