"""The micro-batches of a training step, found by the step's number, and of the held-out sample.

A micro-batch has a fixed number of rows with padding, or no padding: then it has as many whole sequences as fit into
the tokens of so many full rows, in a flat layout; on a CPU, full sequences are rows.

Shapes: B sequences of a micro-batch, T tokens per sequence, N tokens of all sequences, M labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ds_roberta.config import Stage
from ds_roberta.data.global_batch import EMPTY_PLACE, split_places, step_places
from ds_roberta.data.layout import FlatLayout
from ds_roberta.data.masking import Masker, copy_numbers
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import PackedSplit
from ds_roberta.data.stages import SkippedPlaces, stage_number
from ds_roberta.data.tokenizer import TokenizerInfo, token_type
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError

_HELD_OUT_SEED = 0


class Counts(NamedTuple):
    """The numbers of labels, non-padding tokens and sequences in a micro-batch or a whole batch."""

    labels: float
    tokens: float
    sequences: float

    @classmethod
    def sum(cls, counts: Iterable[Counts], ranks: Ranks) -> Counts:
        """The sum over all processes; a collective call."""
        return cls(*ranks.sum(*map(sum, zip(*counts, strict=True))))

    @classmethod
    def total(cls, counts: Iterable[Counts], ranks: Ranks) -> Counts:
        """As `sum`, of a batch to train on; a collective call.

        A batch of a few very short sequences may have no label: the count is then 1, so that loss and gradient are 0.
        """
        summed = cls.sum(counts, ranks)
        return summed._replace(labels=max(summed.labels, 1))


@dataclass(frozen=True)
class MicroBatch:
    """The model's inputs and labels for one micro-batch.

    Attributes:
        input_ids: (B, T) int64, with masked tokens replaced; in a flat layout (N,).
        attention_mask: (B, T) bool, true at tokens and false at padding; None if there is none.
        masked_positions: (M,) int64, positions of the labelled tokens in the flattened ids.
        labels: (M,) int64, from the masker: the tokens' true ids, or whether each was replaced.
        tokens: number of tokens that are not padding.
        sequences: number of sequences, without empty places.
        next_sentence_labels: (sequences,) int64 for pairs, see `PackedSplit.next_sentence_labels`; else None.
        layout: where the sequences are among the N tokens; None if each is a row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    masked_positions: torch.Tensor
    labels: torch.Tensor
    tokens: int
    sequences: int
    next_sentence_labels: torch.Tensor | None = None
    layout: FlatLayout | None = None

    @property
    def first_tokens(self) -> torch.Tensor:
        """The flat positions of the sequences' `<s>`, those of empty places last: (B,) int64."""
        if self.layout is not None:
            return self.layout.first_tokens
        return torch.arange(0, self.input_ids.numel(), self.input_ids.shape[1], device=self.input_ids.device)

    @property
    def counts(self) -> Counts:
        return Counts(len(self.labels), self.tokens, self.sequences)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the micro-batch to `device`; the CPU does not wait for copies to a GPU."""
        if device.type == "cpu":
            return self

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        moved: dict[str, Any] = {
            name: copy(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved, layout=self.layout and self.layout.to(copy))


class Collator:
    """Assembles micro-batches of one packed split.

    Args:
        padded: whether sequences are filled up to `max_seq_length` tokens.
        within_documents: without padding, whether tokens see only their own document; `<s>` is the first one's.
        on_gpu: without padding, whether all micro-batches have the same shapes, and are for a GPU.
    """

    def __init__(
        self,
        packed: PackedSplit,
        masker: Masker,
        tokenizer: TokenizerInfo,
        max_seq_length: int,
        *,
        padded: bool = True,
        within_documents: bool = False,
        on_gpu: bool = False,
    ):
        self.packed, self.masker = packed, masker
        self.tokenizer, self.max_seq_length = tokenizer, max_seq_length
        self.padded, self.within_documents, self.on_gpu = padded, within_documents, on_gpu

    def collate(self, sequences: np.ndarray, places: np.ndarray) -> MicroBatch:
        """Assemble one micro-batch; see `collate_all`."""
        return self.collate_all(sequences, places, len(places))[0]

    def nothing(self, micro_batch_size: int) -> MicroBatch:
        """A micro-batch of empty places."""
        return self.collate(np.zeros(micro_batch_size, dtype=np.int64), np.full(micro_batch_size, EMPTY_PLACE))

    def collate_all(
        self,
        sequences: np.ndarray,
        places: np.ndarray,
        micro_batch_size: int,
        mlm_probability: float | None = None,
    ) -> list[MicroBatch]:
        """Micro-batches of consecutive places, made together, so that small ones cost no more than large ones.

        Args:
            sequences: (rows,) int64, which sequence is at each place; ignored at empty places.
            places: (rows,) int64, the places, or their numbers from `copy_numbers`, which decide the masks;
                `EMPTY_PLACE` at the end if there are too few sequences. With padding, the number of rows is a multiple
                of the micro-batch size.
            micro_batch_size: the rows of a micro-batch; without padding, it has at most that many times
                `max_seq_length` tokens, and empty places are left out unless there are no others.
            mlm_probability: the share of tokens to mask, if not the masker's.
        """
        filled = int(np.count_nonzero(places != EMPTY_PLACE))
        lengths = np.full(len(places), 2)
        lengths[:filled] += self.packed.lengths(sequences[:filled])
        if self.padded:
            bounds = np.arange(0, len(places) + 1, micro_batch_size)
        else:
            lengths = lengths[: max(filled, 1)]
            bounds = fill(lengths, micro_batch_size * self.max_seq_length)
            numbers = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
            order = np.lexsort((-lengths, numbers))  # neighbours are alike, so that they need little padding together
            sequences, places, lengths = sequences[order], places[order], lengths[order]
        sequences = sequences[:filled]
        rows, positions, labels = self._masked_rows(sequences, places[:filled], lengths, mlm_probability)
        starts = np.arange(0, rows.size + 1, self.max_seq_length)
        is_token = np.arange(self.max_seq_length, dtype=np.int32) < lengths.astype(np.int32)[:, None]
        if not self.padded:
            flat_starts = np.append(0, np.cumsum(lengths))
            positions = positions + (flat_starts - starts)[positions // self.max_seq_length]
            rows, starts = rows[is_token], flat_starts
        input_ids = torch.from_numpy(rows.astype(np.int64).reshape(-1))
        labelled = np.searchsorted(positions, starts[bounds]).tolist()
        pairs = torch.from_numpy(self.packed.next_sentence_labels(sequences)) if self.packed.is_paired else None

        def micro_batch(number: int, first: int, last: int) -> MicroBatch:
            """The one of rows `first` … `last - 1`."""
            ids, mask, layout = input_ids[starts[first] : starts[last]], None, None
            is_full = int(lengths[first:last].min()) == self.max_seq_length
            if self.padded or (is_full and not self.within_documents and not self.on_gpu):
                ids = ids.view(-1, self.max_seq_length)
                mask = None if is_full else torch.from_numpy(is_token[first:last])
            else:
                layout = self._layout(lengths[first:last], ids, micro_batch_size)
                ids = F.pad(ids, (0, len(layout.position_ids) - layout.tokens), value=self.tokenizer.pad_token_id)
            chosen, end = slice(*labelled[number : number + 2]), max(first, min(last, filled))
            return MicroBatch(
                input_ids=ids,
                attention_mask=mask,
                masked_positions=torch.from_numpy(positions[chosen] - starts[first]),
                labels=torch.from_numpy(labels[chosen]),
                tokens=int(lengths[first:end].sum()),
                sequences=end - first,
                next_sentence_labels=None if pairs is None else pairs[first:end],
                layout=layout,
            )

        return [micro_batch(number, *own) for number, own in enumerate(pairwise(bounds.tolist()))]

    def _layout(self, lengths: np.ndarray, ids: torch.Tensor, micro_batch_size: int) -> FlatLayout:
        documents = None
        if self.within_documents:  # masking leaves the `</s>` that ends each
            ends = np.flatnonzero(ids.numpy() == self.tokenizer.eos_token_id) + 1
            documents = np.diff(ends, prepend=0)
        if not self.on_gpu:
            return FlatLayout.of_lengths(lengths, documents)
        tokens = micro_batch_size * self.max_seq_length
        return FlatLayout.of_shape(lengths, documents, tokens, self.max_seq_length)

    def _masked_rows(
        self, sequences: np.ndarray, places: np.ndarray, lengths: np.ndarray, mlm_probability: float | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Framed, padded and masked sequences, then empty rows up to the number of lengths, and what `mask` returns."""
        tokenizer, shape = self.tokenizer, (len(lengths), self.max_seq_length)
        # Ids keep their type on disk until the end, so that only a quarter of the memory is moved.
        rows = np.full(shape, tokenizer.pad_token_id, dtype=token_type(tokenizer.vocab_size))
        rows[:, 0] = tokenizer.bos_token_id
        rows[np.arange(len(lengths)), lengths - 1] = tokenizer.eos_token_id
        self.packed.gather(sequences, rows[: len(sequences)])
        return rows, *self.masker.mask(rows[: len(sequences)], places, mlm_probability)


def fill(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Divide sequences into parts of consecutive ones with at most `capacity` tokens each.

    Args:
        lengths: (S,) int64, none above the capacity.

    Returns:
        The number of each part's first sequence, and last S: (parts + 1,) int64.
    """
    ends, bounds = np.cumsum(lengths), [0]
    while bounds[-1] < len(lengths):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return np.array(bounds)


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
        order = current.order
        places = step_places(order, self.stages, step, skipped)
        own = np.concatenate(split_places(places, self.rank, self.world_size, current.micro_batch_size))
        sequences = order.sequences(own.clip(min=0))
        if self.masking_copies is not None:
            numbers = copy_numbers(sequences, order.epochs(own), self.masking_copies)
            own = np.where(own == EMPTY_PLACE, EMPTY_PLACE, numbers)
        share = None if self.mlm_probability is None else self.mlm_probability(step)
        return current.collator.collate_all(sequences, own, current.micro_batch_size, share)

    def level(self, step: int, micro_batches: list[MicroBatch], ranks: Ranks) -> list[MicroBatch]:
        """Micro-batches of a step, and empty ones up to the number of the process with most; a collective call."""
        missing, stage = ranks.max(len(micro_batches)) - len(micro_batches), self.stage(step)
        return micro_batches + [stage.collator.nothing(stage.micro_batch_size) for _ in range(missing)]

    def steps(
        self, first_step: int, last_step: int, skipped: Sequence[SkippedPlaces] = ()
    ) -> Generator[list[MicroBatch], None, None]:
        """The micro-batches of steps `first_step` … `last_step - 1`, one step prepared ahead."""
        return prefetch(lambda step: self.micro_batches(step, skipped), first_step, last_step)


def prefetch(make: Callable[[int], list[MicroBatch]], first: int, last: int) -> Generator[list[MicroBatch], None, None]:
    """What `make` returns for `first` … `last - 1`, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as executor:
        upcoming: Future[list[MicroBatch]] | None = executor.submit(make, first) if first < last else None
        for number in range(first, last):
            assert upcoming is not None
            current = upcoming.result()
            upcoming = executor.submit(make, number + 1) if number + 1 < last else None
            yield current


def held_out_sequences(size: int, sequences: int) -> np.ndarray:
    """The sequences, of a split of `size`, that models are evaluated on, at most `sequences`: (B,) int64.

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

        Raises:
            UserError: no token is masked.
        """
        sums: dict[str, float] = {}
        counts = []
        for part in self._parts:
            if stop():
                return None
            micro_batch = self.collator.collate(part, part)
            sums = {name: sums.get(name, 0.0) + value for name, value in model(micro_batch).items()}
            counts.append(micro_batch.counts)
        total = Counts.sum(counts, self._ranks)
        if not total.labels:
            raise UserError(
                "no token of the held-out sequences is masked, so there is no held-out loss: raise the share of masks "
                "or --eval_sequences, or hold out more text"
            )
        return self._ranks.sum_each(sums), total
