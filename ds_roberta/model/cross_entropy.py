"""The vocabulary projection and its cross-entropy in one, without a float32 tensor of rows x vocabulary.

The logits are the largest tensor of a small model. They are held once, in the parameters' dtype, and overwritten by
their gradient; float32 is used for a few rows at a time (the idea of Hsu et al. 2024, Liger Kernel, section 3.2).

Shapes: M rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CPU_ROWS, _GPU_ROWS = 8, 1024
"""Rows in float32 at a time: on a CPU a block stays in the cache, on a GPU it fills the device."""


def linear_cross_entropy(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor, labels_M: torch.Tensor
) -> torch.Tensor:
    """The sum of the cross-entropies of `hidden @ weight.T + bias` against `labels`: a float32 scalar, in nats."""
    return _LinearCrossEntropy.apply(hidden_MD, weight_VD, bias_V, labels_M)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        logits = F.linear(hidden, weight, bias)
        losses = []
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32)
        rows = _CPU_ROWS if logits.device.type == "cpu" else _GPU_ROWS
        for block, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
            log_probs = torch.log_softmax(block, -1, dtype=torch.float32)
            losses.append(log_probs.gather(1, targets))
            gradient = log_probs.exp_().scatter_add_(1, targets, -torch.ones_like(losses[-1]))
            bias_gradient += gradient.sum(0)
            block.copy_(gradient)
        ctx.save_for_backward(hidden, weight, logits, bias_gradient)
        return -torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, logits_gradient, bias_gradient = ctx.saved_tensors
        (scale,) = gradients
        return (
            (logits_gradient @ weight) * scale.to(weight.dtype),
            logits_gradient.T @ (hidden * scale.to(hidden.dtype)),
            (bias_gradient * scale).to(weight.dtype),
            None,
        )
