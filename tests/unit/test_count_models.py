"""The count models agree with counts in plain Python, on the very tokens that a model is evaluated on."""

import math
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest

from ds_roberta.config import MaskingConfig, PackingConfig
from ds_roberta.data.count_models import CountModel, Predicted, sample, token_frequencies
from ds_roberta.data.loader import Collator, HeldOutSample
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.tokenizer import TokenizerInfo

LENGTH, PIECES, ITERATIONS = 32, 40, 20


def chains(rng, count):
    """Documents of one sentence, in which the token after x is mostly x + 1 or x + 2."""
    steps = (rng.choice([1, 2, 90], size=rng.integers(20, 120), p=[0.5, 0.4, 0.1]) for _ in range(count))
    return [[[4 + np.cumsum(step) % 120][0]] for step in steps]


def collator_of(corpus, **masking):
    build_index(corpus, "validation", PackingConfig(LENGTH))
    tokenizer = corpus.manifest.tokenizer
    masker = evaluation_masker(MaskingConfig(**masking), tokenizer)
    return Collator(open_index(corpus, "validation", PackingConfig(LENGTH)), masker, tokenizer, LENGTH)


@pytest.fixture(scope="module")
def chained(tmp_path_factory, write_corpus):
    rng = np.random.default_rng(5)
    train = [chains(rng, count) for count in (60, 1, 40)]
    return write_corpus(tmp_path_factory.mktemp("chained"), {"train": train, "validation": [chains(rng, 20)]})


class PlainCounts:
    """The same model with dictionaries."""

    def __init__(self, pieces, ordinary):
        self.ordinary = ordinary
        self.count([piece for number, piece in enumerate(pieces, 1) if number % PIECES])
        self.weights = {}
        rows = []
        for left, token, right in self.windows(pieces[PIECES - 1 :: PIECES]):
            rows += [self.components(token, *sides) for sides in product((left, None), (right, None))]
        for _ in range(ITERATIONS):
            totals = {}
            for cell, parts in rows:
                whole = sum(w * p for w, p in zip(self.of_cell(cell), parts, strict=True))
                total = totals.setdefault(cell, [1.0, 1.0, *(1.0 if bucket else 0.0 for bucket in cell)])
                for k, (w, p) in enumerate(zip(self.of_cell(cell), parts, strict=True)):
                    total[k] += w * p / whole
            self.weights = {cell: [x / sum(total) for x in total] for cell, total in totals.items()}
        self.count(pieces)

    def windows(self, pieces):
        for piece in pieces:
            shown = [None, *(token if token in self.ordinary else None for token in piece), None]
            yield from (window for window in zip(shown, shown[1:], shown[2:], strict=False) if window[1] is not None)

    def count(self, pieces):
        self.contexts, self.tokens = Counter(), Counter()
        for left, token, right in self.windows(pieces):
            for context in self.of_sides(left, right):
                self.contexts[context] += 1
                self.tokens[context, token] += 1

    @staticmethod
    def of_sides(left, right):
        sides = [("all",), ("left", left), ("right", right)]
        return [context if None not in context else None for context in sides]

    def components(self, token, left, right):
        contexts = self.of_sides(left, right)
        counts = [self.contexts[context] if context else 0 for context in contexts]
        shares = [self.tokens[c, token] / n if n else 0.0 for c, n in zip(contexts, counts, strict=True)]
        return tuple((n.bit_length() + 1) // 2 for n in counts[1:]), (1 / len(self.ordinary), *shares)

    def of_cell(self, cell):
        known = [1.0, 1.0, *(1.0 if bucket else 0.0 for bucket in cell)]
        return self.weights.get(cell, [x / sum(known) for x in known])

    def loss(self, token, left, right):
        cell, parts = self.components(token, left, right)
        return -math.log(sum(w * p for w, p in zip(self.of_cell(cell), parts, strict=True)))


def test_the_losses_are_those_of_counts_in_plain_python(chained):
    tokenizer, split = chained.manifest.tokenizer, chained.split("train")
    ids = [int(token) for shard in range(3) for token in split.values(shard)]
    bounds = [len(ids) * piece // PIECES for piece in range(PIECES + 1)]
    pieces = [ids[start:end] for start, end in pairwise(bounds)]
    assert [piece.tolist() for piece in sample(split)] == pieces
    ordinary = set(range(tokenizer.vocab_size)) - set(tokenizer.special_ids)
    plain, collator = PlainCounts(pieces, ordinary), collator_of(chained)
    places = np.arange(len(collator.packed))
    batch, without, between = collator.collate(places, places), [], []
    flat = batch.input_ids.flatten().tolist()
    for position, label in zip(batch.masked_positions.tolist(), batch.labels.tolist(), strict=True):
        sides = (side if side in ordinary else None for side in (flat[position - 1], flat[position + 1]))
        without.append(plain.loss(label, None, None))
        between.append(plain.loss(label, *sides))
    found = CountModel.of(chained).losses(collator, 10_000)
    assert found == pytest.approx({"unigram_loss": np.mean(without), "neighbour_loss": np.mean(between)}, rel=1e-12)
    assert 4 < found["unigram_loss"] < math.log(120) + 0.05
    assert found["neighbour_loss"] < found["unigram_loss"] - 2


@pytest.mark.parametrize("sequences", [50, 10_000])
def test_they_are_of_the_same_masked_tokens_as_a_models_loss_on_any_number_of_processes(corpus, on_ranks, sequences):
    collator = collator_of(corpus)
    model = CountModel.of(corpus)

    def sums(micro_batch):
        return {"loss": -float(np.log(model.neighbour(model.masked(micro_batch))).sum())}

    expected = model.losses(collator, sequences)["neighbour_loss"]
    for world_size, micro_batch_size in ((1, 64), (3, 7)):
        for found, counts in on_ranks(
            world_size,
            lambda ranks, size=micro_batch_size: HeldOutSample(collator, sequences, size, ranks).evaluate(sums),
        ):
            assert found["loss"] / counts.labels == pytest.approx(expected, rel=1e-12)


def test_probabilities_add_up_to_one_whatever_is_known():
    """With more ids than two bytes hold, some of which never occur."""
    tokenizer = TokenizerInfo(70_000, 0, 1, 2, 69_999, (0, 1, 2, 3, 69_999), "")
    rng = np.random.default_rng(0)
    text = (60_000 + np.cumsum(rng.choice([1, 7], size=30_000)) % 9_000).astype(np.uint32)
    model = CountModel(np.array_split(text, PIECES), tokenizer)
    ordinary = np.setdiff1d(np.arange(70_000), tokenizer.special_ids)

    def distribution(left, right):
        return model.neighbour(Predicted(ordinary, *(np.full(len(ordinary), side) for side in (left, right))))

    seen = int(text[500])
    for left, right in product((-1, 5, int(text[499]), 68_000), (-1, 5, int(text[501]), 69_998)):
        assert distribution(left, right).sum() == pytest.approx(1, rel=1e-9)
    between = distribution(int(text[499]), int(text[501]))
    assert ordinary[between.argmax()] == seen
    assert between.max() > 0.2
    assert model.unigram(Predicted(ordinary, ordinary, ordinary)).sum() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_a_single_short_document_is_enough(tmp_path, write_corpus, tokens):
    document = [np.arange(10, 10 + tokens)]
    corpus = write_corpus(tmp_path, {"train": [[document]], "validation": [[document]]})
    losses = CountModel.of(corpus).losses(collator_of(corpus, mlm_probability=0.5), 10)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses["neighbour_loss"] <= losses["unigram_loss"]


def test_frequencies_are_those_of_all_tokens_and_one_more_of_each(chained):
    split = chained.split("train")
    ids = np.concatenate([split.values(shard) for shard in range(len(split.shards))])
    vocab_size = chained.manifest.tokenizer.vocab_size + 5  # a model may have more ids
    expected = Counter(ids.tolist()) + Counter(range(vocab_size))
    found = token_frequencies(chained, vocab_size)
    np.testing.assert_allclose(found, [expected[token] / expected.total() for token in range(vocab_size)])


def test_a_large_split_is_sampled_evenly(corpus):
    split = corpus.split("train")
    everything = np.concatenate([split.values(shard) for shard in range(len(split.shards))])
    assert np.array_equal(np.concatenate(sample(split)), everything)
    pieces = sample(split, PIECES * 100)
    assert {len(piece) for piece in pieces} == {100}
    for number, piece in enumerate(pieces):
        start = len(everything) * number // PIECES
        assert np.array_equal(piece, everything[start : start + 100])
