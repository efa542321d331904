import pytest

from benchmarks.throughput import Measured, Outcome, flops_per_token, table
from ds_roberta.config import ModelConfig


def test_useful_work_is_that_of_the_matrices_counted_by_hand():
    config = ModelConfig(vocab_size=100, num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    length = 20
    forward = 0
    for _ in range(2):
        forward += 4 * 2 * 8 * 8  # query, key, value, output
        forward += 2 * 8 * 32 + 2 * 32 * 8  # MLP
        forward += 2 * 8 * length + 2 * length * 8  # a token's scores over both heads, and its sum of values
    forward += 0.15 * (18 / 20) * (2 * 8 * 8 + 2 * 8 * 100)  # the head; 18 of 20 tokens may be masked
    assert flops_per_token(config, length) == pytest.approx(3 * forward)


def test_the_table_tells_medians_and_compares_with_ours_in_bf16():
    def outcome(name, *seconds):
        return Outcome(name, tuple(Measured(1_000, each, 2 * each, 3_000_000_000) for each in seconds))

    outcomes = [
        outcome("run_mlm-bf16", 10.0, 20.0, 12.5),
        Outcome("compiled-bf16", unavailable="no compiler"),
        outcome("run_mlm-fp32", 20.0),
        outcome("ours-bf16", 2.0),
    ]
    _, _, *rows = table(outcomes, flops=1e6, peak_flops=1e9)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][1:] == ["bf16", "80 (50 to 100)", "40", "0.1", "8.0%", "3.0 GB", "6.2x"]
    assert cells[1][2] == "no compiler"
    assert cells[2][1:3] == ["fp32", "50 (50 to 50)"]
    assert [row[-1] for row in cells[2:]] == ["10.0x", ""]
    assert len({len(row) for row in cells}) == 1
