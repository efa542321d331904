"""Held-out masked-LM loss: the same sequences and masks in every run, the same number on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ds_roberta.data.loader import Collator, MicroBatch, split_places
from ds_roberta.data.order import SampleOrder
from ds_roberta.distributed import Ranks

_ORDER_SEED = 0


class HeldOutLoss:
    """The mean cross-entropy of masked tokens over a fixed sample of a split.

    Args:
        collator: of the held-out split, with `evaluation_masker`.
        sequences: size of the sample, at most; all of a smaller split.
    """

    def __init__(self, collator: Collator, sequences: int, micro_batch_size: int, ranks: Ranks):
        self._collator, self._ranks = collator, ranks
        size = len(collator.packed)
        sample = SampleOrder(size, _ORDER_SEED).sequences(np.arange(min(size, sequences)))
        self._parts = split_places(sample, ranks.rank, ranks.world_size, micro_batch_size)

    def compute(
        self, loss_sum: Callable[[MicroBatch], float], stop: Callable[[], bool] = lambda: False
    ) -> tuple[float, float] | None:
        """Loss in nats and perplexity; all ranks call it.

        Args:
            loss_sum: the sum of a micro-batch's losses.
            stop: asked before each micro-batch; all ranks must get the same answer.

        Returns:
            None where it was told to stop.
        """
        total, masked = 0.0, 0
        for part in self._parts:
            if stop():
                return None
            micro_batch = self._collator.collate(part, part)
            total += loss_sum(micro_batch)
            masked += len(micro_batch.labels)
        total, all_masked = self._ranks.sum(total, masked)
        loss = total / max(all_masked, 1)
        return loss, math.exp(min(loss, 700.0))
