"""From a step's number to a process's micro-batches.

Shapes: B sequences of a micro-batch, T tokens a sequence, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ds_roberta.data.masking import Masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import PackedSplit
from ds_roberta.data.shards import TokenizerInfo

EMPTY_PLACE = -1
"""Fills up a micro-batch where the batch does not divide: a row without labels, so without weight."""


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs.

    Attributes:
        input_ids: (B, T) int64, with replacements where masked.
        attention_mask: (B, T) bool, true at tokens and false at padding; None where no row has padding.
        masked_positions: (M,) int64, flat positions b * T + t of the tokens to predict.
        labels: (M,) int64, their true ids.
        tokens: tokens that are not padding.
        sequences: rows that are not empty places.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_positions: torch.Tensor
    labels: torch.Tensor
    tokens: int
    sequences: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; the copies to a GPU do not wait for it."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return MicroBatch(
            move(self.input_ids),
            None if self.attention_mask is None else move(self.attention_mask),
            move(self.masked_positions),
            move(self.labels),
            self.tokens,
            self.sequences,
        )


class Collator:
    """Assembles micro-batches of one packed split."""

    def __init__(self, packed: PackedSplit, masker: Masker, tokenizer: TokenizerInfo, max_seq_length: int):
        self.packed, self.masker = packed, masker
        self.tokenizer, self.max_seq_length = tokenizer, max_seq_length

    def collate(self, sequences: np.ndarray, places: np.ndarray) -> MicroBatch:
        """One micro-batch.

        Args:
            sequences: (B,) int64, which sequence fills each row; ignored in empty places.
            places: (B,) int64, the rows' places, which decide their masks; `EMPTY_PLACE` where there is none.
        """
        filled = np.flatnonzero(places != EMPTY_PLACE)
        input_ids = np.full((len(places), self.max_seq_length), self.tokenizer.pad_token_id, dtype=np.int64)
        input_ids[:, 0], input_ids[:, 1] = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = input_ids[: len(filled)]  # empty places are the last rows
        slice_lengths = self.packed.gather(sequences[filled], rows)
        rows[np.arange(len(rows)), slice_lengths + 1] = self.tokenizer.eos_token_id
        lengths = np.full(len(places), 2)
        lengths[: len(filled)] += slice_lengths
        positions, labels = self.masker.mask(rows, places[filled])
        attention_mask = None
        if lengths.min() < self.max_seq_length:
            attention_mask = torch.from_numpy(np.arange(self.max_seq_length) < lengths[:, None])
        return MicroBatch(
            torch.from_numpy(input_ids),
            attention_mask,
            torch.from_numpy(positions),
            torch.from_numpy(labels),
            int(lengths[: len(filled)].sum()),
            len(filled),
        )


def split_places(places: np.ndarray, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """A process's part of a global batch, as micro-batches of equal size; every process gets as many.

    Args:
        places: (train_batch_size,) int64, the places of the global batch.

    Returns:
        Arrays of (micro_batch_size,) int64; what is left over is filled with `EMPTY_PLACE`.
    """
    total = len(places)
    own = places[total * rank // world_size : total * (rank + 1) // world_size]
    largest = -(-total // world_size)
    micro_steps = -(-largest // micro_batch_size)
    padded = np.full(micro_steps * micro_batch_size, EMPTY_PLACE, dtype=np.int64)
    padded[: len(own)] = own
    return list(padded.reshape(micro_steps, micro_batch_size))


class TrainLoader:
    """A process's micro-batches of any step, each step prepared by a thread while the one before it trains.

    One thread is enough: collating is vectorised and far faster than training.
    """

    def __init__(
        self,
        collator: Collator,
        order: SampleOrder,
        train_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.collator, self.order = collator, order
        self.train_batch_size, self.micro_batch_size = train_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of global batch `step`, counted from 0."""
        first = step * self.train_batch_size
        places = self.order.lane_order(np.arange(first, first + self.train_batch_size))
        parts = split_places(places, self.rank, self.world_size, self.micro_batch_size)
        sequences = self.order.sequences(np.concatenate(parts).clip(min=0)).reshape(len(parts), -1)
        return [self.collator.collate(*pair) for pair in zip(sequences, parts, strict=True)]

    def steps(self, first_step: int, last_step: int) -> Generator[list[MicroBatch], None, None]:
        """The micro-batches of steps `first_step` … `last_step - 1`, one step prepared ahead."""
        return prefetch(self.micro_batches, first_step, last_step)


def prefetch(make: Callable[[int], list[MicroBatch]], first: int, last: int) -> Generator[list[MicroBatch], None, None]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as executor:
        upcoming: Future[list[MicroBatch]] | None = executor.submit(make, first) if first < last else None
        for number in range(first, last):
            assert upcoming is not None
            current = upcoming.result()
            upcoming = executor.submit(make, number + 1) if number + 1 < last else None
            yield current
