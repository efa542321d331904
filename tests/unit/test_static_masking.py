"""Static masking: a sequence has `copies` fixed masks, and its visit e has that of copy e mod `copies`."""

import numpy as np
import pytest
import torch

from ds_roberta.config import MASKING_UNITS, MaskingConfig, PackingConfig, Stage
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.masking import training_masker
from ds_roberta.data.mixture import sample_order
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.words import word_flags
from ds_roberta.errors import UserError

LENGTH, BATCH = 128, 100


@pytest.fixture(scope="module")
def make_loader(corpus, sourced):
    """A function that makes a loader of the held-out split's 60 sequences, or of the sources' training sequences."""

    def make(copies, unit="token", weights=None, rank=0, world_size=1, micro_batch=BATCH):
        data, split = (corpus, "validation") if weights is None else (sourced, "train")
        packing, tokenizer = PackingConfig(LENGTH), data.manifest.tokenizer
        build_index(data, split, packing)
        packed = open_index(data, split, packing)
        words = word_flags(data.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
        masker = training_masker(MaskingConfig(unit=unit), tokenizer, 5, words)
        order = sample_order(packed, weights, 5)
        stage = LoaderStage(Stage(0, LENGTH, BATCH), Collator(packed, masker, tokenizer, LENGTH), order, micro_batch)
        return TrainLoader([stage], rank, world_size, masking_copies=copies)

    return make


def visits(loader, steps):
    """Of each sequence its masks (inputs and masked positions), in the order of its visits."""
    found, order = {}, loader.stage(0).order
    for step in range(steps):
        places = order.lane_order(np.arange(step * BATCH, (step + 1) * BATCH))
        (micro_batch,) = loader.micro_batches(step)
        masked = torch.zeros(micro_batch.input_ids.numel(), dtype=torch.bool)
        masked[micro_batch.masked_positions] = True
        rows = torch.cat([micro_batch.input_ids, masked.view(BATCH, LENGTH).long()], dim=1).numpy()
        epochs = order.epochs(places).tolist()
        for sequence, epoch, row in zip(order.sequences(places).tolist(), epochs, rows, strict=True):
            found.setdefault(sequence, {})[epoch] = row.tobytes()
    return {sequence: [masks[epoch] for epoch in sorted(masks)] for sequence, masks in found.items()}


@pytest.mark.parametrize("unit", MASKING_UNITS)
def test_a_visit_has_the_mask_of_its_number_modulo_the_copies(make_loader, unit):
    copies = 3
    by_sequence = visits(make_loader(copies, unit), steps=6)
    for masks in by_sequence.values():
        assert len(masks) > 2 * copies
        assert all(mask == masks[number % copies] for number, mask in enumerate(masks))
    assert sum(len(set(masks)) == copies for masks in by_sequence.values()) > 0.9 * len(by_sequence)


def test_dynamic_masks_never_come_again(make_loader):
    by_sequence = visits(make_loader(None), steps=6)
    assert sum(len(set(masks)) == len(masks) for masks in by_sequence.values()) > 0.9 * len(by_sequence)


def test_copies_follow_the_epochs_of_each_source(make_loader):
    loader = make_loader(2, weights={"wiki": 1, "books": 1, "web": 1})
    by_sequence = visits(loader, steps=9)
    masks = max(by_sequence.values(), key=len)
    assert len(masks) > 10  # web has one sequence or two, so its epochs go by while the others' first one lasts
    assert masks == [masks[number % 2] for number in range(len(masks))]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 50), (3, 7)])
def test_static_masks_are_the_same_on_any_number_of_processes(make_loader, world_size, micro_batch):
    def rows(loaders):
        parts = [part for loader in loaders for part in loader.micro_batches(4)]
        return sorted(row.numpy().tobytes() for part in parts for row in part.input_ids[: part.sequences])

    several = [make_loader(10, rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)]
    assert rows(several) == rows([make_loader(10)])


def test_copies_are_a_positive_number_and_their_share_is_fixed():
    with pytest.raises(UserError, match="--masking_copies must be a positive whole number, got 0"):
        MaskingConfig(copies=0)
    with pytest.raises(UserError, match="--mlm_probability_end moves their share: remove one"):
        MaskingConfig(copies=10, mlm_probability_end=0.2)
