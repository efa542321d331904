"""The places of a step's global batch, and each process's part of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds_roberta.config import Stage
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.stages import SkippedPlaces, places_used, stage_number

EMPTY_PLACE = -1
"""The place of a row that fills up a micro-batch if the batch does not divide evenly; the row has no labels."""


def step_places(
    order: SampleOrder, stages: Sequence[Stage], step: int, skipped: Sequence[SkippedPlaces] = ()
) -> np.ndarray:
    """The places of global batch `step`, counted from 0, lane by lane: (train_batch_size,) int64.

    Args:
        order: of the sequences of that step's stage.
    """
    stage = stages[stage_number(stages, step)]
    first = places_used(stages, stage.max_seq_length, step, skipped)
    return order.lane_order(np.arange(first, first + stage.train_batch_size))


def split_places(places: np.ndarray, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Split a process's part of a global batch into micro-batches of equal size; each process gets the same number.

    Args:
        places: (train_batch_size,) int64, the places of the global batch.

    Returns:
        Arrays of (micro_batch_size,) int64; the last is filled up with `EMPTY_PLACE`.
    """
    total = len(places)
    own = places[total * rank // world_size : total * (rank + 1) // world_size]
    largest = -(-total // world_size)
    micro_steps = -(-largest // micro_batch_size)
    padded = np.full(micro_steps * micro_batch_size, EMPTY_PLACE, dtype=np.int64)
    padded[: len(own)] = own
    return list(padded.reshape(micro_steps, micro_batch_size))
