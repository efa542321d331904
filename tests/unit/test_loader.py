from collections import Counter

import numpy as np
import pytest
import torch
from shared_fixtures import LENGTH, same

from ds_roberta.config import MASKING_UNITS, MaskingConfig, PackingConfig, Stage
from ds_roberta.data.global_batch import EMPTY_PLACE, split_places
from ds_roberta.data.loader import Collator, LoaderStage, MicroBatch, TrainLoader, prefetch
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.masking import training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.stages import SkippedPlaces, make_stages
from ds_roberta.data.words import word_flags
from ds_roberta.training.micro_batch import BatchPlan


@pytest.fixture(scope="module")
def loader(collator, packed):
    def make(batch, micro_batch, rank=0, world_size=1):
        stage = LoaderStage(Stage(0, LENGTH, batch), collator, SampleOrder(len(packed), 5), micro_batch)
        return TrainLoader([stage], rank, world_size)

    return make


def rows(micro_batch):
    """Every row that holds a sequence, as bytes: its inputs, its padding and its labels (-100 where there is none)."""
    labels = torch.full(micro_batch.input_ids.shape, -100)
    labels.view(-1)[micro_batch.masked_positions] = micro_batch.labels
    mask = micro_batch.attention_mask
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    together = torch.cat([micro_batch.input_ids, mask.long(), labels], dim=1).numpy()
    return [row.tobytes() for row in together[: micro_batch.sequences]]


def true_ids(micro_batch):
    """The rows that hold a sequence, with the true ids put back from the labels, as bytes."""
    ids = micro_batch.input_ids.clone()
    ids.view(-1)[micro_batch.masked_positions] = micro_batch.labels
    return [row.tobytes() for row in ids[: micro_batch.sequences].numpy()]


@pytest.mark.parametrize("batch", [1, 6, 100])
@pytest.mark.parametrize("unit", MASKING_UNITS)
def test_a_global_batch_is_the_same_on_any_number_of_processes(corpus, packed, batch, unit):
    tokenizer, step = corpus.manifest.tokenizer, 7
    masker = training_masker(
        MaskingConfig(unit=unit), tokenizer, 5, word_flags(corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
    )
    collator, order = Collator(packed, masker, tokenizer, LENGTH), SampleOrder(len(packed), 5)

    def loader(batch, micro_batch, rank=0, world_size=1):
        stage = LoaderStage(Stage(0, LENGTH, batch), collator, order, micro_batch)
        return TrainLoader([stage], rank, world_size, mlm_probability=lambda step: 0.04 * step)

    expected = Counter(row for part in loader(batch, batch).micro_batches(step) for row in rows(part))
    assert expected.total() == batch
    for world_size in (1, 2, 3, 4, 8):
        for micro_batch in (1, 4, 7, 64):
            parts = [loader(batch, micro_batch, rank, world_size).micro_batches(step) for rank in range(world_size)]
            assert len({len(part) for part in parts}) == 1
            assert {len(each.input_ids) for part in parts for each in part} == {micro_batch}
            assert Counter(row for part in parts for each in part for row in rows(each)) == expected


def test_8192_sequences_on_3_processes_leave_the_last_places_empty(loader):
    plan = BatchPlan.fit(8192, 64, 3)
    expected = Counter(row for part in loader(8192, 512).micro_batches(2) for row in rows(part))
    found, empty = Counter(), 0
    for rank in range(3):
        parts = loader(8192, plan.micro_batch_size, rank, 3).micro_batches(2)
        assert len(parts) == plan.accumulation_steps
        assert all(part.sequences == plan.micro_batch_size for part in parts[:-1])
        for part in parts:
            found.update(rows(part))
            padding = part.input_ids[part.sequences :]
            empty += len(padding)
            assert (padding[:, :2] == torch.tensor([0, 2])).all()
            assert (padding[:, 2:] == 1).all()
            assert (part.masked_positions < part.sequences * LENGTH).all()
    assert found == expected
    assert found.total() == 8192
    assert empty == plan.empty_places > 0


def test_an_epoch_shows_every_sequence_once_and_the_next_goes_on(loader, packed):
    batch, total = 96, 2 * len(packed)
    assert total % batch  # the last batch reaches into a third epoch
    stream = loader(batch, batch)
    batches = [Counter(true_ids(stream.micro_batches(step)[0])) for step in range(-(-total // batch))]
    sequences = np.arange(len(packed))
    corpus = Counter(true_ids(stream.stage(0).collator.collate(sequences, sequences)))
    assert len(corpus) > 0.99 * len(packed)

    assert sum(batches[: len(packed) // batch], Counter()) <= corpus
    third_epoch = sum(batches, Counter())
    third_epoch.subtract(corpus)
    third_epoch.subtract(corpus)
    assert min(third_epoch.values()) == 0
    assert third_epoch <= corpus
    assert third_epoch.total() == -total % batch


def test_the_share_to_mask_is_that_of_the_step(collator, packed):
    order = SampleOrder(len(packed), 5)
    stage = LoaderStage(Stage(0, LENGTH, 1000), collator, order, 100)
    loader = TrainLoader([stage], mlm_probability=lambda step: 0.1 * step)
    masked, tokens = [], []
    for step in (1, 4):
        micro_batches = loader.micro_batches(step)
        masked.append(sum(len(each.labels) for each in micro_batches))
        tokens.append(sum(each.tokens for each in micro_batches))
    assert masked[1] / tokens[1] == pytest.approx(4 * masked[0] / tokens[0], rel=0.02)


@pytest.fixture(scope="module")
def staged_loader(corpus):
    """A loader of a run whose length and batch size change, each twice."""
    tokenizer, data = corpus.manifest.tokenizer, {}
    masker = training_masker(MaskingConfig(), tokenizer, 5)
    for length in (16, LENGTH):
        build_index(corpus, "train", PackingConfig(length))
        packed = open_index(corpus, "train", PackingConfig(length))
        data[length] = Collator(packed, masker, tokenizer, length), SampleOrder(len(packed), 5)

    def make(micro_batch, rank=0, world_size=1):
        stages = make_stages(LENGTH, 100, "0:16,3:32,5:16,6:32", "0:25,2:50,5:100")
        loader_stages = [LoaderStage(stage, *data[stage.max_seq_length], micro_batch) for stage in stages]
        return TrainLoader(loader_stages, rank, world_size)

    return make


@pytest.mark.parametrize("skipped", [[], [SkippedPlaces(2, 16, 50, 150), SkippedPlaces(4, 32, 0, 70)]])
def test_the_batches_of_stages_are_the_same_on_any_number_of_processes(staged_loader, skipped):
    for step, (length, batch) in enumerate([(16, 25), (16, 25), (16, 50), (32, 50), (32, 50), (16, 100), (32, 100)]):
        (expected,) = (rows(each) for each in staged_loader(batch).micro_batches(step, skipped))
        assert len(expected) == batch
        for world_size, micro_batch in ((1, 7), (2, 64), (3, 4)):
            parts = [staged_loader(micro_batch, rank, world_size) for rank in range(world_size)]
            found = [each for part in parts for each in part.micro_batches(step, skipped)]
            assert {each.input_ids.shape for each in found} == {(micro_batch, length)}
            assert Counter(row for each in found for row in rows(each)) == Counter(expected)


def test_a_length_goes_on_in_its_order_where_it_was_left(staged_loader):
    for length, steps in ((16, [0, 1, 2, 5]), (LENGTH, [3, 4, 6, 7])):
        stream = staged_loader(1000)
        found = [row for step in steps for each in stream.micro_batches(step) for row in true_ids(each)]
        current = stream.stage(steps[0])
        sequences = current.order.sequences(np.arange(len(found)))
        expected = current.collator.collate(sequences, np.arange(len(found)))
        assert len(found) == 200 if length == 16 else 300
        assert Counter(found) == Counter(true_ids(expected))


def test_the_stream_of_stages_from_any_step_is_the_tail_of_the_whole(staged_loader):
    skipped = [SkippedPlaces(4, 32, 50, 120)]
    whole = list(staged_loader(16, 1, 2).steps(0, 8, skipped))
    for first in (3, 5, 6):
        tail = list(staged_loader(16, 1, 2).steps(first, 8, skipped))
        for expected, found in zip(whole[first:], tail, strict=True):
            assert all(same(one, other) for one, other in zip(expected, found, strict=True))


def test_epochs_mask_the_same_sequence_differently(collator, packed):
    lengths = packed.lengths(np.arange(500))
    sequences = np.flatnonzero(lengths > LENGTH / 2)
    first, second = (collator.collate(sequences, sequences + epoch * len(packed)) for epoch in (0, 1))
    assert true_ids(first) == true_ids(second)
    assert len(set(rows(first)) & set(rows(second))) <= 3  # of 300; two or three labels may fall alike


def test_rows_are_framed_and_padded(collator, packed):
    sequences = np.arange(400)
    micro_batch = collator.collate(sequences, sequences)
    slices = np.zeros((400, LENGTH), dtype=np.int64)
    lengths = packed.lengths(sequences)
    packed.gather(sequences, slices)
    ids = np.stack([np.frombuffer(row, dtype=np.int64) for row in true_ids(micro_batch)])
    for row, mask, expected, length in zip(ids, micro_batch.attention_mask.numpy(), slices, lengths, strict=True):
        assert row[0] == 0
        assert row[1 : length + 1].tolist() == expected[1 : length + 1].tolist()
        assert row[length + 1] == 2
        assert (row[length + 2 :] == 1).all()
        assert mask.tolist() == [True] * (length + 2) + [False] * (LENGTH - length - 2)
    assert len(set(lengths.tolist())) > 5
    assert micro_batch.tokens == lengths.sum() + 2 * 400
    assert micro_batch.sequences == 400


def test_full_rows_have_no_attention_mask(collator, packed):
    lengths = packed.lengths(np.arange(len(packed)))
    full, short = np.flatnonzero(lengths == LENGTH - 2)[:5], np.flatnonzero(lengths < LENGTH - 2)[:1]
    assert collator.collate(full, full).attention_mask is None
    mixed = np.concatenate([full, short])
    assert collator.collate(mixed, mixed).attention_mask is not None


def test_a_micro_batch_of_empty_places_has_no_labels_and_no_weight(collator):
    nothing = np.full(3, EMPTY_PLACE)
    micro_batch = collator.collate(np.zeros(3, dtype=np.int64), nothing)
    assert micro_batch.input_ids.tolist() == [[0, 2] + [1] * (LENGTH - 2)] * 3
    assert micro_batch.attention_mask.sum(dim=1).tolist() == [2, 2, 2]
    assert (len(micro_batch.labels), micro_batch.tokens, micro_batch.sequences) == (0, 0, 0)


@pytest.mark.parametrize(("total", "world_size", "micro_batch"), [(10, 3, 2), (2, 4, 3), (8192, 7, 33), (5, 1, 8)])
def test_places_are_dealt_out_evenly(total, world_size, micro_batch):
    places = np.arange(100, 100 + total)
    parts = [split_places(places, rank, world_size, micro_batch) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    dealt = [np.concatenate(part) for part in parts]
    counts = [int((each != EMPTY_PLACE).sum()) for each in dealt]
    assert max(counts) - min(counts) <= 1
    assert [place for each in dealt for place in each[each != EMPTY_PLACE]] == places.tolist()
    for each, count in zip(dealt, counts, strict=True):
        assert (each[count:] == EMPTY_PLACE).all()


def test_the_stream_from_any_step_is_the_tail_of_the_whole(loader):
    whole = list(loader(40, 16, 1, 2).steps(0, 6))
    tail = list(loader(40, 16, 1, 2).steps(4, 6))
    assert len(whole) == 6
    for expected, found in zip(whole[4:], tail, strict=True):
        assert all(same(one, other) for one, other in zip(expected, found, strict=True))


def test_moving_to_the_cpu_copies_nothing(collator):
    micro_batch = collator.collate(np.arange(2), np.arange(2))
    assert micro_batch.to(torch.device("cpu")) is micro_batch


def test_prefetching_yields_every_step_in_order_and_makes_each_once():
    made = []

    def make(step):
        made.append(step)
        return [step]

    assert list(prefetch(make, 3, 9)) == [[step] for step in range(3, 9)]
    assert made == list(range(3, 9))
    assert list(prefetch(make, 9, 9)) == []
    assert made == list(range(3, 9))


def test_prefetching_is_one_step_ahead_and_ends_with_its_reader():
    made = []
    steps = prefetch(lambda step: made.append(step) or [], 0, 100)
    next(steps)
    next(steps)
    steps.close()  # waits for what is under way
    assert made == [0, 1, 2]


def test_an_error_while_prefetching_reaches_the_reader():
    def make(step):
        if step == 2:
            raise OSError("the disk is gone")
        return []

    steps = prefetch(make, 0, 5)
    next(steps)
    next(steps)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def test_micro_batches_hold_what_the_model_takes(loader):
    (micro_batch,) = loader(4, 4).micro_batches(0)
    assert isinstance(micro_batch, MicroBatch)
    assert micro_batch.input_ids.dtype == micro_batch.masked_positions.dtype == micro_batch.labels.dtype == torch.int64
    assert micro_batch.attention_mask is None or micro_batch.attention_mask.dtype == torch.bool
