"""Where words begin, by a table over the vocabulary: no offsets into the text are needed.

A byte-level BPE writes the space before a word into the word's first token, as the letter Ġ (Radford et al. 2019,
GPT-2; fairseq's whole-word masking of RoBERTa reads it the same way). Punctuation that follows a word without a space
belongs to it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ds_roberta.data.sentences import cut_long_sentences
from ds_roberta.errors import UserError

SPACE = "\u0120"
MAX_WORD_TOKENS = 16
"""A longer run without a space (an address, a script that writes no spaces) is cut into pieces of that length."""


def word_starts(tokenizer_folder: Path, vocab_size: int) -> np.ndarray:
    """Which ids begin a word: (vocab_size,) bool.

    Raises:
        UserError: the tokenizer marks no beginnings of words.
    """
    path = tokenizer_folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    ids = [number for token, number in vocabulary.items() if token.startswith(SPACE)]
    if not ids:
        raise UserError(
            f"{str(path)!r} marks no beginnings of words (no token begins with {SPACE!r}): use --masking token"
        )
    table = np.zeros(vocab_size, dtype=bool)
    table[ids] = True
    return table


def word_bounds(begins: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words of a batch, each special token a word of its own.

    Args:
        begins: (B, T) bool, the token's id begins a word; C-contiguous, becomes whether the token begins one here.
        special: (B, T) bool.

    Returns:
        Flat beginnings (b * T + t) and ends, rising, without gaps: two (W,) int64. A sequence's first token and the
        token behind a special one begin a word, whatever their ids.
    """
    begins |= special
    begins[:, 1:] |= special[:, :-1]
    begins[:, :1] = True
    flat = begins.reshape(-1)
    starts = np.flatnonzero(flat)
    ends = np.append(starts[1:], flat.size)
    long = np.flatnonzero(ends - starts > MAX_WORD_TOKENS)
    if len(long):  # they are few
        flat[cut_long_sentences(starts[long], ends[long], MAX_WORD_TOKENS)[0]] = True
        starts = np.flatnonzero(flat)
        ends = np.append(starts[1:], flat.size)
    return starts, ends
