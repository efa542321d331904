import argparse
import shutil

import datasets
import numpy as np
import pytest

from benchmarks.throughput import Measured, Outcome, model_size, prepare, table
from benchmarks.throughput_case import Case


def test_the_table_shows_medians_and_compares_with_ours_in_bf16():
    def outcome(name, *seconds):
        return Outcome(name, tuple(Measured(1_000, each, 2 * each, 3_000_000_000, 4) for each in seconds))

    outcomes = [
        outcome("run_mlm-bf16", 10.0, 20.0, 12.5),
        Outcome("compiled-bf16", unavailable="no compiler"),
        outcome("run_mlm-fp32", 20.0),
        outcome("ours-bf16", 2.0),
    ]
    _, _, *rows = table(outcomes, flops=1e6, peak_flops=1e9)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][1:] == ["bf16", "80 (50 to 100)", "40", "0.1", "8.0%", "3.0 GB", "4", "6.25x"]
    assert cells[1][2] == "no compiler"
    assert cells[2][1:3] == ["fp32", "50 (50 to 50)"]
    assert [row[-1] for row in cells[2:]] == ["10.00x", ""]
    assert len({len(row) for row in cells}) == 1
    header, _, *rows = table(outcomes, flops=1e6, peak_flops=1e9, data_sheet_flops=2e9)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert (cells[0][5:7], cells[1][5:7]) == (["utilisation", "MFU"], ["8.0%", "4.0%"])
    assert len({len(row) for row in cells}) == 1


def test_a_size_that_is_no_preset():
    config = Case(model_size("3x48x4"), 40, 1, 1, "", "").config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 48, 4)
    assert config.intermediate_size == 4 * 48
    for wrong in ("3x48x5", "3x48", "tinny", "0x48x4"):
        with pytest.raises(argparse.ArgumentTypeError, match=wrong):
            model_size(wrong)


def test_text_is_measured_with_its_padding_which_is_no_token(corpus, tmp_path):
    shutil.copytree(corpus.folder, tmp_path / "data")
    case = prepare("tiny", 32, 4, argparse.Namespace(data_dir=tmp_path / "data", micro_steps=2), tmp_path)
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    ids, mask = (np.array(rows[name]) for name in ("input_ids", "attention_mask"))
    assert case.filled == mask.mean() < 1
    tokenizer = corpus.manifest.tokenizer
    np.testing.assert_array_equal(mask, ids != tokenizer.pad_token_id)
    np.testing.assert_array_equal(np.array(rows["special_tokens_mask"]), np.isin(ids, tokenizer.special_ids))
    assert case.config.vocab_size == tokenizer.vocab_size


def test_random_ids_fill_their_sequences(tmp_path):
    assert prepare("tiny", 32, 4, argparse.Namespace(data_dir=None, micro_steps=2), tmp_path).filled == 1
