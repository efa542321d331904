"""Dynamic masking: which tokens the model must predict, and what replaces them.

A pure function of (key, place, position, share): the same place of the same epoch is masked the same way on any
process, in any micro-batch, after any restart, and differently in every epoch (Liu et al. 2019, RoBERTa, section 4.1).

Static masking (the same section; BERT's preprocessing repeats its data 10 times) applies the same function to another
number: a sequence has `copies` masks, and in epoch e it gets number e mod `copies`; see `copy_numbers`.

Whole units are drawn in random order until a share `mlm_probability` of a sequence's maskable tokens is chosen:

* `token` — single tokens; their number is the share, rounded up or down at random.
* `whole-word` — all tokens of a word (Devlin et al. 2019, the "whole word masking" models of BERT's repository).
* `span` — spans of 1 to 10 whole words of geometric length (Joshi et al. 2020, SpanBERT, section 3.1).

The word or span at the border of the share is taken or left at random, so that the expected share is exact. Of the
chosen tokens 80% become `<mask>`, 10% a random ordinary token, and 10% stay (Devlin et al. 2019, BERT, section 3.1);
in `span` one draw decides this for all tokens of a span.

Random token substitution chooses tokens in the same way and replaces all of them; see `Substituter`.

Shapes: B sequences, T tokens a sequence, N = B * T, W words, M labelled tokens of the B sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ds_roberta.config import MaskingConfig
from ds_roberta.data.hashing import derive_key, mix64
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.data.words import word_bounds

SPAN_P, MAX_SPAN_WORDS = 0.2, 10
"""SpanBERT's geometric distribution of the words in a span, cut off at the longest; 3.8 on average."""
_CHUNK_TOKENS = 1 << 17
"""Number of tokens masked at a time, small enough to stay in a core's cache."""
_NEVER = np.uint32(0xFFFFFFFF)
"""The key of a token that cannot be chosen; it sorts after all others."""
_SHARE_BITS = 16
_SPAN_WORDS = 1 + np.searchsorted(
    np.cumsum((1 - SPAN_P) ** np.arange(MAX_SPAN_WORDS)) / np.sum((1 - SPAN_P) ** np.arange(MAX_SPAN_WORDS)),
    np.arange(0.5, 1 << _SHARE_BITS) / (1 << _SHARE_BITS),
)
"""A span's number of words for each value of 16 random bits."""


class _Draws(NamedTuple):
    """A chunk's random numbers.

    Attributes:
        row_keys: (B,) uint64.
        bits: (B, T) uint32; the upper bits decide the order, the lower 16 are not used for it.
        keys: (B, T) uint32, the upper bits of `bits`, then the position: distinct within a row.
        position_mask: the bits of `keys` that hold the position.
    """

    row_keys: np.ndarray
    bits: np.ndarray
    keys: np.ndarray
    position_mask: np.uint32


class Masker:
    """Masks batches of token ids.

    Args:
        key: made by `derive_key` from the run's seed for training; fixed for evaluation.
        share: the share of the maskable tokens to choose, unless `mask` is given another.
        word_flags: (V,) uint8 from `words.word_flags`; needed only by `whole-word` and `span`.
    """

    def __init__(
        self,
        config: MaskingConfig,
        tokenizer: TokenizerInfo,
        key: int,
        share: float,
        word_flags: np.ndarray | None = None,
    ):
        if config.unit != "token" and word_flags is None:
            raise ValueError(f"masking by {config.unit} needs the table of word starts")
        self.config, self.key, self.share = config, key, share
        self.mask_token_id = tokenizer.mask_token_id
        is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        is_special[list(tokenizer.special_ids)] = True
        edges = np.flatnonzero(np.diff(is_special, prepend=False, append=False))
        self._special_runs = list(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))
        self._word_flags = word_flags
        self._ordinary_ids = np.flatnonzero(~is_special)

    @staticmethod
    def largest_share(config: MaskingConfig) -> float:
        """The largest share of a sequence's tokens that have a label at any step of a run."""
        return config.largest_probability

    def mask(
        self, input_ids: np.ndarray, places: np.ndarray, mlm_probability: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose and replace tokens, in place.

        Args:
            input_ids: (B, T) integers of any type, C-contiguous; the chosen tokens are replaced. Every
                sequence has a special token.
            places: (B,) int64, the place of each sequence in the endless order, or its number from `copy_numbers`.
            mlm_probability: the share to choose, if not the masker's.

        Returns:
            Flat positions (b * T + t) of the chosen tokens, ascending, and their true ids: two (M,) int64.
        """
        share = self.share if mlm_probability is None else mlm_probability
        rows, sequence_length = input_ids.shape
        step = max(1, _CHUNK_TOKENS // sequence_length)
        positions, labels = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for first in range(0, rows, step):
            chunk = slice(first, first + step)
            chosen, true_ids = self._mask_chunk(input_ids[chunk], places[chunk], share)
            positions.append(chosen + first * sequence_length)
            labels.append(true_ids)
        return np.concatenate(positions), np.concatenate(labels)

    def _mask_chunk(self, input_ids: np.ndarray, places: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        sequence_length = input_ids.shape[1]
        draws = _draw(mix64(places.astype(np.uint64) ^ np.uint64(self.key)), sequence_length)
        special = self._specials(input_ids)
        special_positions = np.flatnonzero(special)
        draws.keys.reshape(-1)[special_positions] = _NEVER
        specials = np.bincount(special_positions // sequence_length, minlength=len(input_ids))
        quota = (sequence_length - specials) * share
        border = (mix64(~draws.row_keys) >> np.uint64(32)) * 2.0**-32
        flat_ids = input_ids.reshape(-1)
        if self.config.unit == "token":
            positions = _choose_tokens(draws.keys, quota, border)
            fate = draws.bits.reshape(-1)[positions] & np.uint32((1 << _SHARE_BITS) - 1)
        else:
            assert self._word_flags is not None
            starts, ends = word_bounds(self._word_flags.take(input_ids), special)
            if self.config.unit == "whole-word":
                positions = _choose_words(draws, starts, ends, quota, border)
                fate = draws.bits.reshape(-1)[positions] & np.uint32((1 << _SHARE_BITS) - 1)
            else:
                positions, spans = _choose_spans(draws, starts, ends, special, quota, border)
                fate = _hash_positions(draws.row_keys, spans, sequence_length) >> np.uint64(64 - _SHARE_BITS)
        labels = flat_ids[positions].astype(np.int64)
        self._replace(flat_ids, positions, fate, draws.row_keys, sequence_length)
        return positions, labels

    def _specials(self, input_ids: np.ndarray) -> np.ndarray:
        """Which tokens are special: (B, T) bool. Special ids form a few ranges; comparing is faster than a look-up."""
        special = np.zeros(input_ids.shape, dtype=bool)
        for first, last in self._special_runs:
            special |= (input_ids >= first) & (input_ids <= last) if first < last else input_ids == first
        return special

    def _replace(
        self, flat_ids: np.ndarray, positions: np.ndarray, fate: np.ndarray, row_keys: np.ndarray, sequence_length: int
    ) -> None:
        """Put `<mask>` or random tokens at the chosen positions; `fate` is (M,) of 16 random bits each."""
        masked_below = round(self.config.mask_replace_prob * (1 << _SHARE_BITS))
        random_below = round((self.config.mask_replace_prob + self.config.random_replace_prob) * (1 << _SHARE_BITS))
        flat_ids[positions[fate < masked_below]] = self.mask_token_id
        to_random = positions[(fate >= masked_below) & (fate < random_below)]
        bits = _hash_positions(row_keys, to_random, sequence_length) & np.uint64(0xFFFFFFFF)
        flat_ids[to_random] = self._ordinary_ids[bits * np.uint64(len(self._ordinary_ids)) >> np.uint64(32)]


class Substituter(Masker):
    """A `Masker` that replaces all chosen tokens by random ones and labels whether each ordinary token was replaced.

    The random tokens are drawn evenly from the ordinary ones (Di Liello et al. 2022, "Effective Pretraining Objectives
    for Transformer-based Autoencoders", Findings of EMNLP), while ELECTRA (Clark et al. 2020) trains a second model to
    draw them. A token that is replaced by itself counts as not replaced, as in ELECTRA (section 2).
    """

    def __init__(self, config: MaskingConfig, *arguments: Any):
        super().__init__(replace(config, mask_replace_prob=0.0, random_replace_prob=1.0), *arguments)

    @staticmethod
    def largest_share(config: MaskingConfig) -> float:
        return 1.0

    def mask(
        self, input_ids: np.ndarray, places: np.ndarray, mlm_probability: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace tokens, in place; arguments as in `Masker.mask`.

        Returns:
            Flat positions of all tokens that are not special, ascending, and 1 for each that changed, else 0: two (M,)
            int64.
        """
        original = input_ids.copy()
        super().mask(input_ids, places, mlm_probability)
        ordinary = np.flatnonzero(~self._specials(original))
        return ordinary, (input_ids != original).reshape(-1)[ordinary].astype(np.int64)


def training_masker(
    config: MaskingConfig,
    tokenizer: TokenizerInfo,
    seed: int,
    word_flags: np.ndarray | None = None,
    kind: type[Masker] = Masker,
) -> Masker:
    """The masker of a run's training batches; `word_flags` as in `Masker`."""
    return kind(config, tokenizer, derive_key("mask", seed), config.mlm_probability, word_flags)


def copy_numbers(sequences: np.ndarray, epochs: np.ndarray, copies: int) -> np.ndarray:
    """The numbers that replace places if masks are fixed: one for each sequence and copy.

    Args:
        sequences: (B,) int64, the sequences' numbers.
        epochs: (B,) int64, how often each sequence was visited before.

    Returns:
        (B,) int64.
    """
    return sequences * copies + epochs % copies


def evaluation_masker(
    config: MaskingConfig,
    tokenizer: TokenizerInfo,
    word_flags: np.ndarray | None = None,
    kind: type[Masker] = Masker,
) -> Masker:
    """A masker with the same masks in every run and at every step, so that held-out losses can be compared."""
    return kind(config, tokenizer, derive_key("evaluation mask"), config.held_out_probability, word_flags)


def _draw(row_keys: np.ndarray, length: int) -> _Draws:
    """Draw a chunk's random numbers; one 64-bit hash is used for two tokens."""
    counters = np.arange((length + 1) // 2, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    bits = mix64(row_keys[:, None] + counters).view(np.uint32)[:, :length]
    position_mask = np.uint32((1 << max(_SHARE_BITS, (length - 1).bit_length())) - 1)
    keys = bits & ~position_mask
    keys |= np.arange(length, dtype=np.uint32)
    return _Draws(row_keys, bits, keys, position_mask)


def _hash_positions(row_keys: np.ndarray, positions: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each flat position of a chunk, by its row's key."""
    rows = positions // length
    return mix64(row_keys[rows] ^ mix64((positions - rows * length).astype(np.uint64)))


def _choose_tokens(keys: np.ndarray, quota: np.ndarray, border: np.ndarray) -> np.ndarray:
    """The flat positions of the lowest keys of each row, `quota` of them, rounded at random by `border` in [0, 1)."""
    counts = np.floor(quota + border).astype(np.int64)
    # A sequence has a special token, whose key is the highest, so the count is a valid index.
    beyond = np.sort(keys, axis=1)[np.arange(len(keys)), counts]
    return np.flatnonzero(keys < beyond[:, None])


def _choose_units(
    draws: _Draws, units: np.ndarray, tokens: np.ndarray, quota: np.ndarray, border: np.ndarray
) -> np.ndarray:
    """Choose whole units in the order of their keys until a row's quota of tokens is full.

    Args:
        units: flat positions of the units, ascending; the key there is the unit's.
        tokens: (N,) the number of tokens of the unit at each of these positions; at least 1.

    Returns:
        The flat positions of the chosen units, in no particular order.
    """
    rows, length = draws.keys.shape
    keys = np.full(rows * length, _NEVER)
    keys[units] = draws.keys.reshape(-1)[units]
    # A unit has at least one token, so no more units than the quota of tokens are chosen.
    lowest = np.sort(keys.reshape(rows, length), axis=1)[:, : int(quota.max()) + 1]
    flat = np.minimum(lowest & draws.position_mask, length - 1) + np.arange(0, rows * length, length)[:, None]
    size = tokens[flat]
    before = np.cumsum(size, axis=1) - size
    # Only a part of the unit at the border would fit: it is taken with a probability equal to that part.
    return flat[before + border[:, None] * size < quota[:, None]]


def _choose_words(
    draws: _Draws, starts: np.ndarray, ends: np.ndarray, quota: np.ndarray, border: np.ndarray
) -> np.ndarray:
    """The flat positions of the tokens of chosen words, ascending: (M,) int64.

    Args:
        starts, ends: flat bounds of the words: two (W,) int64, ascending, without gaps.
    """
    tokens = np.zeros(draws.keys.size, dtype=np.int32)
    tokens[starts] = ends - starts
    words = _choose_units(draws, starts, tokens, quota, border)
    is_chosen = np.zeros(draws.keys.size, dtype=bool)
    is_chosen[_ranges(words, tokens[words])] = True
    return np.flatnonzero(is_chosen)


def _choose_spans(
    draws: _Draws, starts: np.ndarray, ends: np.ndarray, special: np.ndarray, quota: np.ndarray, border: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The flat positions of the tokens of chosen spans, ascending, and for each the position that identifies its span.

    A span begins at every word; each word belongs to the span with the lowest key that reaches it. Choosing
    spans in the order of their keys is the same as drawing them one by one: a word drawn twice stays with the first.
    """
    length = draws.keys.shape[1]
    keys = draws.keys.reshape(-1)[starts]
    row_starts = starts - starts % length
    # Spans stay in their row and end at special tokens.
    is_special = special.reshape(-1)[starts]
    closed = np.flatnonzero(is_special | (starts == row_starts))
    room = np.repeat(np.append(closed[1:], len(starts)), np.diff(closed, append=len(starts))) - np.arange(len(starts))
    drawn = _SPAN_WORDS[draws.bits.reshape(-1)[starts] & np.uint32((1 << _SHARE_BITS) - 1)]
    words = np.minimum(drawn, room).astype(np.uint8)
    lowest = keys.copy()
    for further in range(1, min(MAX_SPAN_WORDS, len(starts))):
        out_of_reach = (words[:-further] > further).astype(np.uint32) - np.uint32(1)  # all bits set where out of reach
        out_of_reach |= keys[:-further]
        np.minimum(lowest[further:], out_of_reach, out=lowest[further:])
    spans = np.where(is_special, starts, row_starts + (lowest & draws.position_mask))
    tokens = np.bincount(spans, weights=ends - starts, minlength=draws.keys.size)
    is_chosen = np.zeros(draws.keys.size, dtype=bool)
    is_chosen[_choose_units(draws, np.flatnonzero(tokens), tokens, quota, border)] = True
    chosen = np.flatnonzero(is_chosen[spans])
    counts = ends[chosen] - starts[chosen]
    return _ranges(starts[chosen], counts), np.repeat(spans[chosen], counts)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers `start … start + count - 1` of all pairs, concatenated."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
