"""The DeepSpeed JSON: read, checked key by key, and completed for the machine that is there.

DeepSpeed ignores a misspelt key in silence, so every key is held against the known ones here, before any work.
`"auto"` stands where the machine decides: `train_micro_batch_size_per_gpu`, `fp16.enabled`, `bf16.enabled`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_roberta.config import require_positive
from ds_roberta.errors import UserError, unknown_key_message

AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16")

_KNOWN_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "fp16",
    "bf16",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_python_gc",
    "log_level",
    "timers",
    "aio",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "comms_logger",
    "flops_profiler",
}
_OWNED_ELSEWHERE = {
    "scheduler": "the learning rate's schedule is set by --lr_scheduler_type, --max_steps and --warmup_steps",
    "data_types": "gradients are always summed and reduced in fp32",
    "communication_data_type": "gradients are always summed and reduced in fp32",
    "torch_autocast": "precision is set by fp16.enabled and bf16.enabled",
    "amp": "precision is set by fp16.enabled and bf16.enabled",
    "curriculum_learning": "the data and its order are the program's own",
    "data_efficiency": "the data and its order are the program's own",
    "dataloader_drop_last": "the data and its order are the program's own",
    "checkpoint": "checkpoints are written in the program's own portable format",
    "activation_checkpointing": "the encoder does not recompute activations",
}
SECTION_KEYS = {
    "fp16": {
        "enabled",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
    },
    "bf16": {"enabled"},
    "zero_optimization": {
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "offload_param",
        "offload_optimizer",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "round_robin_gradients",
        "zero_hpz_partition_size",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
    },
    "tensorboard": {"enabled", "output_path", "job_name"},
    "csv_monitor": {"enabled", "output_path", "job_name"},
    "wandb": {"enabled", "group", "team", "project"},
}
"""Keys accepted in each section: those of DeepSpeed's own that this trainer honours."""
_OPTIMIZER_TYPES = ("Adam", "AdamW")
_OPTIMIZER_KEYS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A checked DeepSpeed JSON with the overrides of the command line applied."""

    content: dict[str, Any]
    source: str

    @classmethod
    def read(
        cls, path: Path, train_batch_size: int | None = None, learning_rate: float | None = None
    ) -> DeepSpeedConfig:
        """Read a JSON file.

        Raises:
            UserError: it is missing, no JSON object, or a key or value in it is wrong.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"cannot read --deepspeed_config {str(path)!r} ({error.strerror}): ready ones are in ds_configs/"
            ) from error
        except ValueError as error:
            raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{str(path)!r} must hold a JSON object, it holds a {type(content).__name__}")
        if train_batch_size is not None:
            content["train_batch_size"] = train_batch_size
        config = cls(content, str(path))
        config._check()
        if learning_rate is not None:
            content["optimizer"]["params"]["lr"] = learning_rate
            config._check_learning_rate()
        return config

    @property
    def train_batch_size(self) -> int:
        return self.content["train_batch_size"]

    @property
    def micro_batch_size(self) -> int | None:
        """`train_micro_batch_size_per_gpu`, None where it is "auto"."""
        value = self.content.get("train_micro_batch_size_per_gpu", AUTO)
        return None if value == AUTO else value

    @property
    def learning_rate(self) -> float:
        return self.content["optimizer"]["params"]["lr"]

    @property
    def zero_stage(self) -> int:
        return self.content.get("zero_optimization", {}).get("stage", 0)

    def precision(self, preferred: tuple[str, ...], supported: tuple[str, ...]) -> str:
        """One of `PRECISIONS`.

        Args:
            preferred: low precisions that "auto" switches on, on this device; the first that the JSON leaves to it.
            supported: precisions that the device has.

        Raises:
            UserError: one is asked for that the device or the ZeRO stage has not, or both at once.
        """
        asked = {name: self.content.get(name, {}).get("enabled", False) for name in ("fp16", "bf16")}
        if asked["fp16"] is True and asked["bf16"] is True:
            raise UserError(f"{self.source}: fp16.enabled and bf16.enabled exclude each other; leave one at true")
        for name, enabled in asked.items():
            if enabled is True and name not in supported:
                raise UserError(
                    f"{self.source}: {name}.enabled is true, but this device has no {name}: "
                    f'set it to "auto" or false (the device has {", ".join(supported)})'
                )
        explicit = [name for name, enabled in asked.items() if enabled is True]
        automatic = [name for name in preferred if asked[name] == AUTO]
        precision = [*explicit, *automatic, "fp32"][0]
        if precision != "fp32" and self.zero_stage == 0:
            # DeepSpeed 0.19 does not scale the fp16 loss there and takes a dummy step at the start.
            raise UserError(f"{self.source}: {precision} needs zero_optimization.stage 1, 2 or 3, it is 0")
        return precision

    def resolved(self, precision: str, on_gpu: bool) -> dict[str, Any]:
        """The configuration that DeepSpeed is given: no "auto" left, gradients summed and reduced in fp32.

        Batch sizes are set later (`Engine.set_batch`), when the micro-batch is known; DeepSpeed would also refuse a
        `train_batch_size` that the processes do not divide.
        """
        content = copy.deepcopy(self.content)
        del content["train_batch_size"]
        content["train_micro_batch_size_per_gpu"] = content["gradient_accumulation_steps"] = 1
        for name in ("fp16", "bf16"):
            content[name] = {**content.get(name, {}), "enabled": precision == name}
        content["communication_data_type"] = "fp32"
        if self.zero_stage > 0:
            content["data_types"] = {"grad_accum_dtype": "fp32"}
            # Buckets of DeepSpeed's contiguous buffers have the weights' dtype and would round the fp32 sums.
            content["zero_optimization"]["contiguous_gradients"] = False
        params = content["optimizer"]["params"]
        if not self._offloads_optimizer and (not on_gpu or params.get("torch_adam", True)):
            # torch's fused Adam needs no compiler; DeepSpeed's FusedAdam is built by nvcc at the first start, and its
            # CPU build is not bit-reproducible. So that is for a GPU and who says "torch_adam": false.
            params.update(torch_adam=True, fused=True)
        content.setdefault("steps_per_print", None)
        return content

    @property
    def _offloads_optimizer(self) -> bool:
        offload = self.content.get("zero_optimization", {}).get("offload_optimizer") or {}
        return offload.get("device", "none") != "none"

    def _check(self) -> None:
        for key in self.content:
            if key in _OWNED_ELSEWHERE:
                raise UserError(f"{self.source}: remove {key!r}: {_OWNED_ELSEWHERE[key]}")
            if key not in _KNOWN_KEYS:
                raise UserError(f"{self.source}: {unknown_key_message('key', key, _KNOWN_KEYS)}")
        for section, known in SECTION_KEYS.items():
            self._check_section(section, self.content.get(section, {}), known)
        if "train_batch_size" not in self.content:
            raise UserError(f"{self.source}: train_batch_size is missing; the paper's is 8192")
        require_positive(f"{self.source}: train_batch_size", self.content["train_batch_size"])
        if (micro := self.content.get("train_micro_batch_size_per_gpu", AUTO)) != AUTO:
            require_positive(f'{self.source}: train_micro_batch_size_per_gpu (unless "auto")', micro)
        if self.content.get("gradient_accumulation_steps", AUTO) != AUTO:
            raise UserError(
                f"{self.source}: gradient_accumulation_steps follows from train_batch_size, the micro-batch and the "
                'number of processes: remove it or set it to "auto"'
            )
        for name in ("fp16", "bf16"):
            enabled = self.content.get(name, {}).get("enabled", False)
            if not isinstance(enabled, bool) and enabled != AUTO:  # 1 == True, yet is neither
                raise UserError(f'{self.source}: {name}.enabled must be true, false or "auto", got {enabled!r}')
        if self.zero_stage not in (0, 1, 2, 3) or isinstance(self.zero_stage, bool):
            raise UserError(f"{self.source}: zero_optimization.stage must be 0, 1, 2 or 3, got {self.zero_stage!r}")
        if self.content.get("zero_optimization", {}).get("contiguous_gradients", False):
            raise UserError(
                f"{self.source}: set zero_optimization.contiguous_gradients to false or remove it: DeepSpeed's buffers "
                "would round the gradients, which are summed in fp32, to the weights' precision"
            )
        if "gradient_clipping" not in self.content:
            raise UserError(
                f"{self.source}: gradient_clipping is missing; say it (0.0 is the paper's): DeepSpeed's default changed"
            )
        if not _is_number(clipping := self.content["gradient_clipping"]) or clipping < 0:
            raise UserError(f"{self.source}: gradient_clipping must be a number, 0.0 for none, got {clipping!r}")
        optimizer = self.content.get("optimizer")
        if not isinstance(optimizer, dict) or optimizer.get("type") not in _OPTIMIZER_TYPES:
            raise UserError(f"{self.source}: optimizer.type must be one of {', '.join(_OPTIMIZER_TYPES)}")
        self._check_section("optimizer", optimizer, {"type", "params"})
        self._check_section("optimizer.params", optimizer.get("params", {}), _OPTIMIZER_KEYS)
        self._check_learning_rate()
        params = optimizer["params"]
        for name in ("eps", "weight_decay"):
            if name in params and (not _is_number(params[name]) or params[name] < 0):
                raise UserError(f"{self.source}: optimizer.params.{name} must not be negative, got {params[name]!r}")
        betas = params.get("betas", [0.9, 0.999])
        if not isinstance(betas, list) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
            raise UserError(
                f"{self.source}: optimizer.params.betas must be two numbers from 0 on and below 1, got {betas!r}"
            )

    def _check_section(self, section: str, content: Any, known: set[str]) -> None:
        if not isinstance(content, dict):
            raise UserError(f"{self.source}: {section} must be a JSON object, got {content!r}")
        for key in content:
            if key not in known:
                raise UserError(f"{self.source}: {unknown_key_message(f'key in {section}', key, known)}")

    def _check_learning_rate(self) -> None:
        rate = self.content["optimizer"].get("params", {}).get("lr")
        if not _is_number(rate) or rate <= 0:
            raise UserError(f"{self.source}: optimizer.params.lr must be a positive number, got {rate!r}")


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number: no bool, no "auto", no NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
