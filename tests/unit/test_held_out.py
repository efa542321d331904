import math

import numpy as np
import pytest

from ds_roberta.config import MaskingConfig, PackingConfig
from ds_roberta.data.loader import Collator, HeldOutSample, held_out_sequences
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import MaskedLM

LENGTH = 32


@pytest.fixture(scope="module")
def collator(corpus):
    build_index(corpus, "validation", PackingConfig(LENGTH))
    packed = open_index(corpus, "validation", PackingConfig(LENGTH))
    tokenizer = corpus.manifest.tokenizer
    return Collator(packed, evaluation_masker(MaskingConfig(), tokenizer), tokenizer, LENGTH)


def label_loss(micro_batch):
    """Stands in for a model's loss."""
    return {"loss": float((micro_batch.labels % 7).sum())}


def compute(collator, on_ranks, sequences, micro_batch_size, world_size, calls=None):
    def body(ranks):
        sample = HeldOutSample(collator, sequences, micro_batch_size, ranks)
        number = []

        def loss_sum(micro_batch):
            number.append(len(micro_batch.input_ids))
            return label_loss(micro_batch)

        result = sample.evaluate(loss_sum)
        if calls is not None:
            calls.append(number)
        return tuple(MaskedLM.evaluation(*result).values())

    return on_ranks(world_size, body)


def test_the_loss_is_the_same_on_any_number_of_processes(collator, on_ranks):
    ((expected, perplexity),) = compute(collator, on_ranks, 100, 100, 1)
    assert 0 < expected < 7
    assert perplexity == math.exp(expected)
    for world_size in (1, 2, 3):
        for micro_batch_size in (1, 7, 64):
            for loss, _ in compute(collator, on_ranks, 100, micro_batch_size, world_size):
                assert loss == pytest.approx(expected, rel=1e-12)


def test_the_sample_and_its_masks_are_those_of_earlier_versions(collator):
    """Or the held-out losses of models could no longer be compared."""
    sequences = held_out_sequences(1_000, 6)
    ids = np.arange(4, 4 + 6 * 100, dtype=np.uint16).reshape(6, 100) % 390 + 4
    positions, _ = collator.masker.mask(ids, sequences)
    assert sequences.tolist() == [589, 429, 244, 844, 155, 586]
    assert positions[:6].tolist() == [5, 7, 10, 12, 14, 19]


def test_every_process_has_as_many_micro_batches(collator, on_ranks):
    calls = []
    compute(collator, on_ranks, 10, 3, 3, calls)
    assert calls == [[3, 3], [3, 3], [3, 3]]


def test_a_request_to_stop_ends_an_evaluation_before_the_next_micro_batch(collator, on_ranks):
    def body(ranks):
        stops, losses = iter([False, True]), []
        sample = HeldOutSample(collator, 10, 1, ranks)
        result = sample.evaluate(lambda micro_batch: losses.append(1) or {"loss": 1.0}, lambda: next(stops))
        return result, losses

    assert on_ranks(2, body) == [(None, [1])] * 2


def test_the_sample_is_drawn_from_the_whole_split_and_at_most_all_of_it(collator, on_ranks):
    size = len(collator.packed)
    calls = []
    compute(collator, on_ranks, size + 1000, 1, 1, calls)
    assert len(calls[0]) == size

    seen = []
    original = collator.collate
    collator_spy = Collator(collator.packed, collator.masker, collator.tokenizer, LENGTH)
    collator_spy.collate = lambda sequences, places: seen.extend(sequences) or original(sequences, places)
    compute(collator_spy, on_ranks, 50, 10, 1)
    assert len(set(seen)) == 50
    assert np.ptp(seen) > size / 2


def test_a_model_that_has_diverged_has_a_finite_perplexity(collator, on_ranks):
    (found,) = on_ranks(1, lambda ranks: HeldOutSample(collator, 5, 5, ranks).evaluate(lambda _: {"loss": 1e9}))
    evaluation = MaskedLM.evaluation(*found)
    assert evaluation["loss"] > 700
    assert math.isfinite(evaluation["perplexity"])


def test_a_sample_without_a_masked_token_has_no_loss(tmp_path, write_corpus, on_ranks):
    corpus = write_corpus(tmp_path / "c", {"validation": [[[np.array([7])]]]})
    build_index(corpus, "validation", PackingConfig(LENGTH))
    tokenizer = corpus.manifest.tokenizer
    masker = evaluation_masker(MaskingConfig(mlm_probability=1e-9), tokenizer)
    collator = Collator(open_index(corpus, "validation", PackingConfig(LENGTH)), masker, tokenizer, LENGTH)
    for error in compute(collator, on_ranks, 10, 4, 2):
        assert isinstance(error, UserError)
        assert "no token of the held-out sequences is masked" in str(error)
