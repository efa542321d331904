"""Which parameters weight decay holds for."""

from __future__ import annotations

from typing import Any

from torch import nn

Groups = list[dict[str, Any]] | None
"""Of parameters, as torch's optimizers take them; None: all alike."""


def without_bias_and_norm(model: nn.Module) -> Groups:
    """Groups of parameters by which weight decay leaves out biases and LayerNorms, the vectors of the model."""
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]
