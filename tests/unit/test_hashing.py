import numpy as np
import pytest

from ds_roberta.data.hashing import derive_key, mix64, permute


def test_keys_depend_on_every_part_its_place_and_its_kind():
    parts = [("order", 1, 2), ("order", 2, 1), ("order", 12), ("order", 0, 3), ("order", "1", 2), ("mask", 1, 2)]
    assert len({derive_key(*each) for each in parts}) == len(parts)


def test_keys_never_change_silently():
    assert derive_key("order", 1, 2) == 8414206741717858119


def test_mix64_is_splitmix64():
    # The generator's outputs from state 0: state k * golden ratio is mixed into output k + 1.
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert states.tolist() == [0, 0x9E3779B97F4A7C15]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537])
def test_permute_is_a_bijection_of_any_size(size):
    for key in (0, 1, 2**64 - 1):
        image = permute(np.arange(size, dtype=np.uint64), size, key)
        assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_asked_place_by_place_equals_asked_at_once():
    whole = permute(np.arange(1000, dtype=np.uint64), 1000, 5)
    assert [int(permute(np.array([place], dtype=np.uint64), 1000, 5)[0]) for place in range(1000)] == whole.tolist()


def test_permute_with_a_key_a_position_equals_each_key_alone():
    keys = np.array([derive_key("k", number) for number in range(50)], dtype=np.uint64)
    positions = np.arange(50, dtype=np.uint64) % np.uint64(37)
    together = permute(positions, 37, keys)
    assert together.tolist() == [int(permute(positions[[i]], 37, key)[0]) for i, key in enumerate(keys.tolist())]


def test_permute_sends_a_position_anywhere_equally_often():
    size, keys = 10, mix64(np.arange(20_000, dtype=np.uint64))
    for position in (0, 9):
        counts = np.bincount(permute(np.full(keys.shape, position, dtype=np.uint64), size, keys).astype(int))
        assert counts.size == size
        assert np.abs(counts - 2000).max() < 6 * np.sqrt(1800)


def test_permute_leaves_its_argument_alone():
    positions = np.arange(100, dtype=np.uint64)
    permute(positions, 100, 3)
    assert np.array_equal(positions, np.arange(100))
