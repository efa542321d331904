"""A recipe is a JSON and defaults of options; whatever is given takes their place."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from ds_roberta.errors import UserError
from ds_roberta.training.recipes import OPTIONS_OF_RECIPES, RECIPES
from ds_roberta.training.run import _read_inputs
from ds_roberta.training.settings import pretrain_options

FAST = RECIPES["fast"]


def read(corpus, **given):
    """The JSON's content and the run's settings, as a run on a CPU would read them."""
    options = pretrain_options(data_dir=corpus.folder, output_dir=corpus.folder / "run", max_steps=100, **given)
    deepspeed, _, config, *_ = _read_inputs(options)
    return deepspeed.content, config


def test_a_recipe_needs_no_json_and_sets_what_is_not_given(corpus):
    content, config = read(corpus, recipe="fast", model="nano")
    expected = json.loads(FAST.deepspeed_config.read_text())
    expected["optimizer"]["params"] |= FAST.params_for(128)
    assert content == expected
    assert config.as_json()["recipe"] == "fast"
    assert (config.model.hidden_dropout_prob, config.model.attention_probs_dropout_prob) == (0.0, 0.0)
    masking = config.masking
    assert (config.packing.format, masking.final_probability, masking.held_out_probability) == ("contiguous", 0.4, 0.15)
    assert (config.initial_attention, config.initial_bias) == ("neighbours", "frequencies")
    schedule = config.schedule
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.decay_type) == (6, 60, "linear")


def test_what_means_nothing_to_an_objective_is_left_out(corpus):
    _, config = read(corpus, recipe="fast", model="nano", objective="rts")
    assert (config.initial_attention, config.initial_bias) == ("neighbours", "zero")
    assert (config.masking.mlm_probability, config.masking.held_out_probability) == (0.15, 0.15)
    with pytest.raises(UserError, match="--initial_bias frequencies does nothing with --objective rts"):
        read(corpus, recipe="fast", model="nano", objective="rts", initial_bias="frequencies")


def test_what_is_given_takes_the_recipes_place(corpus):
    given = {"max_seq_length": 40, "packing": "full-sentences", "hidden_dropout_prob": 0.1, "mlm_probability": 0.3}
    content, config = read(corpus, recipe="fast", model="nano", train_batch_size=8, lr_scheduler_type="linear", **given)
    assert content["train_batch_size"] == 8
    assert (config.packing.format, config.model.hidden_dropout_prob) == ("full-sentences", 0.1)
    assert (config.masking.mlm_probability, config.masking.held_out_probability) == (0.3, 0.15)
    schedule = config.schedule
    assert (schedule.lr_scheduler_type, schedule.decay_steps, schedule.decay_type) == ("linear", None, None)


def test_without_a_recipe_and_with_the_papers_all_is_as_the_defaults_say(corpus):
    zero2 = RECIPES["paper"].deepspeed_config
    content, config = read(corpus, deepspeed_config=zero2, model="nano")
    assert content["train_batch_size"] == 8_192
    papers = read(corpus, recipe="paper", model="nano")
    assert papers[0] == content
    assert {**papers[1].as_json(), "recipe": None} == config.as_json()
    assert (config.packing.format, config.masking.mlm_probability) == ("full-sentences", 0.15)
    assert config.schedule.lr_scheduler_type == "linear"


def test_the_json_that_is_given_wins_with_its_batch_and_rates(corpus, tmp_path):
    own = json.loads(FAST.deepspeed_config.read_text())
    own["optimizer"]["params"]["weight_decay"] = 0.123
    (tmp_path / "own.json").write_text(json.dumps(own))
    content, config = read(corpus, recipe="fast", model="small", deepspeed_config=tmp_path / "own.json")
    assert content == own
    assert config.masking.mlm_probability == 0.4


def test_rates_follow_the_models_width(corpus):
    widths = sorted(FAST.optimizer_params)
    for hidden_size, width in ((32, widths[0]), (widths[1] + 10, widths[1]), (4_096, widths[-1])):
        assert FAST.params_for(hidden_size) == FAST.optimizer_params[width]
    params = read(corpus, recipe="fast", model="tiny")[0]["optimizer"]["params"]
    assert FAST.params_for(256).items() <= params.items()
    assert RECIPES["paper"].params_for(768) == {}


def test_neither_recipe_nor_json_is_an_error_that_names_both(corpus):
    with pytest.raises(UserError, match=r"name a --recipe \(paper, fast\), or a DeepSpeed JSON by --deepspeed_config"):
        read(corpus)


def test_the_command_leaves_the_recipes_options_open_and_shows_their_defaults():
    parser = runpy.run_path(str(Path(__file__).parents[2] / "launch/pretrain.py"))["make_parser"]()
    options = parser.parse_args([])
    assert all(getattr(options, name) is None for name in OPTIONS_OF_RECIPES)
    assert vars(pretrain_options()).items() <= vars(options).items()
    assert "share of the tokens to mask (default: 0.15)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("name", "value"), [("train_batch_size", 0), ("learning_rate", float("nan")), ("muon_lr", -1.0)]
)
def test_a_wrong_value_on_the_command_line_is_no_error_of_the_json(corpus, name, value):
    with pytest.raises(UserError, match=f"^--{name} must be a positive"):
        read(corpus, recipe="fast", model="nano", **{name: value})


@pytest.mark.parametrize(("model", "max_steps", "warmup_steps"), [("tiny", 10_000, 600), ("base", 1_000_000, 48_000)])
def test_the_warm_up_is_the_same_share_of_a_run_longer_than_the_sizes_own(corpus, model, max_steps, warmup_steps):
    zero2 = RECIPES["paper"].deepspeed_config
    options = pretrain_options(zero2, data_dir=corpus.folder, model=model, max_steps=max_steps)
    assert _read_inputs(options)[2].schedule.warmup_steps == warmup_steps
