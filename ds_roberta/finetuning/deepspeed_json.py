"""The DeepSpeed JSON of a fine-tuning, which transformers' Trainer completes from the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ds_roberta.deepspeed_config import read_content
from ds_roberta.deepspeed_keys import unknown_keys
from ds_roberta.errors import UserError

_AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_GATHER = "stage3_gather_16bit_weights_on_model_save"  # in the weights' own precision


def read_deepspeed_json(path: Path | None) -> dict[str, Any] | None:
    """Read a DeepSpeed JSON for fine-tuning and check it; None without a path.

    Raises:
        UserError: the file cannot be read, is not a JSON object, has a key that DeepSpeed does not know or a value that
            it refuses, or sets what the command line sets.
    """
    if path is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed_config needs deepspeed, which is not installed: pip install deepspeed")
    content = read_content(path)
    if unknown := unknown_keys(content):
        raise UserError(f"--deepspeed_config {str(path)!r}: {unknown[0]}", *unknown[1:])
    for name in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(content.get(name, {}), dict):
            raise UserError(f"--deepspeed_config {str(path)!r} has {name} {content[name]!r}: write an object, {{…}}")
    settled: list[str] = [name for name in ("optimizer", "scheduler") if name in content]
    settled += [name for name in _AUTO if content.get(name, "auto") != "auto"]
    precisions = {name: content.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    settled += [f"{name}.enabled" for name, enabled in precisions.items() if enabled != "auto"]
    if settled:
        raise UserError(
            f"--deepspeed_config {str(path)!r} sets {', '.join(settled)}, which fine-tuning's command line sets: "
            'remove it or write "auto", as in ds_configs/finetune.json'
        )
    zero = content.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.setdefault(_GATHER, True):
        raise UserError(
            f"--deepspeed_config {str(path)!r} has {_GATHER} false, so no model could be written: remove it"
        )
    if content.get("activation_checkpointing", {}) != {}:
        raise UserError(
            f"--deepspeed_config {str(path)!r} has activation_checkpointing, which does nothing in fine-tuning: remove "
            "it"
        )
    from ds_roberta.training.device import refused_by_deepspeed  # which takes seconds to import

    if reason := refused_by_deepspeed(content):
        raise UserError(f"DeepSpeed refuses --deepspeed_config {str(path)!r} ({reason}): correct the value")
    return content
