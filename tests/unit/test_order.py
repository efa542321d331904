import numpy as np
import pytest

from ds_roberta.data.order import BLOCK, WINDOW_BLOCKS, SampleOrder

MILLIONS = 2_100_000
"""All lanes, with two windows each, and what is left over: whole blocks and a part of one."""


@pytest.fixture(scope="module")
def millions():
    return epoch(MILLIONS)


def epoch(size, seed=0, number=0):
    return SampleOrder(size, seed).sequences(np.arange(number * size, (number + 1) * size))


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 4095, 4096, 4097, 8191, 3 * 4096 + 5, 65_535, 300_001])
def test_every_epoch_is_a_permutation(size):
    for number in (0, 5):
        counts = np.bincount(epoch(size, 3, number), minlength=size)
        assert counts.size == size
        assert (counts == 1).all()


def test_an_epoch_of_millions_is_a_permutation(millions):
    order = SampleOrder(MILLIONS, 0)
    assert order.windows > 1
    assert order.laned_blocks < order.blocks < MILLIONS / BLOCK
    assert np.array_equal(np.sort(millions), np.arange(MILLIONS))


@pytest.mark.parametrize(
    ("size", "seed", "places", "sequences"),
    [
        (1000, 0, [0, 1, 2, 3, 4, 5], [589, 429, 244, 844, 155, 586]),
        (10_000, 1, [0, 1, 4095, 8192, 9999, 10_000], [2131, 4775, 5754, 709, 1206, 7526]),
        (
            2_000_000_000,
            42,
            [0, 1, 255, 1_999_999_999, 7_000_000_000],
            [802139313, 1624289048, 1581243436, 1884779904, 1002719243],
        ),
    ],
)
def test_the_order_never_changes_silently(size, seed, places, sequences):
    assert SampleOrder(size, seed).sequences(np.array(places)).tolist() == sequences


def test_epochs_seeds_and_sizes_have_orders_of_their_own():
    size = 20_000
    orders = [epoch(size, seed, number) for seed, number in ((1, 1), (1, 2), (2, 1), (0, 3), (3, 0), (2, 0))]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() < 20  # 1 is expected


def test_the_order_is_a_pure_function_of_the_place():
    order = SampleOrder(9_000, 4)
    places = np.random.default_rng(0).integers(0, 40_000, size=100)
    at_once = order.sequences(places)
    assert [int(order.sequences(np.array([place]))[0]) for place in places] == at_once.tolist()
    assert np.array_equal(order.sequences(places.reshape(50, 2)), at_once.reshape(50, 2))
    assert np.array_equal(SampleOrder(9_000, 4).sequences(np.arange(40_000))[places], at_once)


def test_a_batch_across_the_end_of_an_epoch_goes_on_in_the_next():
    order = SampleOrder(100, 0)
    assert order.sequences(np.arange(90, 110)).tolist() == [*epoch(100)[90:], *epoch(100, number=1)[:10]]


def test_billions_of_sequences_are_ordered_without_a_table():
    size = 2_000_000_000
    order = SampleOrder(size, 7)
    for first in (0, size - 4096, 3 * size):
        sequences = order.sequences(np.arange(first, first + 4096))
        assert len(np.unique(sequences)) == 4096
        assert sequences.min() >= 0
        assert sequences.max() < size


def test_lane_order_is_a_permutation_of_the_batch():
    order = SampleOrder(300_001, 0)
    for first in (0, 300_001 - 500, 900_000):
        places = np.arange(first, first + 1000)
        arranged = order.lane_order(places)
        assert not np.array_equal(arranged, places)
        assert np.array_equal(np.sort(arranged), places)


def test_processes_read_blocks_of_their_own():
    order = SampleOrder(2_100_000, 0)
    sequences = order.sequences(order.lane_order(np.arange(8192)))
    blocks = [set((part // BLOCK).tolist()) for part in np.split(sequences, 8)]
    assert sum(map(len, blocks)) == len(set.union(*blocks))


def test_a_window_of_places_reads_few_blocks_whole(millions):
    order = SampleOrder(MILLIONS, 0)
    window = order.lanes * WINDOW_BLOCKS * BLOCK
    blocks, counts = np.unique(millions[:window] // BLOCK, return_counts=True)
    assert len(blocks) == order.lanes * WINDOW_BLOCKS
    assert (counts == BLOCK).all()


def test_a_rank_reads_a_block_about_once_an_epoch_and_within_one_window(millions):
    size, batch, world_size = MILLIONS, 8192, 8
    order = SampleOrder(size, 0)
    steps = -(-size // batch)
    readers, first, last = {}, np.full(order.blocks + 1, steps), np.zeros(order.blocks + 1, dtype=np.int64)
    for step in range(steps):
        places = order.lane_order(np.arange(step * batch, min((step + 1) * batch, size)))
        blocks = millions[places] // BLOCK
        first[blocks], last[blocks] = np.minimum(first[blocks], step), step
        for rank, part in enumerate(np.split(blocks, len(blocks) * np.arange(1, world_size) // world_size)):
            readers.setdefault(rank, set()).update(part.tolist())
    # Blocks in lanes have one reader; those left over at the end, 2% here, may have all.
    laned = order.laned_blocks / order.blocks
    assert laned > 0.97
    assert sum(map(len, readers.values())) / order.blocks < laned + world_size * (1 - laned) + 0.01
    window_steps = order.lanes * WINDOW_BLOCKS * BLOCK / batch
    assert np.mean(last - first <= window_steps) > laned - 0.001


def test_the_places_of_neighbours_are_spread_over_a_window_at_least(millions):
    size = MILLIONS
    place = np.empty(size, dtype=np.int64)
    place[millions] = np.arange(size)
    window = SampleOrder(size, 0).lanes * WINDOW_BLOCKS * BLOCK
    together = np.abs(np.diff(place))[np.arange(1, size) % BLOCK != 0]
    # Two of one block lie in one window as if thrown into it, a third of it apart on average.
    assert np.mean(together) / window == pytest.approx(1 / 3, abs=0.02)
    assert np.mean(together < 8192) < 2 * 8192 / window + 0.002
    # Sequences of different blocks lie anywhere.
    apart = np.abs(place[BLOCK:] - place[:-BLOCK])
    assert np.mean(apart) / size == pytest.approx(1 / 3, abs=0.03)


def test_neighbours_in_the_corpus_land_far_apart():
    size = 300_000
    order = epoch(size)
    place = np.empty(size, dtype=np.int64)
    place[order] = np.arange(size)
    distance = np.abs(np.diff(place))
    assert np.median(distance) > size / 10
    assert (distance < 256).mean() < 0.02


def test_a_batch_draws_from_the_whole_corpus():
    size = 300_000
    batch = epoch(size)[:2048]
    by_tenth = np.bincount(batch * 10 // size, minlength=10)
    assert by_tenth.min() > 100


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0, 0)
