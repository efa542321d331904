from types import SimpleNamespace

import pytest
import torch

from ds_roberta.config import MaskingConfig
from ds_roberta.training.micro_batch import CPU_TOKENS, fitting_size, largest_micro_batch_size

GIGABYTE = 10**9


@pytest.mark.parametrize("fixed", [0, 3, 20])
@pytest.mark.parametrize("per_sequence", [0.1, 0.5, 2])
def test_the_size_fills_the_memory_and_no_more(fixed, per_sequence):
    def peak(size):
        return (fixed + per_sequence * size) * GIGABYTE

    capacity = 60.05 * GIGABYTE
    size = fitting_size(peak(4), peak(8), capacity)
    assert peak(size) <= capacity < peak(size + 1)


def test_at_least_one_sequence_is_tried_where_even_that_does_not_fit():
    assert fitting_size(90 * GIGABYTE, 100 * GIGABYTE, 50 * GIGABYTE) == 1


def test_probes_of_the_same_size_do_not_divide_by_zero():
    assert fitting_size(GIGABYTE, GIGABYTE, 2 * GIGABYTE) >= 8


def test_on_a_cpu_it_is_a_number_of_tokens(solo_ranks):
    engine = SimpleNamespace(device=torch.device("cpu"), ranks=solo_ranks)
    for length, expected in ((128, CPU_TOKENS // 128), (512, CPU_TOKENS // 512), (100_000, 1)):
        assert largest_micro_batch_size(engine, length, MaskingConfig(), limit=8192) == expected
    assert largest_micro_batch_size(engine, 128, MaskingConfig(), limit=3) == 3
