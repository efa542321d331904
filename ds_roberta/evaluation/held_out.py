"""Evaluation during training: the same sequences and masks in every run, the same sums on any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ds_roberta.data.loader import Collator, Counts, MicroBatch, split_places
from ds_roberta.data.order import SampleOrder
from ds_roberta.distributed import Ranks

_ORDER_SEED = 0


class HeldOutSample:
    """A fixed sample of a split.

    Args:
        collator: of the held-out split, with `evaluation_masker`.
        sequences: size of the sample, at most; all of a smaller split.
    """

    def __init__(self, collator: Collator, sequences: int, micro_batch_size: int, ranks: Ranks):
        self._collator, self._ranks = collator, ranks
        size = len(collator.packed)
        sample = SampleOrder(size, _ORDER_SEED).sequences(np.arange(min(size, sequences)))
        self._parts = split_places(sample, ranks.rank, ranks.world_size, micro_batch_size)

    def evaluate(
        self, model: Callable[[MicroBatch], dict[str, float]], stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], Counts] | None:
        """The sums of an objective over the sample, and what they are of; all ranks call it.

        Args:
            model: returns its sums over a micro-batch.
            stop: called before each micro-batch; all ranks must get the same answer.

        Returns:
            None if it was stopped.
        """
        sums: dict[str, float] = {}
        counts = []
        for part in self._parts:
            if stop():
                return None
            micro_batch = self._collator.collate(part, part)
            sums = {name: sums.get(name, 0.0) + value for name, value in model(micro_batch).items()}
            counts.append(micro_batch.counts)
        return self._ranks.sum_each(sums), Counts.total(counts, self._ranks)
