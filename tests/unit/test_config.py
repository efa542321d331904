import json
from pathlib import Path

import pytest

from ds_roberta.config import (
    PRESETS,
    GuardConfig,
    IntervalConfig,
    MaskingConfig,
    PackingConfig,
    ScheduleConfig,
    model_config,
)
from ds_roberta.data.stages import make_stages
from ds_roberta.errors import UserError
from ds_roberta.options import require_positive
from ds_roberta.training.settings import RunConfig


def run_config(**changes):
    return RunConfig(
        **{
            "data_dir": Path("d"),
            "output_dir": Path("o"),
            "model_name": "tiny",
            "model": model_config("tiny", 400, 128),
            "packing": PackingConfig(128),
            "schedule": ScheduleConfig(10, 1),
            "stages": make_stages(128, 8),
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("nano", (2, 128, 2)),
        ("tiny", (4, 256, 4)),
        ("small", (6, 512, 8)),
        ("base", (12, 768, 12)),
        ("large", (24, 1024, 16)),
    ],
)
def test_presets_have_their_sizes(name, size):
    config = model_config(name, 50_265, 512)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == size
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.hidden_size % config.num_attention_heads == 0


def test_base_and_large_are_trained_as_in_the_paper():
    assert (PRESETS["base"].max_steps, PRESETS["base"].warmup_steps) == (500_000, 24_000)
    assert (PRESETS["large"].max_steps, PRESETS["large"].warmup_steps) == (500_000, 30_000)
    assert {preset.max_seq_length for name, preset in PRESETS.items() if name not in ("nano", "tiny")} == {512}


def test_positions_begin_after_the_paddings():
    assert model_config("tiny", 400, 128).max_position_embeddings == 514
    assert model_config("tiny", 400, 512).max_position_embeddings == 514
    assert model_config("tiny", 400, 1024).max_position_embeddings == 1026
    assert model_config("tiny", 400, 1024, pad_token_id=5).max_position_embeddings == 1030


@pytest.mark.parametrize("value", [0, -1, 2.5, 8.0, "8", True, None, float("nan"), [8]])
def test_a_count_is_a_positive_whole_number(value):
    with pytest.raises(UserError) as caught:
        require_positive("--max_steps", value)
    assert str(caught.value) == f"--max_steps must be a positive whole number, got {value!r}"
    require_positive("--max_steps", 8)


def test_a_sequence_has_room_for_a_token():
    assert PackingConfig(3).capacity == 1
    assert PackingConfig(512).capacity == 510
    for length in (2, 0, -5):
        with pytest.raises(UserError, match=f"--max_seq_length must be at least 3, got {length}"):
            PackingConfig(length)


def test_an_unknown_packing_format_is_refused():
    with pytest.raises(UserError, match=r"one of full-sentences.*got 'full_sentences'"):
        PackingConfig(128, "full_sentences")


@pytest.mark.parametrize(
    "shares",
    [
        {"mlm_probability": 0.0},
        {"mlm_probability": 1.0},
        {"mlm_probability": -0.15},
        {"mlm_probability": float("nan")},
        {"mlm_probability_end": 0.0},
        {"mlm_probability_end": 1.5},
        {"eval_mlm_probability": 0.0},
        {"mask_replace_prob": 0.95},
        {"mask_replace_prob": -0.1},
        {"random_replace_prob": -0.1},
    ],
)
def test_masking_shares_must_be_shares(shares):
    with pytest.raises(UserError, match="must"):
        MaskingConfig(**shares)
    MaskingConfig(0.4, 0.9, 0.1, 0.15)


def test_an_unknown_unit_of_masking_is_refused():
    with pytest.raises(UserError, match="--masking must be one of token, whole-word, span, got 'word'"):
        MaskingConfig(unit="word")


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_dropout_is_at_least_0_and_below_1(name, value):
    with pytest.raises(UserError, match=f"{name} must be at least 0 and below 1"):
        model_config("tiny", 400, 128, **{name: value})
    assert getattr(model_config("tiny", 400, 128, **{name: 0.0}), name) == 0.0


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(0, 0), (-1, 0), (10, 11), (10, -1)])
def test_a_schedule_has_steps_and_warms_up_within_them(max_steps, warmup_steps):
    with pytest.raises(UserError, match=r"--max_steps must|--warmup_steps must be from 0 to max_steps \(10\)"):
        ScheduleConfig(max_steps, warmup_steps)
    assert ScheduleConfig(10, 0).warmup_steps == 0
    assert ScheduleConfig(10, 10).warmup_steps == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler_type": "inverse_sqrt"}, "--lr_scheduler_type must be one of linear, .*got 'inverse_sqrt'"),
        ({"min_lr_ratio": 0.1}, "--min_lr_ratio does nothing with --lr_scheduler_type linear"),
        ({"lr_scheduler_type": "cosine", "lr_power": 2.0}, "--lr_power does nothing with --lr_scheduler_type cosine"),
        ({"lr_scheduler_type": "polynomial", "decay_steps": 2}, "--decay_steps does nothing"),
        ({"lr_scheduler_type": "polynomial", "lr_power": 0.0}, "--lr_power must be a positive number, got 0.0"),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 1.5}, "--min_lr_ratio must be from 0 to 1, got 1.5"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "decay_steps": 10},
            r"--decay_steps must be .*\(9\), got 10",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay", "decay_type": "sqrt"}, "--decay_type must be one of"),
    ],
)
def test_a_shape_takes_the_options_that_it_uses(options, words):
    with pytest.raises(UserError, match=words):
        ScheduleConfig(10, 1, **options)


def test_options_of_a_shape_are_resolved():
    schedule = ScheduleConfig(95, 5, "warmup_stable_decay")
    assert (schedule.decay_steps, schedule.decay_type, schedule.min_lr_ratio) == (10, "1-sqrt", 0.0)
    assert schedule.lr_power is None
    assert ScheduleConfig(95, 90, "warmup_stable_decay").decay_steps == 5


def test_a_schedule_that_the_run_does_not_reach_is_refused():
    stages = make_stages(128, 8, "0:64,10:128")
    with pytest.raises(UserError, match="changes at step 10, which --max_steps 10 does not reach"):
        run_config(stages=stages)
    run_config(stages=stages, schedule=ScheduleConfig(11, 0))


def test_a_guard_that_is_off_has_no_threshold():
    assert GuardConfig().loss_spike_threshold == 10.0
    assert GuardConfig("off").loss_spike_threshold is None
    for guard in (("off", 5.0), ("warn", 0.0), ("stop", float("nan")), ("ignore", None)):
        with pytest.raises(UserError, match="--loss_spike"):
            GuardConfig(*guard)


@pytest.mark.parametrize("name", ["save_interval", "eval_interval", "log_interval", "keep_last"])
def test_intervals_are_positive(name):
    with pytest.raises(UserError, match=f"--{name} must be a positive whole number, got 0"):
        IntervalConfig(**{name: 0})


def test_a_run_has_a_seed_from_0_on_and_sequences_to_evaluate():
    with pytest.raises(UserError, match=r"--seed must be from 0 to 2\*\*63 - 1, got -1"):
        run_config(seed=-1)
    with pytest.raises(UserError, match="--eval_sequences must be a positive whole number, got 0"):
        run_config(eval_sequences=0)


def test_all_settings_are_written_as_json():
    content = json.loads(json.dumps(run_config(seed=3).as_json()))
    assert content["seed"] == 3
    assert content["data_dir"] == "d"
    assert content["model"]["hidden_size"] == 256
    assert content["masking"]["mlm_probability"] == 0.15
    assert content["schedule"]["max_steps"] == 10
    assert content["stages"] == [{"first_step": 0, "max_seq_length": 128, "train_batch_size": 8}]
