"""Micro-batches without padding: the same sequences and masks as with it."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from shared_fixtures import LENGTH, same

from ds_roberta.config import MaskingConfig, PackingConfig, Stage
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.masking import training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index


def sequences_of(micro_batches, padded):
    """Every sequence's ids and labels (-100 where there is none), as bytes."""
    found = []
    for each in micro_batches:
        ids = each.input_ids.flatten()
        labels = torch.full_like(ids, -100)
        labels[each.masked_positions] = each.labels
        lengths = np.diff([*each.first_tokens.tolist(), len(ids) if each.layout is None else each.layout.tokens])
        rows = torch.stack([ids, labels])[:, : lengths.sum()].split(lengths.tolist(), dim=1)
        for row in rows[: each.sequences]:
            own = row[:, row[0] != 1] if padded else row
            assert (row[0] != 1).all() or padded
            found.append(own.contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize("batch", [1, 6, 100])
def test_without_padding_a_batch_has_the_same_sequences_and_masks(corpus, packed, batch):
    tokenizer, order, step = corpus.manifest.tokenizer, SampleOrder(len(packed), 5), 7
    masker = training_masker(MaskingConfig(), tokenizer, 5)

    def parts(padded, micro_batch, rank=0, world_size=1):
        collator = Collator(packed, masker, tokenizer, LENGTH, padded=padded)
        stage = LoaderStage(Stage(0, LENGTH, batch), collator, order, micro_batch)
        return TrainLoader([stage], rank, world_size).micro_batches(step)

    expected = parts(True, batch)
    tokens, sequences = expected[0].tokens, Counter(sequences_of(expected, True))
    for world_size in (1, 2, 3, 8):
        for micro_batch in (1, 4, 7, 64):
            found = [parts(False, micro_batch, rank, world_size) for rank in range(world_size)]
            assert Counter(row for own in found for row in sequences_of(own, False)) == sequences
            assert sum(each.tokens for own in found for each in own) == tokens
            for own, rank in zip(found, range(world_size), strict=True):
                assert len(own) <= len(parts(True, micro_batch, rank, world_size))
                for each, following in pairwise(own):  # another sequence would not have fitted
                    assert each.tokens <= micro_batch * LENGTH < each.tokens + following.tokens


def test_full_sequences_without_padding_are_rows(collator, packed, corpus):
    full = np.flatnonzero(packed.lengths(np.arange(len(packed))) == LENGTH - 2)[:5]
    without = Collator(packed, collator.masker, collator.tokenizer, LENGTH, padded=False).collate(full, full)
    assert same(without, collator.collate(full, full))


def test_processes_without_padding_have_equally_many_micro_batches(collator, packed, on_ranks):
    without = Collator(packed, collator.masker, collator.tokenizer, LENGTH, padded=False)
    stage = LoaderStage(Stage(0, LENGTH, 7), without, SampleOrder(len(packed), 5), 1)

    def numbers(ranks):
        loader = TrainLoader([stage], ranks.rank, ranks.world_size)
        own = loader.micro_batches(3)
        level = loader.level(3, own, ranks)
        assert [each is other for each, other in zip(own, level, strict=False)] == [True] * len(own)
        for empty in level[len(own) :]:
            assert (len(empty.labels), empty.tokens, empty.sequences) == (0, 0, 0)
            assert empty.input_ids[empty.layout.tokens - 2 :][:2].tolist() == [0, 2]
        return len(own), len(level)

    found = on_ranks(3, numbers)
    assert len({level for _, level in found}) == 1
    assert len({own for own, _ in found}) == 2


@pytest.mark.parametrize("packing", ["full-sentences", "contiguous"])
def test_documents_alone_are_the_parts_between_separators(corpus, packing):
    build_index(corpus, "train", PackingConfig(LENGTH, packing))
    packed, tokenizer = open_index(corpus, "train", PackingConfig(LENGTH, packing)), corpus.manifest.tokenizer
    masker = training_masker(MaskingConfig(mlm_probability=0.9), tokenizer, 5)
    collator = Collator(packed, masker, tokenizer, LENGTH, padded=False, within_documents=True)
    batch = collator.collate(np.arange(40), np.arange(40))
    rows = np.zeros((40, LENGTH), dtype=np.int64)
    packed.gather(np.arange(40), rows)
    lengths, expected = packed.lengths(np.arange(40)), []
    for row, length in zip(rows, lengths, strict=True):
        ends = [0, *(np.flatnonzero(row[1 : 1 + length] == 2) + 2).tolist(), length + 2]
        expected += np.diff(ends).tolist()
    assert len(expected) > 40
    found = [int(number) for block in batch.layout.blocks for number in block.is_token.sum(1)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("within_documents", [False, True])
def test_a_gpus_micro_batches_without_padding_have_one_shape_and_the_same_sequences(
    collator, packed, on_ranks, within_documents
):
    def parts(on_gpu, rank=0, world_size=1):
        shape = {"padded": False, "within_documents": within_documents, "on_gpu": on_gpu}
        without = Collator(packed, collator.masker, collator.tokenizer, LENGTH, **shape)
        stage = LoaderStage(Stage(0, LENGTH, 100), without, SampleOrder(len(packed), 5), 8)
        return TrainLoader([stage], rank, world_size)

    for step in range(4):
        expected, found = (parts(on_gpu).micro_batches(step) for on_gpu in (False, True))
        assert [sequences_of([each], False) for each in found] == [sequences_of([each], False) for each in expected]
        for each in found:
            bounds = each.layout.cu_seqlens.tolist()
            assert len(each.input_ids) == len(each.layout.position_ids) == bounds[-1] == 8 * LENGTH
            assert all(0 <= end - first <= LENGTH for first, end in pairwise(bounds))
            ends = each.input_ids[np.array(bounds[1 : 1 + each.sequences]) - 1]
            assert (ends == 2).all()
            assert set(each.layout.first_tokens.tolist()) <= set(bounds)

    def level(ranks):
        loader = parts(True, ranks.rank, ranks.world_size)
        return loader.level(5, loader.micro_batches(5), ranks)

    found = on_ranks(3, level)
    assert len({len(own) for own in found}) == 1
    assert {each.input_ids.shape for own in found for each in own} == {(8 * LENGTH,)}
