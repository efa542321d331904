import pytest
import torch

from ds_roberta.model.weights import position_rows, token_rows, token_sources


@pytest.fixture
def positions():
    """514 rows as RoBERTa has them: two before the first position."""
    return torch.arange(514.0)[:, None] * torch.ones(1, 3)


@pytest.mark.parametrize("length", [1024, 1300, 2048, 4096])
def test_learned_positions_are_repeated_after_the_paddings_rows(positions, length):
    extended = position_rows(positions, 1, 512, 1, length)
    assert extended.shape == (length + 2, 3)
    assert torch.equal(extended[:514], positions)
    for position in (512, 513, 1023, length - 1):
        assert torch.equal(extended[2 + position], positions[2 + position % 512])


def test_positions_that_were_never_trained_are_replaced(positions):
    extended = position_rows(positions, 1, 128, 1, 512)
    assert extended[2:, 0].tolist() == [2 + position % 128 for position in range(512)]


def test_positions_move_with_the_paddings_id(positions):
    later = position_rows(positions, 1, 512, 3, 600)
    assert len(later) == 604
    assert torch.equal(later[3], positions[1])
    assert torch.equal(later[4:516], positions[2:])
    sooner = position_rows(positions, 1, 512, 0, 512)
    assert torch.equal(sooner[0], positions[1])
    assert torch.equal(sooner[1:], positions[2:])


def test_tokens_find_their_rows_by_text():
    old = {"<s>": 0, "<pad>": 1, "a": 2, "b": 3, "c": 4, "<mask>": 6}
    new = {"<pad>": 0, "<s>": 1, "<mask>": 2, "c": 3, "ab": 4, "?": 6}
    sources, shared = token_sources(old, new, 7, lambda text: [old[letter] for letter in text if letter in old])
    everything = [0, 1, 2, 3, 4, 6]
    assert sources == [[1], [0], [6], [4], [2, 3], [], []]
    assert shared == 4
    rows = torch.randn(8, 5)
    found = token_rows(rows, sources, everything)
    assert torch.equal(found[:4], rows[[1, 0, 6, 4]])
    assert torch.allclose(found[4], (rows[2] + rows[3]) / 2)
    assert torch.allclose(found[5], rows[everything].mean(0))
    bias = torch.randn(8)
    found = token_rows(bias, sources, everything)
    assert torch.allclose(found[4:6], torch.stack([(bias[2] + bias[3]) / 2, bias[everything].mean()]))
    assert found.shape == (7,)
