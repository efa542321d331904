"""Dynamic masking: which tokens the model must predict, and what stands in their place.

A pure function of (key, place, position): the same place of the same epoch is masked alike on any process, in any
micro-batch, after any restart, and differently in every epoch (Liu et al. 2019, RoBERTa, section 4.1).

Of the n maskable tokens of a sequence, `mlm_probability * n` are chosen, rounded up or down at random, so that the
expected share is exact and the number hardly varies. Of those, 80% become `<mask>`, 10% a random token, 10% stay
(Devlin et al. 2019, BERT, section 3.1).

Shapes: B sequences, T tokens a sequence, M masked tokens of the B sequences.
"""

from __future__ import annotations

import numpy as np

from ds_roberta.config import MaskingConfig
from ds_roberta.data.hashing import derive_key, mix64
from ds_roberta.data.shards import TokenizerInfo


class Masker:
    """Masks batches of token ids.

    Args:
        key: from `derive_key`, of the run's seed for training, fixed for evaluation.
    """

    def __init__(self, config: MaskingConfig, tokenizer: TokenizerInfo, key: int):
        self.config, self.key = config, key
        self.mask_token_id = tokenizer.mask_token_id
        is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        is_special[list(tokenizer.special_ids)] = True
        self._is_special = is_special
        self._ordinary_ids = np.flatnonzero(~is_special)

    def mask(self, input_ids: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choose and replace tokens, in place.

        Args:
            input_ids: (B, T) integers; the chosen tokens are replaced.
            places: (B,) int64, the place of each sequence in the endless order.

        Returns:
            Flat positions (b * T + t) of the chosen tokens, rising, and their true ids: two (M,) int64.
        """
        _, sequence_length = input_ids.shape
        row_keys = mix64(places.astype(np.uint64) ^ np.uint64(self.key))
        maskable = ~self._is_special[input_ids]
        quota = maskable.sum(axis=1) * self.config.mlm_probability + _unit_interval(mix64(~row_keys))
        draws = np.where(maskable, _draw_uint32(row_keys, sequence_length), np.uint32(0xFFFFFFFF))
        # A sequence closes with a special token, so the quota is a valid index; those drawn below it are chosen.
        threshold = np.take_along_axis(np.sort(draws, axis=1), quota.astype(np.int64)[:, None], axis=1)
        positions = np.flatnonzero(draws < threshold)
        flat_ids = input_ids.reshape(-1)
        labels = flat_ids[positions].astype(np.int64)

        fate = mix64(row_keys[positions // sequence_length] ^ mix64((positions % sequence_length).astype(np.uint64)))
        share = _unit_interval(fate)
        to_mask = share < self.config.mask_replace_prob
        to_random = ~to_mask & (share < self.config.mask_replace_prob + self.config.random_replace_prob)
        flat_ids[positions[to_mask]] = self.mask_token_id
        which = (fate[to_random] & np.uint64(0xFFFFFFFF)) * np.uint64(len(self._ordinary_ids)) >> np.uint64(32)
        flat_ids[positions[to_random]] = self._ordinary_ids[which]
        return positions, labels


def training_masker(config: MaskingConfig, tokenizer: TokenizerInfo, seed: int) -> Masker:
    return Masker(config, tokenizer, derive_key("mask", seed))


def evaluation_masker(config: MaskingConfig, tokenizer: TokenizerInfo) -> Masker:
    """Masks that are the same in every run, so that held-out losses compare."""
    return Masker(config, tokenizer, derive_key("evaluation mask"))


def _unit_interval(random_bits: np.ndarray) -> np.ndarray:
    """The upper 32 bits as a number in [0, 1)."""
    return (random_bits >> np.uint64(32)).astype(np.float64) * 2.0**-32


def _draw_uint32(row_keys: np.ndarray, length: int) -> np.ndarray:
    """(B, length) uint32, distinct within a row: random upper bits over the position in the lower ones."""
    counters = np.arange((length + 1) // 2, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    draws = mix64(row_keys[:, None] + counters[None, :]).view(np.uint32)[:, :length]
    position_bits = np.uint32((1 << max(length - 1, 1).bit_length()) - 1)
    return (draws & ~position_bits) | np.arange(length, dtype=np.uint32)
