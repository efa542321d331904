"""Sources mixed by weights: their shares, their own epochs, and the same stream from any starting point."""

import math
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from ds_roberta.config import MaskingConfig, PackingConfig, Stage
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.masking import training_masker
from ds_roberta.data.mixture import MAX_TOTAL_WEIGHT, MixedOrder, parse_source_weights, sample_order, shown_source
from ds_roberta.data.order import BLOCK, SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.errors import UserError

RANGES = {
    "wiki": np.array([[0, 700], [1000, 5200]]),  # 4,900 sequences
    "books": np.array([[700, 700], [700, 1000]]),  # a shard without a sequence, and 300
    "web": np.array([[5200, 5201], [5300, 5400]]),  # 101, with a gap that is of a source not drawn
}
WEIGHTS = {"wiki": 5, "books": 2, "web": 1}


def mixed(weights=WEIGHTS, seed=3):
    return MixedOrder(RANGES, weights, seed)


def source_of(sequences):
    """The source of each sequence, as a number in `RANGES`; each must have exactly one."""
    inside = [
        np.any([(sequences >= begin) & (sequences < end) for begin, end in ranges], axis=0)
        for ranges in RANGES.values()
    ]
    assert (np.sum(inside, axis=0) == 1).all()
    return np.argmax(inside, axis=0)


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        {"wiki": 1, "books": 1, "web": 1},
        {"wiki": 1, "books": 2, "web": 997},
        {"wiki": 123_456_789, "books": 987_654_321 - 123_456_789, "web": 1},
        {"wiki": 0, "books": 3, "web": 4},
        {"wiki": 0, "books": 7, "web": 0},
    ],
)
@pytest.mark.parametrize("first", [0, 10**12])
def test_every_stretch_holds_each_sources_share(weights, first):
    places = np.arange(first, first + 20_000)
    sources = source_of(mixed(weights).sequences(places))
    for number, weight in enumerate(weights.values()):
        drawn = np.cumsum(sources == number)
        exact = np.arange(1, len(places) + 1) * (weight / sum(weights.values()))
        # Both ends of a stretch are ends of prefixes.
        bound = 1 + math.log(len(weights)) / 2
        assert np.abs(drawn - exact).max() <= (bound if first == 0 else 2 * bound)
        assert drawn[-1] == 0 or weight


def test_each_source_has_epochs_of_its_own():
    sequences = mixed().sequences(np.arange(60_000))
    sources, epochs = source_of(sequences), mixed().epochs(np.arange(60_000))
    for number, ranges in enumerate(RANGES.values()):
        everything = np.concatenate([np.arange(begin, end) for begin, end in ranges])
        drawn, size = sequences[sources == number], len(everything)
        assert len(drawn) // size >= 7
        for epoch in range(len(drawn) // size):
            part = drawn[epoch * size : (epoch + 1) * size]
            assert np.array_equal(np.sort(part), everything)
            assert epoch == 0 or (part == drawn[:size]).sum() < 15  # permuted again: 1 is expected
        assert np.array_equal(epochs[sources == number], np.arange(len(drawn)) // size)


def test_one_sources_order_does_not_depend_on_the_others():
    alone = mixed({"wiki": 0, "books": 1, "web": 0}).sequences(np.arange(1000))
    beside = mixed().sequences(np.arange(5000))
    assert np.array_equal(beside[source_of(beside) == 1][:1000], alone)
    assert not np.array_equal(mixed({"wiki": 0, "books": 1, "web": 0}, seed=4).sequences(np.arange(1000)), alone)


def test_the_mixture_is_a_pure_function_of_the_place():
    order = mixed()
    places = np.random.default_rng(0).integers(0, 100_000, size=100)
    at_once = order.sequences(places)
    assert [int(order.sequences(np.array([place]))[0]) for place in places] == at_once.tolist()
    assert np.array_equal(order.sequences(places.reshape(50, 2)), at_once.reshape(50, 2))
    assert np.array_equal(mixed().sequences(np.arange(100_000))[places], at_once)
    assert np.array_equal(mixed(dict(reversed(WEIGHTS.items()))).sequences(places), at_once)
    assert order.sequences(np.empty(0, np.int64)).shape == (0,)


def test_the_mixture_never_changes_silently():
    assert mixed().sequences(np.arange(8)).tolist() == [3826, 854, 2579, 5148, 5391, 4381, 912, 1419]
    assert mixed().sequences(np.array([4095, 10**6, 10**12, 10**12 + 1])).tolist() == [4303, 5129, 3327, 834]


@pytest.mark.parametrize("place", [10**12, 3 * 10**12 + 7])
def test_a_far_place_is_dealt_exactly(place):
    weights = {"wiki": MAX_TOTAL_WEIGHT // 3, "books": MAX_TOTAL_WEIGHT // 5 + 1, "web": 12_345}
    drawn, left, rest = {}, place, sum(weights.values())
    for name, weight in weights.items():  # from the heaviest to the lightest, in exact fractions
        drawn[name] = math.floor(Fraction(left * weight, rest) + Fraction(1, 2))
        left, rest = left - drawn[name], rest - weight
    sizes = {name: int(np.diff(ranges).sum()) for name, ranges in RANGES.items()}
    order = mixed(weights)
    summary = order.summary(place)
    for name, count in drawn.items():
        assert f", {count:,} of {sizes[name]:,} sequences ({count / sizes[name]:.2f} epochs)" in summary
    places = np.arange(place, place + 1000)
    numbers = source_of(order.sequences(places))
    for number, name in enumerate(weights):
        expected = (drawn[name] + np.arange(np.sum(numbers == number))) // sizes[name]
        assert np.array_equal(order.epochs(places[numbers == number]), expected)


def test_most_blocks_are_read_by_one_process_and_each_gets_the_mixture():
    size, batch = 3_000_000, 8192
    order = MixedOrder({"a": np.array([[0, size]]), "b": np.array([[size, 2 * size]])}, {"a": 2, "b": 1}, 0)
    readers = [set() for _ in range(8)]
    for step in range(100):
        places = np.arange(step * batch, (step + 1) * batch)
        arranged = order.lane_order(places)
        assert np.array_equal(np.sort(arranged), places)
        for blocks, part in zip(readers, np.split(order.sequences(arranged), 8), strict=True):
            assert np.mean(part < size) == pytest.approx(2 / 3, abs=0.05)
            blocks.update((part // BLOCK).tolist())
    assert sum(map(len, readers)) / len(set.union(*readers)) < 1.3


@pytest.fixture(scope="module")
def make_loader(sourced):
    packing, tokenizer = PackingConfig(32), sourced.manifest.tokenizer
    build_index(sourced, "train", packing)
    packed = open_index(sourced, "train", packing)
    collator = Collator(packed, training_masker(MaskingConfig(), tokenizer, 5), tokenizer, 32)
    weights = parse_source_weights("wiki=2,books=1,web=0.5", sourced.manifest)

    def make(batch, micro_batch, rank=0, world_size=1):
        stage = LoaderStage(Stage(0, 32, batch), collator, sample_order(packed, weights, 5), micro_batch)
        return TrainLoader([stage], rank, world_size)

    return make


def rows(micro_batches):
    found = Counter()
    for each in micro_batches:
        labels = np.full(each.input_ids.shape, -100)
        labels.ravel()[each.masked_positions.numpy()] = each.labels.numpy()
        for ids, targets in zip(each.input_ids[: each.sequences].numpy(), labels, strict=False):
            found[ids.tobytes() + targets.tobytes()] += 1
    return found


@pytest.mark.parametrize("batch", [7, 100])
def test_a_global_batch_is_the_same_on_any_number_of_processes(make_loader, batch):
    expected = rows(make_loader(batch, batch).micro_batches(7))
    assert expected.total() == batch
    for world_size in (2, 3, 8):
        loaders = (make_loader(batch, 4, rank, world_size) for rank in range(world_size))
        assert sum((rows(loader.micro_batches(7)) for loader in loaders), Counter()) == expected


def test_a_stream_that_is_taken_up_again_is_the_unbroken_one(make_loader):
    unbroken = [rows(step) for step in make_loader(48, 16).steps(0, 9)]
    assert [rows(step) for step in make_loader(48, 16).steps(4, 9)] == unbroken[4:]


def test_sources_are_the_shards_that_the_manifest_says(sourced):
    build_index(sourced, "train", PackingConfig(32))
    packed = open_index(sourced, "train", PackingConfig(32))
    weights = {"books": 1, "web": 0, "wiki": 3}
    [(shards, _, _)] = packed.segments(sample_order(packed, weights, 0).sequences(np.arange(4000)))
    assert np.bincount(shards, minlength=5)[2] == 0
    assert np.isin(shards, [0, 4]).sum() == 3000
    assert isinstance(sample_order(packed, None, 0), SampleOrder)
    assert not isinstance(sample_order(packed, None, 0), MixedOrder)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("wiki=2,books=1,web=1", {"books": 1, "web": 1, "wiki": 2}),
        ("web=10,books=20,wiki=0", {"books": 2, "web": 1, "wiki": 0}),
        ("wiki=0.7,books=.2,web=0.10", {"books": 2, "web": 1, "wiki": 7}),
        ("wiki=0,books=0.25,web=0", {"books": 1, "web": 0, "wiki": 0}),
    ],
)
def test_weights_become_the_smallest_whole_numbers(sourced, text, weights):
    found = parse_source_weights(text, sourced.manifest)
    assert found == weights
    assert list(found) == sorted(found)
    assert parse_source_weights(None, sourced.manifest) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not NAME=WEIGHT"),
        ("wiki", "'wiki' is not NAME=WEIGHT"),
        ("=1", "'=1' is not NAME=WEIGHT"),
        ("wiki=2,", "'' is not NAME=WEIGHT"),
        ("wiki=nan,books=1,web=1", "'wiki=nan' is not NAME=WEIGHT"),
        ("wiki=1e9,books=1,web=1", "'wiki=1e9' is not NAME=WEIGHT"),
        ("wiki=1,wiki=1", "names 'wiki' twice"),
        ("wiki=1,books=-1,web=1", "the weight of 'books' is negative"),
        ("wiki=0,books=0,web=0", "all weights are 0"),
        (
            "wiki=1,boks=1,web=1",
            r"unknown source 'boks'; did you mean 'books'\?; the data's sources are books, web, wiki",
        ),
        ("wiki=1,books=1", "does not name web: .* the data's sources are books, web, wiki"),
        ("wiki=0.1234567890123,books=1,web=1", "add up to .* round them to fewer digits"),
    ],
)
def test_weights_that_are_wrong_are_refused_in_one_line(sourced, text, message):
    with pytest.raises(UserError, match=message):
        parse_source_weights(text, sourced.manifest)


@pytest.mark.parametrize("names", [("a,b=2", "a", "c\nd"), ("=", ",", "a=1,b=2"), ("a", "a,a", "web/é, =")])
def test_a_name_may_hold_what_stands_between_names(corpus, with_sources, names):
    manifest = with_sources(corpus, [*names, names[0], names[1]]).manifest
    text = ",".join(f"{name}={weight}" for weight, name in enumerate(names, 1))
    assert parse_source_weights(text, manifest) == {name: weight for weight, name in enumerate(names, 1)}
    with pytest.raises(UserError, match=f"does not name {re.escape(shown_source(names[1]))}: "):
        parse_source_weights(f"{names[0]}=1,{names[2]}=1", manifest)
    with pytest.raises(UserError, match=r"unknown source 'nothing'.* the data's sources are "):
        parse_source_weights(text + ",nothing=1", manifest)


def test_a_name_is_quoted_where_it_would_not_stand_alone():
    assert [shown_source(name) for name in ("wiki", "a b", "a,b", "a=b", "a\nb")] == [
        "wiki",
        "a b",
        "'a,b'",
        "'a=b'",
        "'a\\nb'",
    ]


def test_a_source_that_is_held_out_alone_may_only_have_weight_0(sourced):
    validation = tuple(replace(shard, source="news") for shard in sourced.manifest.splits["validation"])
    manifest = replace(sourced.manifest, splits={**sourced.manifest.splits, "validation": validation})
    with pytest.raises(UserError, match=r"'news' has no training sequence: .* sources are books, news, web, wiki"):
        parse_source_weights("wiki=1,books=1,web=1,news=1", manifest)
    assert parse_source_weights("wiki=1,books=1,web=1,news=0", manifest)["news"] == 0
    assert "news" not in parse_source_weights("wiki=1,books=1,web=1", manifest)


@pytest.mark.parametrize("names", [[""] * 5, ["wiki", "", "", "", "wiki"]])
def test_weights_need_a_source_for_every_document(corpus, with_sources, names):
    with pytest.raises(UserError, match=r"\d training shards have none.* --input NAME=PATH"):
        parse_source_weights("wiki=1", with_sources(corpus, names).manifest)
