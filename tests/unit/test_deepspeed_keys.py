"""What is said about the keys and values of a DeepSpeed JSON."""

import pytest

from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.deepspeed_keys import KEYS, Refused, problems, unknown_keys
from ds_roberta.errors import UserError


def problems_of(read_config, changes):
    """The lines of the error, its head left out where it has several."""
    with pytest.raises(UserError) as caught:
        read_config(changes)
    head, *lines = str(caught.value).splitlines()
    if not lines:
        return [head.split(": ", 1)[1]]
    assert head.endswith(f"config.json has {len(lines)} problems:")
    return lines


def test_all_problems_of_a_file_are_named_at_once(read_config):
    found = problems_of(
        read_config,
        {
            "train_batch_size": "auto",
            "gradient_clipping": None,
            "optimizer.type": "Lamb",
            "optimizer.params": {"lr": "auto", "max_grad_norm": 1.0},
            "scheduler": {"type": "WarmupLR"},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"devise": "cpu"}},
            "elasticity": {"enabled": True},
            "gradient_cliping": 1.0,
        },
    )
    for expected in (
        "train_batch_size must be",
        "gradient_clipping is missing",
        "optimizer.type must be",
        "optimizer.params.lr must be",
        "remove 'optimizer.params.max_grad_norm': write gradient_clipping",
        "remove 'scheduler'",
        "zero_optimization.reduce_bucket_size must be a whole number",
        "unknown key in zero_optimization.offload_optimizer 'devise'",
        "remove 'elasticity': a run can continue with another number of processes",
        "unknown key 'gradient_cliping'",
    ):
        assert len([line for line in found if line.startswith(expected)]) == 1, expected
    assert len(found) == 10


def test_auto_that_nothing_fills_in_says_so(read_config):
    (found,) = problems_of(read_config, {"zero_optimization.reduce_bucket_size": "auto"})
    assert found.endswith("only transformers' Trainer can resolve: give one, or remove the key for DeepSpeed's default")
    (found,) = problems_of(read_config, {"train_batch_size": "auto"})
    assert found.startswith("train_batch_size must be a positive whole number, got 'auto', which only transformers'")
    assert found.endswith("give one")


def not_taken(keys=KEYS, place=""):
    for key, known in keys.items():
        name = f"{place}.{key}" if place else key
        if isinstance(known, Refused):
            yield name
        elif isinstance(known, dict):
            yield from not_taken(known, name)


@pytest.mark.parametrize("key", not_taken())
def test_a_key_of_deepspeed_that_is_not_taken_is_refused_and_named_as_such_only(read_config, key):
    """`3` is a value that we accept for none of them."""
    (found,) = problems_of(read_config, {key: 3})
    assert found.startswith(f"remove {key!r}: ")


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.params.bias_correction",
        "bf16.check_grad_overflow",
        "zero_optimization.compute_grad_norm",
        "managed_gradient_accumulation",
    ],
)
def test_what_is_always_on_cannot_be_switched_off(read_config, key):
    assert problems_of(read_config, {key: False})[0].startswith(f"remove {key!r}: ")
    read_config({key: True})


@pytest.mark.parametrize("key", ["fp32", "stag", "deepspeed", "zero_optimization.lr_scheduler", "bf16.loss"])
def test_a_key_that_is_like_no_other_has_no_suggestion(read_config, key):
    (found,) = problems_of(read_config, {key: 1})
    assert "did you mean" not in found


def test_a_key_in_the_wrong_place_names_the_right_one(read_config):
    assert problems_of(read_config, {"betas": [0.9, 0.98]}) == ["unknown key 'betas': it belongs in optimizer.params"]
    (found,) = problems_of(read_config, {"zero_optimization.gradient_clipping": 1.0})
    assert found.endswith("'gradient_clipping': it belongs in the top level")


@pytest.mark.parametrize(
    "changes",
    [
        {"communication_data_type": "fp32"},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"amp": {"enabled": False, "opt_level": "O1"}},
        {"comms_logger": {"enabled": False, "verbose": False, "prof_ops": []}},
        {"flops_profiler": {"enabled": False, "profile_step": 1}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"zero_optimization.stage3_gather_16bit_weights_on_model_save": True},
        {"zero_optimization.cpu_offload": False},
        {"prescale_gradients": False, "sparse_gradients": False, "dump_state": False},
        {"gradient_predivide_factor": 1.0},
        {"optimizer.params.bias_correction": True},
        {"bf16.check_grad_overflow": True},
        {"seq_parallel_communication_data_type": "fp32", "gradient_accumulation_steps": "auto"},
        {"timers": {"throughput": {"enabled": False, "synchronized": True}}},
        {"timers": {"throughput": {"enabled": False, "synchronized": False}}},
    ],
)
def test_a_value_that_says_what_is_so_anyway_passes_and_is_not_passed_on(read_config, changes):
    assert read_config(changes).resolved("bf16", on_gpu=True) == read_config({}).resolved("bf16", on_gpu=True)


@pytest.mark.parametrize("section", ["flops_profiler", "comms_logger", "aio", "activation_checkpointing", "amp"])
def test_a_misspelt_key_of_a_section_that_is_off_is_an_error(read_config, section):
    (found,) = problems_of(read_config, {section: {"enabeld": False}})
    assert found.startswith(f"unknown key in {section} 'enabeld'")


def test_contiguous_gradients_pass_with_a_note(read_config):
    config = read_config({"zero_optimization.contiguous_gradients": True})
    assert not config.resolved("fp32", on_gpu=True)["zero_optimization"]["contiguous_gradients"]
    (note,) = config.notes
    assert "contiguous_gradients is set to false" in note
    assert read_config({"zero_optimization.contiguous_gradients": False}).notes == read_config({}).notes == []


@pytest.mark.parametrize("name", ["adam", "Adam", "ADAM", "adamw", "AdamW", "ADAMW"])
def test_an_optimizers_name_is_taken_in_any_case(read_config, name):
    read_config({"optimizer.type": name})


@pytest.mark.parametrize("name", ["OneBitAdam", "Lion", "FusedAdam", "adamx", None, 3])
def test_other_optimizers_are_refused(read_config, name):
    changes = {"optimizer.type": name} if name is not None else {"optimizer": {"params": {"lr": 1e-3}}}
    assert f"optimizer.type must be one of Adam, AdamW, Muon, got {name!r}" in problems_of(read_config, changes)[-1]


MUON = {"optimizer.type": "Muon", "optimizer.params": {"muon_lr": 0.02, "adam_lr": 2e-3, "momentum": 0.9}}


def test_muon_takes_deepspeeds_names_and_the_command_lines_rates(read_config):
    config = read_config(MUON)
    assert (config.muon_lr, config.learning_rate) == (0.02, 2e-3)
    config = read_config(MUON, learning_rate=1e-3, muon_lr=0.01)
    assert (config.muon_lr, config.learning_rate) == (0.01, 1e-3)
    both = read_config(MUON | {"optimizer.params": {"lr": 1e-2}}, learning_rate=1e-3)
    assert (both.muon_lr, both.learning_rate) == (1e-2, 1e-3)
    assert read_config({}).muon_lr is None


def test_a_rate_or_a_key_of_the_wrong_optimizer_is_refused(read_config):
    with pytest.raises(UserError, match=r"--muon_lr 0\.1 does nothing: the optimizer of .* is AdamW"):
        read_config({}, muon_lr=0.1)
    assert problems_of(read_config, {"optimizer.params.momentum": 0.9}) == [
        "remove 'optimizer.params.momentum': it belongs to Muon"
    ]
    (found,) = problems_of(read_config, MUON | {"optimizer.params": {"adam_lr": 1e-3}})
    assert found == "optimizer.params.muon_lr must be a positive number, got None"
    for name in ("adam_w_mode", "torch_adam"):
        (found,) = problems_of(read_config, MUON | {"optimizer.params": {"lr": 1e-3, name: False}})
        assert f"optimizer.params.{name} is false" in found


def test_an_adamw_that_is_none_is_refused(read_config):
    (found,) = problems_of(read_config, {"optimizer.params.adam_w_mode": False})
    assert "adam_w_mode is false, but optimizer.type is AdamW" in found
    read_config({"optimizer.params.adam_w_mode": False, "optimizer.type": "Adam"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.reduce_bucket_size", "5e8"),
        ("zero_optimization.reduce_bucket_size", 0.5),
        ("zero_optimization.overlap_comm", 1),
        ("zero_optimization.offload_optimizer.device", "gpu"),
        ("zero_optimization.offload_optimizer.pin_memory", "yes"),
        ("fp16.loss_scale_window", 0),
        ("fp16.initial_scale_power", True),
        ("tensorboard.enabled", "true"),
        ("csv_monitor.output_path", 3),
        ("log_level", "loud"),
        ("wall_clock_breakdown", 1),
    ],
)
def test_a_wrong_value_in_any_section_is_named(read_config, key, value):
    (found,) = problems_of(read_config, {key: value})
    assert found.startswith(f"{key} must be ")
    assert found.endswith(f", got {value!r}")


def test_large_sizes_may_be_written_as_json_writes_them(read_config):
    read_config({"zero_optimization.reduce_bucket_size": 5e8, "zero_optimization.sub_group_size": 1e9})


def test_a_learning_rate_of_the_command_line_stands_in_for_auto(read_config):
    assert read_config({"optimizer.params.lr": "auto"}, learning_rate=1e-4).learning_rate == 1e-4
    assert read_config({"optimizer.params": None}, learning_rate=1e-4).learning_rate == 1e-4


def test_a_key_that_is_given_twice_is_an_error(tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "optimizer": {"type": "Adam", "type": "AdamW"}}')
    with pytest.raises(UserError, match="the key 'type' is given twice"):
        DeepSpeedConfig.read(tmp_path / "ds.json")


def test_another_trainers_file_is_searched_for_unknown_keys_alone():
    content = {"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stag": 2, "reduce_bucket_size": "auto"}}
    assert len(problems(content)) == 3
    assert unknown_keys(content) == ["unknown key in zero_optimization 'stag'; did you mean 'stage'?"]
