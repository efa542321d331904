"""4,096 ranks, computed rather than run: each rank's part is a pure function, so that it can be compared with the
batch of one process."""

import numpy as np
import pytest
import torch

from ds_roberta.config import MaskingConfig, PackingConfig, Stage
from ds_roberta.data.global_batch import EMPTY_PLACE, split_places
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.masking import training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.training.micro_batch import BatchPlan

WORLD_SIZE, LENGTH, LATE_STEP = 4_096, 16, 450_000


@pytest.fixture(scope="module")
def collator(corpus):
    build_index(corpus, "train", PackingConfig(LENGTH))
    packed, tokenizer = open_index(corpus, "train", PackingConfig(LENGTH)), corpus.manifest.tokenizer
    return Collator(packed, training_masker(MaskingConfig(), tokenizer, 5), tokenizer, LENGTH)


def loader(collator, batch, micro_batch, rank=0, world_size=1):
    order = SampleOrder(len(collator.packed), 5)
    return TrainLoader([LoaderStage(Stage(0, LENGTH, batch), collator, order, micro_batch)], rank, world_size)


def rows(micro_batches):
    """Inputs, padding and labels of the rows that hold a sequence, in their order: (rows, 3 T) int64."""
    found = []
    for each in micro_batches:
        labels = torch.full(each.input_ids.shape, -100)
        labels.view(-1)[each.masked_positions] = each.labels
        mask = torch.ones_like(labels) if each.attention_mask is None else each.attention_mask.long()
        found.append(torch.cat([each.input_ids, mask, labels], dim=1)[: each.sequences])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("batch", [5_000, 8_192])
def test_the_union_of_all_ranks_is_the_batch_of_one_process(collator, batch):
    """All ranks' places are the batch's, and those of some ranks, of all sizes, are filled as in the one process."""
    plan = BatchPlan.fit(batch, 64, WORLD_SIZE)
    parts = [split_places(np.arange(batch), rank, WORLD_SIZE, plan.micro_batch_size) for rank in range(WORLD_SIZE)]
    assert {len(part) for part in parts} == {plan.accumulation_steps}
    places = np.concatenate([place for part in parts for place in part])
    # Ranks take consecutive parts, so that not even the order differs.
    assert np.array_equal(places[places != EMPTY_PLACE], np.arange(batch))
    assert np.count_nonzero(places == EMPTY_PLACE) == plan.empty_places
    (whole,) = loader(collator, batch, batch).micro_batches(LATE_STEP)
    expected = rows([whole])
    for rank in (*range(0, WORLD_SIZE, 17), WORLD_SIZE - 1):
        micro_batches = loader(collator, batch, plan.micro_batch_size, rank, WORLD_SIZE).micro_batches(LATE_STEP)
        filled = [part[part != EMPTY_PLACE] for part in parts[rank]]
        assert [each.sequences for each in micro_batches] == [len(part) for part in filled]
        assert {len(each.input_ids) for each in micro_batches} == {plan.micro_batch_size}
        assert np.array_equal(rows(micro_batches), expected[np.concatenate(filled)])


def test_a_rank_computes_its_own_rows_alone_at_any_step(collator, monkeypatch):
    asked = []
    sequences = SampleOrder.sequences
    monkeypatch.setattr(
        SampleOrder, "sequences", lambda order, places: asked.append(places) or sequences(order, places)
    )
    for step in (0, LATE_STEP):
        loader(collator, 8_192, 2, 4_000, WORLD_SIZE).micro_batches(step)
    assert [len(places) for places in asked] == [2, 2]
