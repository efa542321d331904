"""Word boundaries, found with a table over the vocabulary; no offsets into the text are needed.

A byte-level BPE puts the space before a word into the word's first token (Radford et al. 2019, GPT-2; fairseq's
whole-word masking of RoBERTa reads it the same way), and so does SentencePiece, which writes it as ▁. Punctuation that
follows a word without a space belongs to it.

In scripts written without spaces every token is a word, as every Han and Hiragana character is in UAX #29; a run of
Katakana is a word too. For scripts that need a dictionary in UAX #29 (Thai, Lao, Khmer, Myanmar) tokens are used as
words. No word begins inside a character or with a combining mark: a token that does belongs to the one before it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import regex

from ds_roberta.data.sentences import cut_long_sentences, whole_characters
from ds_roberta.data.tokenizer import is_continuation, token_bytes
from ds_roberta.errors import UserError

UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
"""A character of a script that writes no spaces between words, for texts, on which no mask depends."""
WORDS_VERSION = 2
"""Incremented when a change of this module gives the same ids other words, and thus other masks."""
MAX_WORD_TOKENS = 16
"""A longer run without a space, such as a URL, is cut into pieces of about this length, between characters."""

_BEGINS, _CONTINUES = 1 << 0, 1 << 1  # a space; a character or its base
_FIRST, _LAST = 2, 4  # places of the kinds of a token's first and last character
_NO_LEAD, _IN_CHARACTER = 1 << 6, 1 << 7  # only bytes that continue a character; the first byte does
_OTHER, _KATAKANA, _ALONE, _SPACE = range(4)
"""Kinds of characters. _ALONE is a word; _SPACE, as a token's last character, belongs to the word after it."""
_RANGES = {
    _KATAKANA: ((0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    _ALONE: (
        # Thai, Lao, Tibetan, Myanmar, Khmer, Tai, Balinese, Javanese
        *((0x0E01, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19FF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F), (0xA980, 0xA9FF)),
        (0xAA60, 0xAADF),
        # Chinese and Japanese, with their wide punctuation
        *((0x2E80, 0x30A0), (0x30FB, 0x30FB), (0x3190, 0x31EF), (0x3200, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
        *((0xFE30, 0xFE4F), (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65)),
        (0x20000, 0x3FFFF),
    ),
}
_MARKS = (
    *((0x0300, 0x036F), (0x200C, 0x200D), (0xFE00, 0xFE0F), (0xFE20, 0xFE2F)),
    *((0x0E31, 0x0E31), (0x0E33, 0x0E3A), (0x0E47, 0x0E4E), (0x0EB1, 0x0EB1), (0x0EB3, 0x0EBC), (0x0EC8, 0x0ECE)),
    *((0x0F0B, 0x0F0C), (0x0F18, 0x0F19), (0x0F35, 0x0F35), (0x0F37, 0x0F37), (0x0F39, 0x0F39), (0x0F3E, 0x0F3F)),
    *((0x0F71, 0x0F84), (0x0F86, 0x0F87), (0x0F8D, 0x0FBC), (0x0FC6, 0x0FC6), (0x102B, 0x103E), (0x1056, 0x1059)),
    *((0x105E, 0x1060), (0x1062, 0x1064), (0x1067, 0x106D), (0x1071, 0x1074), (0x1082, 0x108D), (0x108F, 0x108F)),
    *((0x109A, 0x109D), (0x17B4, 0x17D3), (0x17DD, 0x17DD), (0x1A55, 0x1A7C), (0x1A7F, 0x1A7F), (0x1B00, 0x1B04)),
    *((0x1B34, 0x1B44), (0x302A, 0x302F), (0x3099, 0x309C), (0x30FC, 0x30FC), (0xA980, 0xA983), (0xA9B3, 0xA9C0)),
    *((0xA9E5, 0xA9E5), (0xAA7B, 0xAA7D), (0xAAB0, 0xAAC1), (0xFF70, 0xFF70), (0xFF9E, 0xFF9F)),
)
"""What Unicode attaches to the character before it, where words are characters; and the Tibetan mark between syllables.
Listed, as are the ranges above, because masks must not depend on the Unicode version of a library."""


def _begins(key: int) -> bool:
    """Whether a word begins at a token, from the lower four of its bits and the kind of the character before it."""
    first, before = key >> _FIRST & 3, key >> _LAST & 3
    border = before != _SPACE and (first != before or first == _ALONE)
    return bool(key & _BEGINS) or (border and not key & _CONTINUES)


_WORD_BEGINS = np.array([_begins(key) for key in range(64)])


def word_flags(tokenizer_folder: Path, vocab_size: int) -> np.ndarray:
    """Flags of each id for `word_bounds`: (vocab_size,) uint8; the lowest bit means that it starts with a space.

    Raises:
        UserError: the tokenizer does not mark where words begin.
    """
    table = np.zeros(vocab_size, dtype=np.uint8)
    for number, data in token_bytes(tokenizer_folder).items():
        table[number] = _flags(data)
    if not (table & _BEGINS).any():
        raise UserError(
            f"the tokenizer in {str(tokenizer_folder)!r} does not mark where words begin (no token begins with a "
            "space): use --masking token"
        )
    return table


def word_bounds(flags: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words of a batch; each special token is a separate word.

    Args:
        flags: (B, T) uint8, each token's flags from `word_flags`; or bool, whether its id begins a word.
        special: (B, T) bool.

    Returns:
        Flat beginnings (b * T + t) and ends, ascending, without gaps: two (W,) int64. A sequence's first token and the
        token after a special one begin a word, whatever their ids.
    """
    flat = flags.view(np.uint8).reshape(-1)
    begins = _WORD_BEGINS.take(_keys(flat)).reshape(flags.shape)
    begins |= special
    begins[:, 1:] |= special[:, :-1]
    begins[:, :1] = True
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], flat.size)
    long = np.flatnonzero(ends - starts > MAX_WORD_TOKENS)
    if len(long):  # a few at most
        cuts = cut_long_sentences(starts[long], ends[long], MAX_WORD_TOKENS)[0]
        begins.reshape(-1)[whole_characters(cuts, (flat >= _IN_CHARACTER).take)] = True
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], flat.size)
    return starts, ends


def share_without_spaces(tokenizer_folder: Path, ids: np.ndarray) -> float:
    """The share of the characters of ordinary `ids`, (N,) integers, in scripts written without spaces."""
    pieces = token_bytes(tokenizer_folder)
    text = b"".join(pieces.get(id_, b"") for id_ in ids.tolist()).decode(errors="ignore")  # added tokens have none
    counts = Counter("".join(text.split()))
    ranges = _RANGES[_KATAKANA] + _RANGES[_ALONE]
    without = sum(count for character, count in counts.items() if _within(ord(character), ord(character), ranges))
    return without / max(1, counts.total())


def _keys(flat: np.ndarray) -> np.ndarray:
    """Arguments of `_begins` for all tokens: (N,) uint8."""
    last = flat & np.uint8(3 << _LAST)
    no_lead = flat & np.uint8(_NO_LEAD) != 0
    if no_lead.any():  # of a token inside a character: what is known of the character's beginning
        last = last[np.maximum.accumulate(np.where(no_lead, 0, np.arange(len(flat))))]
    keys = flat & np.uint8((1 << _LAST) - 1)
    keys[1:] |= last[:-1]
    return keys


def _flags(data: bytes) -> int:
    if data.isascii():
        spaces = _BEGINS if data[:1] == b" " else 0
        return spaces | (_SPACE << _LAST if data[-1:] == b" " else 0)
    leads = [place for place, byte in enumerate(data) if not is_continuation(byte)]
    if not leads:
        return _IN_CHARACTER | _CONTINUES | _NO_LEAD
    flags = (_SPACE if data[-1:] == b" " else _kind(data[leads[-1] :])) << _LAST
    if leads[0]:
        return flags | _IN_CHARACTER | _CONTINUES
    flags |= _BEGINS if data[:1] == b" " else _kind(data) << _FIRST
    first, last = _points(data)
    return flags | (_CONTINUES if first == last and _within(first, last, _MARKS) else 0)


def _kind(data: bytes) -> int:
    """The kind of the first character; if its end is missing, the kind of most characters that it may be."""
    first, last = _points(data)
    return next(
        (kind for kind, ranges in _RANGES.items() if 2 * _within(first, last, ranges) > last - first + 1), _OTHER
    )


def _points(data: bytes) -> tuple[int, int]:
    """The lowest and the highest code point that the first character may have."""
    length = 1 + sum(data[0] >= lead for lead in (0xC0, 0xE0, 0xF0))
    point, shift = data[0] & (0xFF if length == 1 else 0x7F >> length), 6 * (length - 1)
    for byte in data[1:length]:
        point, shift = point << 6 | byte & 0x3F, shift - 6
    return point << shift, (point + 1 << shift) - 1


def _within(first: int, last: int, ranges: tuple[tuple[int, int], ...]) -> int:
    """How many of `first … last` are in one of the ranges."""
    return sum(max(0, min(last, high) - max(first, low) + 1) for low, high in ranges)
