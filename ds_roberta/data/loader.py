"""The micro-batches of a training step, found by the step's number, and of the held-out sample.

Shapes: B sequences of a micro-batch, T tokens per sequence, M labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ds_roberta.config import Stage
from ds_roberta.data.masking import Masker, copy_numbers
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import PackedSplit
from ds_roberta.data.shards import TokenizerInfo, token_type
from ds_roberta.data.stages import SkippedPlaces, places_used, stage_number
from ds_roberta.distributed import Ranks

_HELD_OUT_SEED = 0
EMPTY_PLACE = -1
"""The place of a row that fills up a micro-batch if the batch does not divide evenly; the row has no labels."""


class Counts(NamedTuple):
    """The numbers of labels, non-padding tokens and sequences in a micro-batch or a whole batch."""

    labels: float
    tokens: float
    sequences: float

    @classmethod
    def total(cls, counts: Iterable[Counts], ranks: Ranks) -> Counts:
        """Sum counts over all processes; a collective call.

        A batch of a few very short sequences may have no label: the count is then 1, so that loss and gradient are 0.
        """
        labels, tokens, sequences = ranks.sum(*map(sum, zip(*counts, strict=True)))
        return cls(max(labels, 1), tokens, sequences)


@dataclass(frozen=True)
class MicroBatch:
    """The model's inputs and labels for one micro-batch.

    Attributes:
        input_ids: (B, T) int64, with masked tokens replaced.
        attention_mask: (B, T) bool, true at tokens and false at padding; None if no row has padding.
        masked_positions: (M,) int64, flat positions b * T + t of the labelled tokens.
        labels: (M,) int64, from the masker: the tokens' true ids, or whether each was replaced.
        tokens: number of tokens that are not padding.
        sequences: number of rows that are not empty places.
        next_sentence_labels: (sequences,) int64 for pairs, see `PackedSplit.next_sentence_labels`; else None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_positions: torch.Tensor
    labels: torch.Tensor
    tokens: int
    sequences: int
    next_sentence_labels: torch.Tensor | None = None

    @property
    def counts(self) -> Counts:
        return Counts(len(self.labels), self.tokens, self.sequences)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the micro-batch to `device`; the CPU does not wait for copies to a GPU."""
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved: dict[str, Any] = {
            name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()
        }
        return replace(self, **moved)


class Collator:
    """Assembles micro-batches of one packed split."""

    def __init__(self, packed: PackedSplit, masker: Masker, tokenizer: TokenizerInfo, max_seq_length: int):
        self.packed, self.masker = packed, masker
        self.tokenizer, self.max_seq_length = tokenizer, max_seq_length

    def collate(self, sequences: np.ndarray, places: np.ndarray) -> MicroBatch:
        """Assemble one micro-batch; see `collate_all`."""
        return self.collate_all(sequences, places, len(places))[0]

    def collate_all(
        self,
        sequences: np.ndarray,
        places: np.ndarray,
        micro_batch_size: int,
        mlm_probability: float | None = None,
    ) -> list[MicroBatch]:
        """Micro-batches of consecutive rows, made together and sharing memory: small ones cost no more than large ones.

        Args:
            sequences: (rows,) int64, which sequence fills each row; ignored in empty places.
            places: (rows,) int64, the rows' places, or their numbers from `copy_numbers`, which decide the masks;
                `EMPTY_PLACE` in the last rows if there are too few sequences. The number of rows is a multiple of the
                micro-batch size.
            mlm_probability: the share of tokens to mask, if not the masker's.
        """
        filled = int(np.count_nonzero(places != EMPTY_PLACE))
        tokenizer, shape = self.tokenizer, (len(places), self.max_seq_length)
        # Ids keep their type on disk until the end, so that only a quarter of the memory is moved.
        compact = np.full(shape, tokenizer.pad_token_id, dtype=token_type(tokenizer.vocab_size))
        compact[:, 0], compact[:, 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        rows = compact[:filled]
        lengths = np.full(len(places), 2)
        lengths[:filled] += self.packed.gather(sequences[:filled], rows)
        rows[np.arange(filled), lengths[:filled] - 1] = tokenizer.eos_token_id
        positions, labels = self.masker.mask(rows, places[:filled], mlm_probability)
        input_ids = torch.from_numpy(compact.astype(np.int64))
        columns = np.arange(self.max_seq_length, dtype=np.int32)
        is_token = torch.from_numpy(columns < lengths.astype(np.int32)[:, None])
        by_micro_batch = lengths.reshape(-1, micro_batch_size)
        has_padding = (by_micro_batch.min(axis=1) < self.max_seq_length).tolist()
        filled_rows = (filled - np.arange(0, len(places), micro_batch_size)).clip(0, micro_batch_size)
        tokens = np.where(np.arange(micro_batch_size) < filled_rows[:, None], by_micro_batch, 0).sum(axis=1)
        next_sentence: list[torch.Tensor] | list[None] = [None] * len(filled_rows)
        if self.packed.is_paired:
            all_labels = torch.from_numpy(self.packed.next_sentence_labels(sequences[:filled]))
            next_sentence = list(all_labels.split(filled_rows.tolist()))
        size = micro_batch_size * self.max_seq_length
        bounds = np.searchsorted(positions, np.arange(0, compact.size + 1, size)).tolist()
        return [
            MicroBatch(
                ids,
                mask if has_padding[number] else None,
                torch.from_numpy(positions[bounds[number] : bounds[number + 1]] - number * size),
                torch.from_numpy(labels[bounds[number] : bounds[number + 1]]),
                int(tokens[number]),
                int(filled_rows[number]),
                next_sentence[number],
            )
            for number, (ids, mask) in enumerate(
                zip(input_ids.split(micro_batch_size), is_token.split(micro_batch_size), strict=True)
            )
        ]


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


@dataclass(frozen=True)
class LoaderStage:
    """What the loader needs to know about a stage.

    Attributes:
        collator: collates the split, packed to the stage's length.
        order: the order of those sequences.
    """

    stage: Stage
    collator: Collator
    order: SampleOrder
    micro_batch_size: int


class TrainLoader:
    """A process's micro-batches of any step, each step prepared by a thread while the one before it trains.

    One thread is enough: collating is vectorised and far faster than training.

    Args:
        mlm_probability: the share of tokens to mask at a step, counted from 0; None for the masker's.
        masking_copies: the number of fixed masks per sequence; None: a sequence's place decides its mask.
    """

    def __init__(
        self,
        stages: Sequence[LoaderStage],
        rank: int = 0,
        world_size: int = 1,
        mlm_probability: Callable[[int], float] | None = None,
        masking_copies: int | None = None,
    ):
        self.stages = tuple(each.stage for each in stages)
        self._stages = tuple(stages)
        self.rank, self.world_size = rank, world_size
        self.mlm_probability, self.masking_copies = mlm_probability, masking_copies

    def stage(self, step: int) -> LoaderStage:
        """The stage of global batch `step`, counted from 0."""
        return self._stages[stage_number(self.stages, step)]

    def micro_batches(self, step: int, skipped: Sequence[SkippedPlaces] = ()) -> list[MicroBatch]:
        """The micro-batches of global batch `step`, counted from 0, in a run that skips `skipped`."""
        current = self.stage(step)
        stage, order = current.stage, current.order
        first = places_used(self.stages, stage.max_seq_length, step, skipped)
        places = order.lane_order(np.arange(first, first + stage.train_batch_size))
        own = np.concatenate(split_places(places, self.rank, self.world_size, current.micro_batch_size))
        sequences = order.sequences(own.clip(min=0))
        if self.masking_copies is not None:
            numbers = copy_numbers(sequences, order.epochs(own), self.masking_copies)
            own = np.where(own == EMPTY_PLACE, EMPTY_PLACE, numbers)
        share = None if self.mlm_probability is None else self.mlm_probability(step)
        return current.collator.collate_all(sequences, own, current.micro_batch_size, share)

    def steps(
        self, first_step: int, last_step: int, skipped: Sequence[SkippedPlaces] = ()
    ) -> Generator[list[MicroBatch], None, None]:
        """The micro-batches of steps `first_step` … `last_step - 1`, one step prepared ahead."""
        return prefetch(lambda step: self.micro_batches(step, skipped), first_step, last_step)


def prefetch(make: Callable[[int], list[MicroBatch]], first: int, last: int) -> Generator[list[MicroBatch], None, None]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as executor:
        upcoming: Future[list[MicroBatch]] | None = executor.submit(make, first) if first < last else None
        for number in range(first, last):
            assert upcoming is not None
            current = upcoming.result()
            upcoming = executor.submit(make, number + 1) if number + 1 < last else None
            yield current


def held_out_sequences(size: int, sequences: int) -> np.ndarray:
    """Which sequences of a split of `size` models are evaluated on, at most `sequences` of them: (B,) int64.

    They are always the same. A sequence's number is also the place that decides its masks.
    """
    return SampleOrder(size, _HELD_OUT_SEED).sequences(np.arange(min(size, sequences)))


class HeldOutSample:
    """A fixed sample of a split: every run has the same sequences and masks, on any number of processes.

    Args:
        collator: collates the held-out split, with `evaluation_masker`.
        sequences: the maximum number of sequences to use; a smaller split is used whole.
    """

    def __init__(self, collator: Collator, sequences: int, micro_batch_size: int, ranks: Ranks):
        self.collator, self.sequences, self._ranks = collator, sequences, ranks
        sample = held_out_sequences(len(collator.packed), sequences)
        self._parts = split_places(sample, ranks.rank, ranks.world_size, micro_batch_size)

    @property
    def micro_batches(self) -> int:
        """This process's micro-batches, as many as every other's."""
        return len(self._parts)

    def evaluate(
        self, model: Callable[[MicroBatch], dict[str, float]], stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], Counts] | None:
        """Evaluate a model on the sample; a collective call.

        Args:
            model: returns an objective's sums over a micro-batch.
            stop: called before each micro-batch; all ranks must get the same answer.

        Returns:
            The sums over the whole sample, and its counts; None if it was stopped.
        """
        sums: dict[str, float] = {}
        counts = []
        for part in self._parts:
            if stop():
                return None
            micro_batch = self.collator.collate(part, part)
            sums = {name: sums.get(name, 0.0) + value for name, value in model(micro_batch).items()}
            counts.append(micro_batch.counts)
        return self._ranks.sum_each(sums), Counts.total(counts, self._ranks)
