"""The sentences of a shard as bounds in its values, and walks along them, which all packing formats share."""

from __future__ import annotations

import numpy as np


def cut_long_sentences(starts: np.ndarray, ends: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace every sentence longer than `capacity` tokens by consecutive pieces of at most that length."""
    pieces = np.maximum(1, -(-(ends - starts) // capacity))
    piece_number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_starts = np.repeat(starts, pieces) + piece_number * capacity
    return piece_starts, np.minimum(piece_starts + capacity, np.repeat(ends, pieces))


def whole_characters(cuts: np.ndarray, in_character: np.ndarray) -> np.ndarray:
    """Places to cut, moved back out of characters.

    Args:
        cuts: (C,) int64, places in the tokens before which to cut.
        in_character: (tokens,) bool, the token begins inside a character.

    Returns:
        (C,) int64. At most three tokens begin inside a character: a place with more of them before it, which no text
        gives, stays.
    """
    moved = cuts
    for _ in range(3):
        moved = moved - (in_character[moved] & (moved > 0))
    return np.where(in_character[moved], cuts, moved)


def document_bounds(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each sentence the number of its document's first sentence and of the one behind the last: two (sentences,)."""
    # Sentences of one document touch; between documents stands a separator.
    borders = np.concatenate([[0], np.flatnonzero(starts[1:] != ends[:-1]) + 1, [len(starts)]])
    sizes = np.diff(borders)
    return np.repeat(borders[:-1], sizes), np.repeat(borders[1:], sizes)


def walk(following: np.ndarray) -> np.ndarray:
    """The sentences met from the first one on, where behind sentence i comes `following[i]` > i: int64, rising."""
    met, sentence, steps = [], 0, following.tolist()
    while sentence < len(steps):
        met.append(sentence)
        sentence = steps[sentence]
    return np.array(met, dtype=np.int64)
