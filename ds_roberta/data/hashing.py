"""Keyed hashing and keyed permutations: all randomness of the data is a pure function of its arguments.

This module keeps no state. Keys are hashed, never added, so that seed 1 in epoch 2 and seed 2 in epoch 1 are unrelated.
"""

from __future__ import annotations

import numpy as np
import xxhash

_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """Derive a 64-bit key from a purpose and numbers, for example `derive_key("order", seed, epoch)`."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode())


def mix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): uint64 in, a new array of well-mixed uint64 out."""
    mixed = values + _GOLDEN
    shifted = mixed >> np.uint64(30)  # allocated once: fresh memory costs more than the arithmetic
    mixed ^= shifted
    mixed *= _MULTIPLIER_1
    mixed ^= np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed *= _MULTIPLIER_2
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed


def permute(positions: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """A keyed pseudo-random permutation of `range(size)`, evaluated only at `positions`.

    A balanced Feistel network over the next power of four, walked until it falls inside the range (Black and
    Rogaway, 2002, "Ciphers with arbitrary finite domains"). It needs memory only for `positions`.

    Args:
        positions: uint64, each below `size`.
        key: one key, or a uint64 array with a key for each position (equal keys give the same permutation).

    Returns:
        uint64 of the same shape; distinct positions under one key give distinct results.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [
        mix64(np.atleast_1d(np.asarray(key, dtype=np.uint64)) ^ np.uint64(derive_key("feistel", round_number)))
        for round_number in range(_FEISTEL_ROUNDS)
    ]
    keyed_by_position = round_keys[0].size > 1
    result = np.array(positions, dtype=np.uint64)
    outside = np.arange(result.size)
    while outside.size:
        values = result[outside]
        left, right = values >> half, values & mask
        for round_key in round_keys:
            mixed = mix64(right ^ (round_key[outside] if keyed_by_position else round_key))
            left, right = right, left ^ (mixed & mask)
        values = (left << half) | right
        result[outside] = values
        outside = outside[values >= np.uint64(size)]
    return result
