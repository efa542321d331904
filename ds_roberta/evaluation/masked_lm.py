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
        self, loss_sum: Callable[[MicroBatch], float | list[float]], stop: Callable[[], bool] = lambda: False
    ) -> tuple[float, ...] | None:
        """Loss in nats and perplexity, then of a model of pairs loss and accuracy of these; all ranks call it.

        Args:
            loss_sum: the sum of a micro-batch's losses, or of pairs the sums of `MaskedLMWithNextSentence`.
            stop: asked before each micro-batch; all ranks must get the same answer.

        Returns:
            None where it was told to stop.
        """
        sums, masked, sequences = np.zeros(1), 0, 0
        for part in self._parts:
            if stop():
                return None
            micro_batch = self._collator.collate(part, part)
            sums = sums + np.atleast_1d(loss_sum(micro_batch))
            masked += len(micro_batch.labels)
            sequences += micro_batch.sequences
        all_masked, all_sequences, total, *of_pairs = self._ranks.sum(masked, sequences, *sums.tolist())
        loss = total / max(all_masked, 1)
        return loss, math.exp(min(loss, 700.0)), *(each / all_sequences for each in of_pairs)
