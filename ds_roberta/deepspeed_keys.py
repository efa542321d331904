"""Every key of DeepSpeed's JSON: accepted ones with a check of their values, refused ones with the reason.

DeepSpeed ignores a misspelt key at the top level and in several sections, and rejects one elsewhere with pydantic's
error. A test compares these tables with DeepSpeed's own models, so that new keys of its next version are noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from ds_roberta.errors import unknown_key_message

AUTO = "auto"
REQUIRED = ("train_batch_size", "gradient_clipping", "optimizer.params.lr")
"""Keys without a default, by their dotted names."""
MUON_RATES = ("muon_lr", "adam_lr")
MUON_PARAMS = (*MUON_RATES, "momentum")
"""Of `optimizer.params`, those that only Muon has."""


@dataclass(frozen=True)
class Kind:
    """What a value must be: `requirement` ends the sentence "KEY must …"."""

    requirement: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Refused:
    """A key of DeepSpeed's that this trainer refuses.

    It passes silently if its value is one of `ours`, or if it is switched off and true is not one of them.

    Args:
        keys: what a section may contain when it is switched off, separated by spaces; None: anything.
    """

    reason: str
    ours: tuple[Any, ...] = ()
    keys: str | None = None

    def passes(self, value: Any) -> bool:
        # 1 == True, but a number is not a switch.
        if any(type(value) is type(own) and value == own for own in self.ours):
            return True
        return is_off(value) and not any(own is True for own in self.ours)


Section: TypeAlias = "dict[str, Kind | Refused | Section]"


def _each(names: str, known: Kind | Refused) -> Section:
    """Map each of several keys, separated by spaces, to the same entry."""
    return dict.fromkeys(names.split(), known)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can be: not a bool, "auto" or NaN."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def is_off(value: Any) -> bool:
    """Whether a JSON value switches something off: false, null, or a section that does."""
    if not isinstance(value, dict):
        return value is False or value is None
    return value.get("enabled") is False or (value != {} and all(part == {} or is_off(part) for part in value.values()))


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value)  # 5e8 is a float in JSON


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_FLAG = Kind("be true or false", lambda value: isinstance(value, bool))
_FLAG_OR_AUTO = Kind('be true, false or "auto"', lambda value: isinstance(value, bool) or value == AUTO)
_COUNT = Kind("be a whole number, at least 1", lambda value: _is_whole(value) and value >= 1)
_WHOLE = Kind("be a whole number, at least 0", lambda value: _is_whole(value) and value >= 0)
_NUMBER = Kind("be a number, at least 0", lambda value: is_number(value) and value >= 0)
_TEXT = Kind("be a string", lambda value: isinstance(value, str))
_TEXT_OR_NULL = Kind("be a string or null", lambda value: value is None or isinstance(value, str))
_RATE = Kind("be a positive number", lambda value: is_number(value) and value > 0)
_BETAS = Kind(
    "be two numbers, at least 0 and below 1",
    lambda value: isinstance(value, list) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value),
)

_FP32_SUMS = "gradients are always summed and reduced in fp32"
_PRECISION = "precision is set by fp16.enabled and bf16.enabled"
_FP32_STATES = "the optimizer's weights and moments are always fp32"
_DATA = "the data and its order are the program's own"
_CHECKPOINTS = "checkpoints are written in the program's own portable format"
_DENSE = "the encoder's weights and gradients are dense and whole"
_UNROUNDED = "weights and gradients are communicated unrounded"
_PARALLEL = "a run is data-parallel, with ZeRO; its model is not split in any other way"
_NVME = 'nothing is offloaded to NVMe here; "device": "cpu" keeps it in host memory'
_UNTESTED = "it is not tested with this trainer's exact sums and checkpoints"
_MISPLACED = "with it DeepSpeed finds a parameter's fp32 weights in another one's place"
_CHECKPOINTED = "activations are recomputed by torch's checkpointing, from inputs that stay where they are"
_GONE = "DeepSpeed has removed it"
_OTHER_OPTIMIZER = "it belongs to an optimizer that is not accepted"
_UNPRINTED = "it is never printed; tokens_per_second is in metrics.jsonl"
_IDLE = "DeepSpeed's counts start from 0 at every start and include rehearsals"

_OFFLOAD_DEVICE = Kind('be "none" or "cpu" (nothing is offloaded to NVMe here)', lambda value: value in ("none", "cpu"))
_MONITOR: Section = {"enabled": _FLAG, "output_path": _TEXT, "job_name": _TEXT}

KEYS: Section = {
    "train_batch_size": Kind("be a positive whole number", _is_positive_int),
    "train_micro_batch_size_per_gpu": Kind(
        'be "auto" or a positive whole number', lambda value: value == AUTO or _is_positive_int(value)
    ),
    "gradient_accumulation_steps": Refused(
        "it follows from train_batch_size, the micro-batch and the number of processes", (AUTO,)
    ),
    "gradient_clipping": Kind("be a number, 0.0 for none", lambda value: is_number(value) and value >= 0),
    "optimizer": {
        "type": _TEXT,
        "params": {
            "lr": _RATE,
            "betas": _BETAS,
            "eps": _NUMBER,
            "weight_decay": _NUMBER,
            **_each("torch_adam adam_w_mode", _FLAG),
            "adamw_mode": Refused("write adam_w_mode"),
            "bias_correction": Refused("Adam's bias is always corrected", (True,)),
            "amsgrad": Refused("checkpoints contain Adam's two moments, not AMSGrad's third"),
            "max_grad_norm": Refused("write gradient_clipping, at the top level of the file", (0, 0.0)),
            "fused": Refused("torch's fused kernel is always used", (True,)),
            "foreach": Refused("torch's fused kernel is always used"),
            "maximize": Refused("a loss is minimized"),
            "capturable": Refused("the optimizer is not part of a CUDA graph"),
            "differentiable": Refused("nothing differentiates through the optimizer"),
            "set_grad_none": Refused("DeepSpeed frees the gradients itself", (True,)),
            **_each("fp32_optimizer_states fp32_optimizer_states_in_cpu", Refused(_FP32_STATES, (True,))),
            **_each(" ".join(MUON_RATES), _RATE),
            "momentum": Kind("be a number, at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1),
            "ns_method": Refused("Newton-Schulz is iterated as in torch.optim.Muon", ("standard",)),
            "per_head_muon": Refused("a projection of all heads is one matrix"),
            **_each("freeze_step cuda_aware comm_backend_name max_coeff min_coeff", Refused(_OTHER_OPTIMIZER)),
        },
        "legacy_fusion": Refused(_UNTESTED),
    },
    "fp16": {
        "enabled": _FLAG_OR_AUTO,
        "loss_scale": _NUMBER,
        "initial_scale_power": _WHOLE,
        **_each("loss_scale_window hysteresis min_loss_scale", _COUNT),
        "consecutive_hysteresis": _FLAG,
        "auto_cast": Refused("the model's inputs are token ids, which are not cast"),
        "fp16_master_weights_and_grads": Refused(_FP32_STATES),
    },
    "bf16": {
        "enabled": _FLAG_OR_AUTO,
        "check_grad_overflow": Refused("gradients are always checked for values that are not finite", (True,)),
        "immediate_grad_update": Refused("gradients are reduced and applied once per step"),
        **_each("bf16_master_weights_and_grads bf16_optimizer_states", Refused(_FP32_STATES)),
    },
    "zero_optimization": {
        "stage": Kind("be 0, 1, 2 or 3", lambda value: type(value) is int and 0 <= value <= 3),
        **_each("contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions", _FLAG),
        **_each("log_trace_cache_warnings enable_sanity_checks", _FLAG),
        **_each("stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential", _FLAG),
        **_each("reduce_bucket_size sub_group_size", _COUNT),
        **_each("allgather_bucket_size stage3_prefetch_bucket_size stage3_max_live_parameters", _WHOLE),
        **_each("stage3_param_persistence_threshold stage3_model_persistence_threshold", _WHOLE),
        **_each("stage3_max_reuse_distance stage3_module_granularity_threshold", _WHOLE),
        "overlap_comm": Kind("be true, false or null", lambda value: value is None or isinstance(value, bool)),
        "round_robin_gradients": Refused(_MISPLACED),
        "offload_param": {
            "device": _OFFLOAD_DEVICE,
            "pin_memory": _FLAG,
            **_each("max_in_cpu nvme_path buffer_count buffer_size", Refused(_NVME)),
        },
        "offload_optimizer": {
            "device": _OFFLOAD_DEVICE,
            "pin_memory": _FLAG,
            **_each("nvme_path buffer_count pipeline_read pipeline_write fast_init", Refused(_NVME)),
            "ratio": Refused("the optimizer is offloaded whole or not at all", (1, 1.0)),
            "super_offload": Refused(_UNTESTED),
            "cpuadam_cores_perc": Refused("it is for super_offload"),
        },
        **_each(
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
            Refused("exported weights are whole at every stage", (True,)),
        ),
        "compute_grad_norm": Refused("each step's row has the gradient's norm", (True,)),
        "load_from_fp32_weights": Refused("a resume always continues from the fp32 weights", (True,)),
        "elastic_checkpoint": Refused(_CHECKPOINTS),
        "ignore_unused_parameters": Refused("every parameter has a gradient", (True,)),
        "zero_hpz_partition_size": Refused(_UNTESTED, (1,)),
        **_each(
            "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients", Refused(_UNROUNDED)
        ),
        "zenflow": Refused("every step applies the whole gradient"),
        **_each("legacy_stage1 parameter_alignment", Refused(_UNTESTED)),
        **_each("memory_efficient_linear override_module_apply", Refused(_UNTESTED, (True,))),
        "pipeline_loading_checkpoint": Refused(_CHECKPOINTS),
        "save_muon_momentum_buffer_in_memory": Refused("Muon's momentum is kept like Adam's moments"),
        "leaf_module": Refused("the encoder has no branches that ZeRO-3 could not follow"),
        "cpu_offload": Refused('write "offload_optimizer": {"device": "cpu"}'),
        "cpu_offload_param": Refused('write "offload_param": {"device": "cpu"}'),
        "cpu_offload_use_pin_memory": Refused("write pin_memory in offload_optimizer or offload_param"),
        "mics_shard_size": Refused(_GONE, (-1,)),
        **_each("mics_hierarchical_params_gather zeropp_loco_param", Refused(_GONE)),
    },
    **_each("zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown disable_python_gc", _FLAG),
    "log_level": Kind(
        "be debug, info, warning, error or critical",
        lambda value: value in ("debug", "info", "warning", "error", "critical"),
    ),
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": _FLAG, "group": _TEXT_OR_NULL, "team": _TEXT_OR_NULL, "project": _TEXT},
    "comet": Refused(
        "use wandb, tensorboard or csv_monitor",
        keys="enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    ),
    "steps_per_print": Refused(f"{_IDLE}; --log_interval sets how often a step's row is written"),
    "timers": {
        "throughput": {"enabled": Refused(_UNPRINTED), "synchronized": Refused(_UNPRINTED, (True, False))},
    },
    "flops_profiler": Refused(
        f"{_IDLE}; mfu is in metrics.jsonl, and `python -m benchmarks.profile` shows where a step's time goes",
        keys="enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    ),
    "comms_logger": Refused(
        "what it collects is never printed, and it makes the device wait for each communication",
        keys="enabled verbose prof_all debug prof_ops",
    ),
    "memory_breakdown": Refused("it resets the peak that memory_gb in metrics.jsonl reports"),
    "dump_state": Refused("the run's config.json has every setting"),
    "scheduler": Refused("the learning rate's schedule is set by --lr_scheduler_type, --max_steps and --warmup_steps"),
    "data_types": Refused(
        _FP32_SUMS,
        ({"grad_accum_dtype": "fp32"},),
        "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    ),
    "communication_data_type": Refused(_FP32_SUMS, ("fp32", "FP32")),
    "seq_parallel_communication_data_type": Refused(_PARALLEL, ("fp32", "FP32")),
    "prescale_gradients": Refused(f"{_FP32_SUMS}, where no order of dividing and adding overflows"),
    "gradient_predivide_factor": Refused(f"{_FP32_SUMS}, where no order of dividing and adding overflows", (1, 1.0)),
    "gradient_allreduce_op": Refused("the loss is divided by the masked tokens of all processes", ("mean",)),
    "managed_gradient_accumulation": Refused("the trainer counts the micro-steps itself", (True,)),
    "disable_allgather": Refused(_UNTESTED),
    "bfloat16": Refused("write bf16"),
    "amp": Refused(_PRECISION, keys="enabled opt_level loss_scale master_weights keep_batchnorm_fp32"),
    "torch_autocast": Refused(_PRECISION, keys="enabled dtype lower_precision_safe_modules"),
    "activation_checkpointing": {
        "number_checkpoints": Kind(
            "be the number of layers to recompute, or null for none",
            lambda value: value is None or _is_positive_int(value),
        ),
        "partition_activations": Refused(_PARALLEL),
        **_each("contiguous_memory_optimization cpu_checkpointing", Refused(_CHECKPOINTED)),
        **_each("synchronize_checkpoint_boundary profile", Refused(_CHECKPOINTED)),
    },
    "aio": Refused(_NVME, keys="block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "curriculum_learning": Refused(f"{_DATA}; --max_seq_length_schedule begins with short sequences"),
    **_each("data_efficiency dataloader_drop_last", Refused(_DATA)),
    **_each("checkpoint datastates_ckpt nebula", Refused(_CHECKPOINTS)),
    "elasticity": Refused("a run can continue with another number of processes without it"),
    "autotuning": Refused('the micro-batch is found if train_micro_batch_size_per_gpu is "auto"'),
    **_each(
        "compression_training quantize_training eigenvalue weight_quantization",
        Refused("the whole model is trained, without quantisation or pruning"),
    ),
    "progressive_layer_drop": Refused("the encoder always has all its layers"),
    "sparse_gradients": Refused(_DENSE),
    "sparse_attention": Refused("attention covers the whole sequence"),
    **_each("compile graph_harvesting", Refused("--torch_compile says what is compiled")),
    "hybrid_engine": Refused("pretraining generates no text"),
    **_each("pipeline tensor_parallel expert_parallel use_data_before_expert_parallelism", Refused(_PARALLEL)),
    "sequence_parallel_size": Refused(_PARALLEL, (1,)),
    "vocabulary_size": Refused("the vocabulary is the tokenizer's"),
}


def problems(content: dict[str, Any], keys: Section = KEYS, place: str = "") -> list[str]:
    """What is wrong with the keys and values of a JSON, each by its dotted name; missing keys are not reported."""
    found: list[str] = []
    for key, value in content.items():
        name, known = f"{place}.{key}" if place else key, keys.get(key)
        if known is None:
            found.append(_unknown(key, keys, place))
        elif isinstance(known, Kind):
            if not known.accepts(value):
                found.append(f"{name} must {known.requirement}, got {value!r}{_about_auto(name, value)}")
        elif isinstance(known, Refused):
            if not known.passes(value):
                found.append(f"remove {name!r}: {known.reason}")
            elif known.keys is not None and isinstance(value, dict):
                inside = dict.fromkeys(known.keys.split())
                found += [_unknown(inner, inside, name) for inner in value if inner not in inside]
        elif isinstance(value, dict):
            found += problems(value, known, name)
        elif not (value is None and key.startswith("offload_")):  # null is DeepSpeed's own default there
            found.append(f"{name} must be a JSON object, got {value!r}")
    return found


def unknown_keys(content: dict[str, Any]) -> list[str]:
    """Only the keys that DeepSpeed does not know, for a JSON that another trainer reads."""
    return [problem for problem in problems(content) if problem.startswith("unknown key")]


def accepted_part(content: dict[str, Any], keys: Section = KEYS) -> dict[str, Any]:
    """A copy of a JSON that has no `problems`, with only the keys that are accepted."""
    kept = {}
    for key, value in content.items():
        known = keys[key]
        if isinstance(known, dict) and isinstance(value, dict):
            kept[key] = accepted_part(value, known)
        elif not isinstance(known, Refused):
            kept[key] = value
    return kept


def _unknown(key: str, keys: dict[str, Any], place: str) -> str:
    message = unknown_key_message(f"key in {place}" if place else "key", key, keys)
    homes = [home for home in _places(key, KEYS) if home != place]
    if "did you mean" not in message and len(homes) == 1:
        message += f": it belongs in {homes[0] or 'the top level'}"
    return message


def _places(key: str, keys: Section, place: str = "") -> list[str]:
    """The dotted names of the sections that have a key."""
    found = [place] if key in keys else []
    for name, inner in keys.items():
        if isinstance(inner, dict):
            found += _places(key, inner, f"{place}.{name}" if place else name)
    return found


def _about_auto(name: str, value: Any) -> str:
    if value != AUTO:
        return ""
    remedy = "give one" if name in REQUIRED else "give one, or remove the key for DeepSpeed's default"
    return f", which only transformers' Trainer can resolve: {remedy}"
