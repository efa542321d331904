"""The DeepSpeed JSON: read, checked key by key, and completed for this machine.

DeepSpeed silently ignores a misspelt key, so every key is compared with the known ones (`deepspeed_keys`) here, before
any work, and all problems of a file are reported at once. `"auto"` leaves a value to the machine:
`train_micro_batch_size_per_gpu`, `fp16.enabled`, `bf16.enabled`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_roberta.deepspeed_keys import AUTO, MUON_PARAMS, accepted_part, problems
from ds_roberta.errors import UserError
from ds_roberta.files import load_json

PRECISIONS = ("fp32", "fp16", "bf16")
_MONITORS = ("tensorboard", "csv_monitor", "wandb")

_OPTIMIZER_TYPES = ("adam", "adamw", "muon")  # in upper or lower case, as in DeepSpeed
_OTHER_OPTIMIZERS = (
    *("adagrad", "lamb", "lion", "muadam", "muadamw", "musgd"),
    *("onebitadam", "zerooneadam", "onebitlamb", "sgd", "rmsprop", "adamax", "nadam", "radam", "adafactor"),
)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A checked DeepSpeed JSON with the overrides of the command line applied."""

    content: dict[str, Any]
    source: str

    @classmethod
    def read(
        cls,
        path: Path,
        train_batch_size: int | None = None,
        learning_rate: float | None = None,
        muon_lr: float | None = None,
    ) -> DeepSpeedConfig:
        """Read a JSON file.

        Raises:
            UserError: it is missing, is not a JSON object, or has a wrong key or value.
        """
        content = read_content(path)
        if train_batch_size is not None:
            content["train_batch_size"] = train_batch_size
        config = cls(content, str(path))
        if isinstance(content.get("optimizer"), dict):
            content["optimizer"].setdefault("params", {})
            config._override_rates(learning_rate, muon_lr)
        config._check()
        return config

    def with_optimizer_params(
        self, params: Mapping[str, float], learning_rate: float | None, muon_lr: float | None = None
    ) -> DeepSpeedConfig:
        """The same with other values in `optimizer.params`, but with the command line's learning rates, if given."""
        content = copy.deepcopy(self.content)
        content["optimizer"]["params"] |= params
        config = DeepSpeedConfig(content, self.source)
        config._override_rates(learning_rate, muon_lr)
        return config

    def _override_rates(self, learning_rate: float | None, muon_lr: float | None) -> None:
        if learning_rate is not None:
            self._params["adam_lr" if self._is_muon else "lr"] = learning_rate
        if muon_lr is None:
            return
        if not self._is_muon:
            raise UserError(
                f"--muon_lr {muon_lr} does nothing: the optimizer of {self.source!r} is "
                f"{_section(self.content, 'optimizer').get('type')}: remove it, or choose Muon there"
            )
        self._params["muon_lr"] = muon_lr

    @property
    def train_batch_size(self) -> int:
        return self.content["train_batch_size"]

    @property
    def micro_batch_size(self) -> int | None:
        """`train_micro_batch_size_per_gpu`; None if it is "auto"."""
        value = self.content.get("train_micro_batch_size_per_gpu", AUTO)
        return None if value == AUTO else value

    @property
    def learning_rate(self) -> float:
        """The peak of Adam's parameters; with Muon, `lr` replaces a missing `adam_lr` or `muon_lr`, as in DeepSpeed."""
        return self._params["adam_lr"] if "adam_lr" in self._params else self._params["lr"]

    @property
    def muon_lr(self) -> float | None:
        """The peak of Muon's matrices; None if the optimizer is not Muon."""
        if not self._is_muon:
            return None
        return self._params["muon_lr"] if "muon_lr" in self._params else self._params["lr"]

    @property
    def zero_stage(self) -> int:
        return self.content.get("zero_optimization", {}).get("stage", 0)

    @property
    def recomputed_layers(self) -> int:
        """The number of layers whose activations the backward pass computes again, instead of keeping them."""
        return _section(self.content, "activation_checkpointing").get("number_checkpoints") or 0

    def precision(self, preferred: tuple[str, ...], supported: tuple[str, ...]) -> str:
        """The run's precision, one of `PRECISIONS`.

        Args:
            preferred: low precisions that "auto" can switch on here; the first that the JSON sets to "auto" is used.
            supported: precisions that the device supports.

        Raises:
            UserError: the JSON asks for fp16 and bf16, or for one that the device or the ZeRO stage does not support.
        """
        asked = {name: self.content.get(name, {}).get("enabled", False) for name in ("fp16", "bf16")}
        if asked["fp16"] is True and asked["bf16"] is True:
            raise UserError(f"{self.source}: fp16.enabled and bf16.enabled exclude each other: set only one to true")
        for name, enabled in asked.items():
            if enabled is True and name not in supported:
                raise UserError(
                    f"{self.source}: {name}.enabled is true, but this device has no {name}: "
                    f'set it to "auto" or false (it supports {", ".join(supported)})'
                )
        explicit = [name for name, enabled in asked.items() if enabled is True]
        automatic = [name for name in preferred if asked[name] == AUTO]
        precision = [*explicit, *automatic, "fp32"][0]
        if precision != "fp32" and self.zero_stage == 0:
            # At stage 0, DeepSpeed 0.19 does not scale the fp16 loss and takes a dummy step at the start.
            raise UserError(f"{self.source}: {precision} needs zero_optimization.stage 1, 2 or 3, but it is 0")
        if precision != "fp32" and self.zero_stage == 2 and self._is_offloaded("offload_optimizer"):
            # At stage 2, DeepSpeed's buffers for gradients on the host have the weights' dtype.
            raise UserError(
                f"{self.source}: zero_optimization.offload_optimizer at stage 2 would round the gradients, which are "
                f"summed in fp32, to {precision}: use stage 1 or 3, or leave the optimizer on the device"
            )
        return precision

    def resolved(self, precision: str, on_gpu: bool) -> dict[str, Any]:
        """The configuration passed to DeepSpeed: no "auto" left, gradients summed and reduced in fp32, no monitors.

        Batch sizes are set later (`Engine.set_batch`), when the micro-batch is known; DeepSpeed would also reject a
        `train_batch_size` that is not a multiple of the number of processes.
        """
        content = {
            key: value for key, value in copy.deepcopy(accepted_part(self.content)).items() if key not in _MONITORS
        }
        del content["train_batch_size"]
        if not self.recomputed_layers:
            content.pop("activation_checkpointing", None)
        content["train_micro_batch_size_per_gpu"] = content["gradient_accumulation_steps"] = 1
        for name in ("fp16", "bf16"):
            content[name] = {**content.get(name, {}), "enabled": precision == name}
        content["communication_data_type"] = "fp32"
        if self.zero_stage > 0:
            content["data_types"] = {"grad_accum_dtype": "fp32"}
            # Buckets of DeepSpeed's contiguous buffers have the weights' dtype and would round the fp32 sums.
            content["zero_optimization"]["contiguous_gradients"] = False
        params = content["optimizer"]["params"]
        params.setdefault("weight_decay", 0.0)  # DeepSpeed's default; that of torch's AdamW is 0.01
        if self._is_offloaded("offload_optimizer") or not on_gpu or params.get("torch_adam", True):
            # torch's fused Adam needs no compiler. DeepSpeed's FusedAdam is built by nvcc at the first start, and its
            # CPU versions, used for offloading too, are not bit-reproducible: it is used only on a GPU, with
            # "torch_adam": false.
            params.update(torch_adam=True, fused=True)
        if self._is_muon:  # our own, which DeepSpeed does not know
            content |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        # The timer's rates are never printed, and it synchronizes with the GPU at every micro-step.
        content["timers"] = {"throughput": {"enabled": False}}
        return content

    @property
    def notes(self) -> list[str]:
        """Lines for the log about settings that differ from the file."""
        if self.content.get("zero_optimization", {}).get("contiguous_gradients"):
            return [
                f"{self.source}: zero_optimization.contiguous_gradients is set to false: DeepSpeed's buffers would "
                "round the gradients, which are summed in fp32, to the weights' precision"
            ]
        return []

    @property
    def monitors(self) -> dict[str, dict[str, Any]]:
        """The sections of the enabled monitors."""
        sections = {name: self.content.get(name) or {} for name in _MONITORS}
        return {name: section for name, section in sections.items() if section.get("enabled")}

    def _is_offloaded(self, section: str) -> bool:
        offload = _section(_section(self.content, "zero_optimization"), section)
        return offload.get("device", "none") != "none"

    def _check(self) -> None:
        """Raise one `UserError` with everything that is wrong."""
        found = [*problems(self.content), *self._missing(), *self._contradictions()]
        if len(found) == 1:
            raise UserError(f"{self.source}: {found[0]}")
        if found:
            raise UserError(f"{self.source} has {len(found)} problems:", *found)

    def _missing(self) -> list[str]:
        found = []
        if "train_batch_size" not in self.content:
            found.append("train_batch_size is missing; the paper's is 8192")
        if "gradient_clipping" not in self.content:
            found.append("gradient_clipping is missing; set it (0.0 is the paper's): DeepSpeed's default has changed")
        rates = ("muon_lr", "adam_lr") if self._is_muon else ("lr",)
        if "lr" not in self._params:
            found += [
                f"optimizer.params.{name} must be a positive number, got None"
                for name in rates
                if name not in self._params
            ]
        return found

    def _contradictions(self) -> list[str]:
        """Describe values that are valid alone but contradict each other."""
        found = []
        optimizer = _section(self.content, "optimizer")
        type_ = str(optimizer.get("type")).lower()
        if type_ not in _OPTIMIZER_TYPES:
            reason = "; portable checkpoints and bit-identical resume support only the moments of these"
            about = reason if type_ in _OTHER_OPTIMIZERS else ""
            found.append(f"optimizer.type must be one of Adam, AdamW, Muon, got {optimizer.get('type')!r}{about}")
        if type_ == "adamw" and self._params.get("adam_w_mode") is False:
            found.append('optimizer.params.adam_w_mode is false, but optimizer.type is AdamW: write "Adam", or true')
        for name in () if self._is_muon else MUON_PARAMS:
            if name in self._params:
                found.append(f"remove 'optimizer.params.{name}': it belongs to Muon")
        for name in ("adam_w_mode", "torch_adam") if self._is_muon else ():
            if self._params.get(name) is False:
                found.append(f"optimizer.params.{name} is false, but Muon's other parameters have torch's AdamW")
        stage = _section(self.content, "zero_optimization").get("stage", 0)
        if self._is_offloaded("offload_param") and stage != 3:
            found.append(
                f"zero_optimization.offload_param needs stage 3, but it is {stage!r}: remove it or raise the stage"
            )
        if not self._is_offloaded("offload_optimizer"):
            return found
        if stage not in (1, 2, 3):
            found.append(f"zero_optimization.offload_optimizer needs stage 1, 2 or 3, but it is {stage!r}")
        if self._params.get("torch_adam") is False:
            found.append(
                "optimizer.params.torch_adam is false, but zero_optimization.offload_optimizer uses torch's Adam: "
                "with DeepSpeed's own CPU Adam no run resumes bit-identically; remove it or set it to true"
            )
        return found

    @property
    def _is_muon(self) -> bool:
        return str(_section(self.content, "optimizer").get("type")).lower() == "muon"

    @property
    def _params(self) -> dict[str, Any]:
        return _section(_section(self.content, "optimizer"), "params")


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a JSON that is not checked yet; empty if it is not an object."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def read_content(path: Path) -> dict[str, Any]:
    """The object in a DeepSpeed JSON; raises `UserError` if it cannot be read, is not one, or gives a key twice."""
    try:
        content = load_json(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    except OSError as error:
        raise UserError(
            f"cannot read --deepspeed_config {str(path)!r} ({error.strerror}): ready ones are in ds_configs/"
        ) from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} must be a JSON object, not of type {type(content).__name__}")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return content
