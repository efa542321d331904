"""The table of DeepSpeed's keys against DeepSpeed's own models and readers."""

import inspect

import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from ds_roberta.deepspeed_keys import KEYS, Refused

MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
READ_OTHERWISE = {"optimizer", "scheduler", "pipeline", "sequence_parallel_size"}  # by no name that can be recorded


def known(place):
    keys = KEYS
    for part in place.split("."):
        keys = keys[part]
    return set((keys.keys or "").split()) if isinstance(keys, Refused) else set(keys)


class Asked(dict):
    """A configuration that remembers every key it is asked for."""

    def __init__(self, *content):
        super().__init__(*content)
        self.names = set()

    def __contains__(self, key):
        self.names.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.names.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


@pytest.mark.parametrize("place", MODELS)
def test_every_key_of_a_section_is_known(place):
    fields = {field.alias or name for name, field in MODELS[place].model_fields.items()}
    removed = set(_REMOVED_ZERO_CONFIG_KEYS) if place == "zero_optimization" else set()
    assert known(place) == fields | removed


@pytest.mark.parametrize(
    ("place", "reader"),
    [
        ("flops_profiler", DeepSpeedFlopsProfilerConfig),
        ("activation_checkpointing", DeepSpeedActivationCheckpointingConfig),
    ],
)
def test_every_key_of_a_section_that_has_no_model_is_known(place, reader):
    asked = Asked({"enabled": False})
    reader({place: asked})
    assert known(place) == asked.names


def test_every_key_of_aio_is_known():
    assert known("aio") == set(AIO_DEFAULT_DICT)


def test_every_key_at_the_top_level_is_known():
    asked = Asked({"train_batch_size": 8})
    DeepSpeedConfig(asked)
    assert asked.names | set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) | READ_OTHERWISE == set(KEYS) | READ_OTHERWISE


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam])
def test_every_parameter_of_adam_is_known(optimizer):
    names = set(inspect.signature(optimizer).parameters) - {"params", "model_params"}
    assert names <= known("optimizer.params")
