"""What an optimizer is given, groups of parameters, and what its step says."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Groups = list[dict[str, Any]] | None
"""Parameter groups, as torch's optimizers take them; None if all parameters are treated alike."""


def parameter_groups(
    model: nn.Module, no_decay_bias_and_norm: bool, fixed: Collection[torch.Tensor] = frozenset()
) -> Groups:
    """Groups of the parameters that are treated in their own way.

    Args:
        no_decay_bias_and_norm: biases and LayerNorms, the model's vectors, are exempt from weight decay.
        fixed: those that keep their values; their group has an `lr_ratio` of 0, see `Engine.step`.
    """
    trained = [parameter for parameter in model.parameters() if parameter not in fixed]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if no_decay_bias_and_norm:
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
        ]
    if fixed:
        groups.append({"params": list(fixed), "lr_ratio": 0.0})
    return groups if len(groups) > 1 else None


@dataclass(frozen=True)
class StepResult:
    """What the optimizer did: `skipped` if fp16's loss scale made the gradient overflow and nothing was updated.

    `grad_norm` is the 2-norm before clipping, infinite if it is not finite; `loss_scale` is 1 without fp16.
    """

    grad_norm: float
    skipped: bool
    loss_scale: float
