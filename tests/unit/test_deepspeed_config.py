import json
import math
from pathlib import Path

import pytest

from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.deepspeed_keys import KEYS
from ds_roberta.errors import UserError
from ds_roberta.finetuning.deepspeed_json import read_deepspeed_json

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("zero*.json"))
BASE = json.loads((FOLDER / "zero2.json").read_text())
CPU = ((), ("fp32", "bf16"))
GPU = (("bf16", "fp16"), ("fp32", "bf16", "fp16"))
OLD_GPU = (("fp16",), ("fp32", "fp16"))


def sections(keys=KEYS, place=""):
    """The dotted names of all sections that are taken, nested ones too."""
    found = []
    for key, inner in keys.items():
        if isinstance(inner, dict):
            name = f"{place}.{key}" if place else key
            found += [name, *sections(inner, name)]
    return found


def test_there_is_a_file_for_every_stage():
    assert {path.stem for path in FILES} >= {"zero1", "zero2", "zero3"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_hold_the_papers_recipe_and_leave_the_rest_to_the_machine(path):
    config = DeepSpeedConfig.read(path)
    assert config.train_batch_size == 8192
    assert config.micro_batch_size is None
    content = config.content
    assert content["train_micro_batch_size_per_gpu"] == "auto"
    assert content["fp16"]["enabled"] == content["bf16"]["enabled"] == "auto"
    assert content["gradient_clipping"] == 0.0
    params = content["optimizer"]["params"]
    assert (params["betas"], params["eps"], params["weight_decay"]) == ([0.9, 0.98], 1e-6, 0.01)
    assert 0 < config.learning_rate <= 1e-3
    assert config.zero_stage == int(path.stem[4])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_no_auto_is_left_for_deepspeed(path, on_gpu):
    resolved = DeepSpeedConfig.read(path).resolved("bf16", on_gpu)
    assert "auto" not in json.dumps(resolved)
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (True, False)
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["optimizer"]["params"]["fused"]


def test_only_a_gpu_has_deepspeeds_adam_for_who_asks_for_it(read_config):
    config = read_config({"optimizer.params.torch_adam": False})
    assert not config.resolved("fp32", on_gpu=True)["optimizer"]["params"]["torch_adam"]
    assert config.resolved("fp32", on_gpu=False)["optimizer"]["params"]["torch_adam"]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_weight_decay_that_is_not_given_is_none(read_config, on_gpu):
    resolved = read_config({"optimizer.params": {"lr": 1e-4}}).resolved("fp32", on_gpu)
    assert resolved["optimizer"]["params"]["weight_decay"] == 0


def test_resolving_leaves_the_configuration_alone(read_config):
    config = read_config({})
    config.resolved("fp32", on_gpu=False)
    assert config.content == BASE


OFFLOAD = {"zero_optimization.offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_offloaded_optimizer_is_torchs_too(read_config, on_gpu):
    resolved = read_config({**OFFLOAD, "zero_optimization.stage": 3}).resolved("fp32", on_gpu)
    assert resolved["optimizer"]["params"]["torch_adam"]
    assert resolved["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_offloading_that_would_round_gradients_is_refused(read_config, precision):
    for stage in (1, 3):
        changes = {**OFFLOAD, "zero_optimization.stage": stage, f"{precision}.enabled": True}
        assert read_config(changes).precision((precision,), ("fp32", precision)) == precision
    config = read_config({**OFFLOAD, "zero_optimization.stage": 2, f"{precision}.enabled": True})
    with pytest.raises(UserError, match=rf"at stage 2 would round the gradients.*to {precision}: use stage 1 or 3"):
        config.precision((precision,), ("fp32", precision))
    assert read_config({**OFFLOAD, "zero_optimization.stage": 2}).precision((), ("fp32",)) == "fp32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload_param": {"device": "cpu"}, "stage": 2}, "offload_param needs stage 3, but it is 2"),
        ({"offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"offload_optimizer": {"device": "cpu"}, "stage": 0}, "offload_optimizer needs stage 1, 2 or 3, but it is 0"),
        ({"offload_optimizer": {"device": "nvme"}}, "device must be .*NVMe here.*got 'nvme'"),
    ],
)
def test_offloading_that_would_do_nothing_is_refused(read_config, changes, message):
    with pytest.raises(UserError, match=message):
        read_config({f"zero_optimization.{key}": value for key, value in changes.items()})


def test_deepspeeds_own_adam_for_host_memory_is_refused(read_config):
    with pytest.raises(UserError, match=r"torch_adam is false, but zero_optimization.offload_optimizer uses torch's"):
        read_config({**OFFLOAD, "optimizer.params.torch_adam": False})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train_batchsize", "train_batch_size"),
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("fp_16", "fp16"),
        ("fp16.enable", "enabled"),
        ("bf16.enabeld", "enabled"),
        ("zero_optimization.stages", "stage"),
        ("zero_optimization.overlap_com", "overlap_comm"),
        ("zero_optimization.stage3_prefetch_bucketsize", "stage3_prefetch_bucket_size"),
        ("optimizer.parameters", "params"),
        ("optimizer.params.weightdecay", "weight_decay"),
        ("optimizer.params.beta", "betas"),
        ("tensorboard.ouput_path", "output_path"),
        ("wandb.projekt", "project"),
        ("FP16", "fp16"),
        ("zero_optimization.offload_optimizer.devise", "device"),
        ("zero_optimization.offload_param.pinmemory", "pin_memory"),
        ("timers.throughput.synchronised", "synchronized"),
        ("elasticty", "elasticity"),
        ("zero_optimization.zero_quantized_weight", "zero_quantized_weights"),
    ],
)
def test_a_misspelt_key_names_the_nearest(read_config, key, nearest):
    with pytest.raises(UserError) as caught:
        read_config({key: 1})
    assert f"{key.split('.')[-1]!r}; did you mean {nearest!r}?" in str(caught.value)
    assert "config.json" in str(caught.value)
    if "." in key:
        assert key.rsplit(".", 1)[0] in str(caught.value)


@pytest.mark.parametrize("section", sections())
@pytest.mark.parametrize("value", [[], 3, "auto"])
def test_a_section_must_be_an_object(read_config, section, value):
    with pytest.raises(UserError, match=section):
        read_config({section: value})


@pytest.mark.parametrize("key", ["scheduler", "data_types", "torch_autocast", "checkpoint", "comet"])
def test_what_the_program_owns_is_refused_with_the_reason(read_config, key):
    with pytest.raises(UserError, match=f"remove '{key}': "):
        read_config({key: {}})


@pytest.mark.parametrize("value", [0, -1, 2.5, 8192.0, "8", True])
def test_a_batch_size_is_a_positive_whole_number(read_config, value):
    with pytest.raises(UserError, match=r"train_batch_size must be a positive whole number, got") as caught:
        read_config({"train_batch_size": value})
    assert str(caught.value).endswith(repr(value))


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_a_micro_batch_size_is_auto_or_a_positive_whole_number(read_config, value):
    with pytest.raises(UserError, match=r"train_micro_batch_size_per_gpu .*positive whole number, got"):
        read_config({"train_micro_batch_size_per_gpu": value})
    assert read_config({"train_micro_batch_size_per_gpu": 16}).micro_batch_size == 16
    assert read_config({"train_micro_batch_size_per_gpu": None}).micro_batch_size is None


def test_accumulation_follows_from_the_batch(read_config):
    with pytest.raises(UserError, match="remove 'gradient_accumulation_steps': it follows from train_batch_size"):
        read_config({"gradient_accumulation_steps": 4})
    assert "auto" not in json.dumps(read_config({"gradient_accumulation_steps": "auto"}).resolved("fp32", on_gpu=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": None}, "train_batch_size is missing; the paper's is 8192"),
        ({"gradient_clipping": None}, "gradient_clipping is missing; set it"),
        ({"gradient_clipping": "auto"}, "gradient_clipping must be a number, 0.0 for none, got 'auto'"),
        ({"gradient_clipping": -1.0}, "gradient_clipping must be a number, 0.0 for none, got -1.0"),
        ({"gradient_clipping": True}, "gradient_clipping must be a number, 0.0 for none, got True"),
        ({"zero_optimization.stage": 4}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization.stage": "2"}, "zero_optimization.stage must be 0, 1, 2 or 3, got '2'"),
        ({"zero_optimization.stage": True}, "zero_optimization.stage must be 0, 1, 2 or 3, got True"),
        ({"bf16.enabled": 1}, 'bf16.enabled must be true, false or "auto", got 1'),
        ({"fp16.enabled": "yes"}, "fp16.enabled must be true, false or \"auto\", got 'yes'"),
        ({"optimizer": None}, "optimizer.type must be one of Adam, AdamW, Muon"),
        ({"optimizer.type": "Lamb"}, "optimizer.type must be one of Adam, AdamW, Muon"),
        ({"optimizer.params.lr": None}, "optimizer.params.lr must be a positive number, got None"),
        ({"optimizer.params.lr": 0}, "optimizer.params.lr must be a positive number, got 0"),
        ({"optimizer.params.lr": "auto"}, "optimizer.params.lr must be a positive number, got 'auto'"),
        ({"optimizer.params.lr": float("nan")}, "optimizer.params.lr must be a positive number, got nan"),
        ({"optimizer.params.lr": float("inf")}, "optimizer.params.lr must be a positive number, got inf"),
        ({"optimizer.params.lr": 10**400}, "optimizer.params.lr must be a positive number, got 1000"),
        ({"optimizer.params.eps": "auto"}, "optimizer.params.eps must be a number, at least 0, got 'auto'"),
        (
            {"optimizer.params.weight_decay": -0.1},
            "optimizer.params.weight_decay must be a number, at least 0, got -0.1",
        ),
        ({"optimizer.params.betas": "auto"}, "optimizer.params.betas must be two numbers"),
        ({"optimizer.params.betas": [0.9]}, "optimizer.params.betas must be two numbers"),
        ({"optimizer.params.betas": [0.9, 1.0]}, "optimizer.params.betas must be two numbers"),
    ],
)
def test_a_wrong_value_is_named(read_config, changes, message):
    with pytest.raises(UserError) as caught:
        read_config(changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, CPU, "fp32"),
        ({}, (("bf16",), ("fp32", "bf16")), "bf16"),
        ({}, GPU, "bf16"),
        ({}, OLD_GPU, "fp16"),
        ({"bf16.enabled": True}, CPU, "bf16"),
        ({"fp16.enabled": True}, GPU, "fp16"),
        ({"bf16.enabled": False}, GPU, "fp16"),
        ({"bf16.enabled": False, "fp16.enabled": False}, GPU, "fp32"),
        ({"bf16.enabled": None, "fp16.enabled": None}, GPU, "fp32"),
        ({"zero_optimization.stage": 0}, CPU, "fp32"),
    ],
)
def test_precision_is_the_jsons_or_the_devices(read_config, changes, device, expected):
    assert read_config(changes).precision(*device) == expected


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"fp16.enabled": True}, CPU, 'fp16.enabled is true, but this device has no fp16: set it to "auto"'),
        ({"bf16.enabled": True}, OLD_GPU, "bf16.enabled is true, but this device has no bf16"),
        ({"fp16.enabled": True, "bf16.enabled": True}, GPU, "exclude each other"),
        ({"bf16.enabled": True, "zero_optimization.stage": 0}, GPU, "bf16 needs zero_optimization.stage 1, 2 or 3"),
        ({"fp16.enabled": True, "zero_optimization": None}, GPU, "fp16 needs zero_optimization.stage 1, 2 or 3"),
        ({"zero_optimization.stage": 0}, GPU, "bf16 needs zero_optimization.stage 1, 2 or 3"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(read_config, changes, device, message):
    with pytest.raises(UserError) as caught:
        read_config(changes).precision(*device)
    assert message in str(caught.value)


def test_the_command_line_overrides_batch_size_and_learning_rate(read_config):
    config = read_config({}, train_batch_size=64, learning_rate=1e-4)
    assert (config.train_batch_size, config.learning_rate) == (64, 1e-4)
    assert config.resolved("fp32", on_gpu=True)["optimizer"]["params"]["lr"] == 1e-4
    assert read_config({"train_batch_size": None}, train_batch_size=64).train_batch_size == 64


@pytest.mark.parametrize("value", [0, -1])
def test_overrides_are_checked_too(read_config, value):
    with pytest.raises(UserError, match="train_batch_size must be a positive whole number"):
        read_config({}, train_batch_size=value)
    with pytest.raises(UserError, match="lr must be a positive number"):
        read_config({}, learning_rate=float(value))
    with pytest.raises(UserError, match="lr must be a positive number"):
        read_config({}, learning_rate=math.nan)


def test_keys_that_are_known_pass(read_config):
    changes = {
        "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "run"},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "stage3_max_live_parameters": 1_000_000,
            "stage3_param_persistence_threshold": 0,
        },
        "fp16": {"enabled": "auto", "initial_scale_power": 12, "loss_scale_window": 500},
    }
    resolved = read_config(changes).resolved("fp16", on_gpu=True)
    assert resolved["fp16"] == {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 500}
    assert resolved["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize("content", ["", "{", '{"train_batch_size": 8,}', "[1]", "8192", '"auto"', "[" * 100_000])
def test_a_file_that_is_no_json_object_is_a_user_error(tmp_path, content):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=r"ds.json' (is not valid JSON|must be a JSON object)"):
        DeepSpeedConfig.read(tmp_path / "ds.json")


def test_a_file_that_is_not_utf8_is_a_user_error(tmp_path):
    (tmp_path / "ds.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match="is not valid JSON"):
        DeepSpeedConfig.read(tmp_path / "ds.json")


def test_a_missing_file_names_the_folder_of_ready_ones(tmp_path):
    for path in (tmp_path / "zero9.json", tmp_path):
        with pytest.raises(UserError, match=r"cannot read --deepspeed_config .*ready ones are in ds_configs/"):
            DeepSpeedConfig.read(path)


@pytest.mark.parametrize("section", ["bf16", "zero_optimization"])
@pytest.mark.parametrize("value", ["7", "null", "[]"])
def test_a_section_for_fine_tuning_must_be_an_object(tmp_path, section, value):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(f'{{"{section}": {value}}}')
    with pytest.raises(UserError, match=f"ds.json' has {section} .*: write an object"):
        read_deepspeed_json(tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, r"stage: Input should be .*, got 4\)"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, r"offload_optimizer\.device: .*"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8x"}}, "reduce_bucket_size: .*, got '5e8x'"),
        ({"tensorboard": "on"}, "tensorboard: .*, got 'on'"),
        ({"wall_clock_breakdown": "maybe"}, r"refuses .*ds\.json'"),
        ({"activation_checkpointing": {"number_checkpoints": 2}}, "activation_checkpointing, which does nothing"),
    ],
)
def test_a_value_for_fine_tuning_that_deepspeed_refuses_is_a_user_error(tmp_path, content, message):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_deepspeed_json(tmp_path / "ds.json")


def test_a_key_that_is_given_twice_is_named_for_fine_tuning_too(tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text('{"bf16": {}, "bf16": {}}')
    with pytest.raises(UserError, match=r"ds\.json': the key 'bf16' is given twice"):
        read_deepspeed_json(tmp_path / "ds.json")


def test_the_ready_file_for_fine_tuning_is_taken():
    pytest.importorskip("deepspeed")
    path = Path(__file__).parents[2] / "ds_configs/finetune.json"
    assert read_deepspeed_json(path) == json.loads(path.read_text())
