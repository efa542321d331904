import pytest

from ds_roberta.config import ModelConfig
from ds_roberta.model.objectives import MaskedLM


def test_useful_work_is_that_of_the_matrices_counted_by_hand():
    config = ModelConfig(vocab_size=100, num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    length = 20
    forward = 0
    for _ in range(2):
        forward += 4 * 2 * 8 * 8  # query, key, value, output
        forward += 2 * 8 * 32 + 2 * 32 * 8  # MLP
        forward += 2 * 8 * length + 2 * length * 8  # a token's scores over both heads, and its sum of values
    forward += 0.135 * (2 * 8 * 8 + 2 * 8 * 100)  # the head
    assert MaskedLM.flops_per_token(config, length, 0.135) == pytest.approx(3 * forward)
