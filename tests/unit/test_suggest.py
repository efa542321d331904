"""`benchmarks.suggest`: what suits a text and a budget, by rules."""

import runpy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suggest import (
    PAPERS_BATCH,
    STEPS,
    TOKENS_PER_PARAMETER,
    Suggestion,
    Text,
    command,
    main,
    report,
    suggest,
)
from ds_roberta.config import PRESETS
from ds_roberta.errors import UserError

RATE = 1e11
SIZES = list(PRESETS)


def text_of(length, documents=1_000, vocab_size=8_192):
    return Text(np.full(documents, length), vocab_size)


def test_more_time_never_makes_the_model_smaller_nor_the_tokens_of_one_fewer():
    found = [suggest(text_of(600), minutes, RATE) for minutes in (1, 10, 100, 1_000, 10_000, 100_000, 10_000_000)]
    sizes = [SIZES.index(each.model) for each in found]
    assert sizes == sorted(sizes)
    assert (found[0].model, found[-1].model) == ("nano", "large")
    for before, after in pairwise(found):
        assert before.model != after.model or before.tokens < after.tokens


def test_a_model_sees_enough_tokens_for_the_parameters_of_its_layers():
    for minutes in (100, 1_000, 10_000):
        found = suggest(text_of(600), minutes, RATE)
        larger = SIZES[SIZES.index(found.model) + 1]
        assert found.needed[found.model] <= found.tokens
        assert found.needed[larger] > found.needed[found.model]
    assert found.needed["nano"] == TOKENS_PER_PARAMETER * 2 * (12 * 128**2 + 13 * 128)


def test_the_length_is_that_which_most_of_the_text_fills_up_to_the_sizes_own():
    def length(tokens, minutes):
        return suggest(text_of(tokens), minutes, RATE).max_seq_length

    assert [length(tokens, 100_000) for tokens in (40, 300, 600)] == [128, 256, 512]
    assert length(600, 1) == 128


def test_the_papers_recipe_is_for_billions_of_tokens():
    assert suggest(text_of(600), 10, RATE).recipe == "fast"
    found = suggest(text_of(600), 10_000_000, RATE)
    assert found.tokens > STEPS * PAPERS_BATCH * 512
    assert (found.recipe, found.vocab_size, found.train_batch_size) == ("paper", 50_265, None)


def test_longer_runs_get_larger_batches_as_long_as_they_have_steps_enough():
    def batch(tokens, length=128):
        return Suggestion("nano", length, 8_192, "fast", tokens, {}).train_batch_size

    assert [batch(tokens) for tokens in (1e5, 1.5e6, 8e6, 16e6, 1e8)] == [16, 16, 32, 64, 64]
    assert [batch(tokens, length=512) for tokens in (1.5e6, 8e6, 1e8)] == [4, 8, 16]


def test_the_report_gives_reasons_and_warns_of_too_little_text():
    short = text_of(200, documents=10, vocab_size=5_000)
    choices = dict(report(short, suggest(short, 60, RATE)))
    assert "the data has 5,000" in choices["vocabulary of 8,192"]
    (passes,) = (reason for choice, reason in choices.items() if choice.endswith("passes over the text"))
    assert passes.endswith("so more text would help more than more time")


def test_the_real_command_takes_what_is_printed(corpus, capsys, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("benchmarks.suggest.measured_rate", lambda device, precision: RATE)
    main(["--data_dir", str(corpus.folder), "--minutes", "5"])
    deepspeed, script, *words = capsys.readouterr().out.splitlines()[-1].split()
    assert (deepspeed, script) == ("deepspeed", "launch/pretrain.py")
    parser = runpy.run_path(str(Path(__file__).parents[2] / script))["make_parser"]()
    options = parser.parse_args(words)
    assert (options.recipe, options.model, options.max_minutes) == ("fast", "nano", 5.0)
    assert options.train_batch_size == 16
    assert [script, *words] == command(suggest(Text.of(corpus), 5, RATE), corpus.folder, 5)


def test_nothing_is_estimated_on_a_gpu_where_nothing_was_measured(corpus, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("ds_roberta.training.device.on_gpu", lambda: True)
    with pytest.raises(UserError, match=r"measured on a CPU only: .*benchmarks\.plan"):
        main(["--data_dir", str(corpus.folder), "--minutes", "5"])


def test_a_budget_that_is_none_is_an_error(corpus):
    with pytest.raises(UserError, match=r"--minutes must be a positive number, got 0\.0"):
        main(["--data_dir", str(corpus.folder), "--minutes", "0"])
