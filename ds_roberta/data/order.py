"""The order of training sequences: a closed-form permutation of each epoch, with locality.

Places are numbered without end: place `g` is place `g % size` of epoch `g // size`. A global batch of B sequences at
step t is places t*B … (t+1)*B - 1, whatever the number of processes.

Within an epoch (N sequences) the order reads storage in large pieces and still mixes well:

1. Blocks of `BLOCK` neighbouring sequences are permuted as a whole.
2. The permuted blocks are dealt to up to `MAX_LANES` lanes, and each lane walks through them in windows of
   `WINDOW_BLOCKS` blocks, permuting the sequences within a window. Place i belongs to lane `i % lanes`, so every
   batch draws from all lanes, while only the process that takes a whole lane (`lane_order`) reads its blocks.
3. The sequences that do not fill a window in every lane (fewer than lanes x window) come last, permuted together.

Every stage is a keyed Feistel permutation (`hashing.permute`): no table is made, and any place is computed on its own.
"""

from __future__ import annotations

import numpy as np

from ds_roberta.data.hashing import derive_key, mix64, permute

BLOCK = 256
"""Number of neighbouring sequences that move together: 256 KiB of a 512-token corpus on disk."""
WINDOW_BLOCKS = 16
MAX_LANES = 256


class SampleOrder:
    """The order of one packed split.

    Args:
        size: number of sequences N; at least 1.
        seed: the run's seed.
    """

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError(f"an order needs at least one sequence, got {size}")
        self.size, self.seed = size, seed
        self.blocks = size // BLOCK
        self.lanes = min(MAX_LANES, max(1, self.blocks // WINDOW_BLOCKS))
        self.windows = self.blocks // (self.lanes * WINDOW_BLOCKS)
        self.laned_blocks = self.lanes * self.windows * WINDOW_BLOCKS

    def sequences(self, places: np.ndarray) -> np.ndarray:
        """The sequence (0 … N-1) at each place: int64 in, int64 out, of the same shape."""
        places = np.asarray(places, dtype=np.int64)
        result = np.empty_like(places)
        epochs = places // self.size
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._within_epoch((places[chosen] % self.size).astype(np.uint64), int(epoch))
        return result

    def epochs(self, places: np.ndarray) -> np.ndarray:
        """How often the sequence at each place came before: int64, of the same shape."""
        return np.asarray(places, dtype=np.int64) // self.size

    def lane_order(self, places: np.ndarray) -> np.ndarray:
        """The places of one batch, sorted by lane: consecutive parts of the result touch different blocks."""
        return places[np.argsort(places % self.size % self.lanes, kind="stable")]

    def _within_epoch(self, index: np.ndarray, epoch: int) -> np.ndarray:
        result = np.empty(index.shape, dtype=np.uint64)
        laned_size = self.laned_blocks * BLOCK
        laned = index < np.uint64(laned_size)
        block_key = derive_key("blocks", self.seed, epoch)

        lane, position = index[laned] % np.uint64(self.lanes), index[laned] // np.uint64(self.lanes)
        window_size = WINDOW_BLOCKS * BLOCK
        window, offset = position // np.uint64(window_size), position % np.uint64(window_size)
        window_key = mix64(np.uint64(derive_key("window", self.seed, epoch)) ^ mix64((window << np.uint64(16)) | lane))
        offset = permute(offset, window_size, window_key)
        slot = (window * np.uint64(WINDOW_BLOCKS) + offset // np.uint64(BLOCK)) * np.uint64(self.lanes) + lane
        block = permute(slot, self.blocks, block_key)
        result[laned] = block * np.uint64(BLOCK) + offset % np.uint64(BLOCK)

        rest = permute(
            index[~laned] - np.uint64(laned_size), self.size - laned_size, derive_key("rest", self.seed, epoch)
        )
        rest += np.uint64(laned_size)
        in_block = rest < np.uint64(self.blocks * BLOCK)  # else the tail, shorter than a block, which stays in place
        rest_block = permute(rest[in_block] // np.uint64(BLOCK), self.blocks, block_key)
        rest[in_block] = rest_block * np.uint64(BLOCK) + rest[in_block] % np.uint64(BLOCK)
        result[~laned] = rest
        return result.astype(np.int64)
