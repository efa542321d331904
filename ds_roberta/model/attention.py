"""Scaled dot-product attention: torch's fused kernels on a GPU; on a CPU plain matrix products.

On a CPU torch's fused kernel takes twice the time of plain products in bf16, and with dropout leaves its fast path.

On a GPU torch uses flash attention in 16 bits if no key is masked, else the memory-efficient kernel; never cuDNN's,
see `exclude_cudnn`. Their forward passes are reproducible bit for bit. Their backward passes may add the key blocks'
shares of a query's gradient in any order, so two runs can round differently.

Shapes: B sequences, H heads, T tokens, K size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ds_roberta.model.dropout import apply_mask, keep_mask


def attention(
    query_BHTK: torch.Tensor,
    key_BHTK: torch.Tensor,
    value_BHTK: torch.Tensor,
    mask_B11T: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """softmax(Q Kᵀ / √K) V, with dropout of the weights.

    Args:
        mask_B11T: bool, false at keys that nobody attends to; None if all are attended to.
        dropout_p: 0 outside training.

    Returns:
        (B, H, T, K) in the arguments' dtype.
    """
    if query_BHTK.device.type == "cpu":
        return plain_attention(query_BHTK, key_BHTK, value_BHTK, mask_B11T, dropout_p)
    return F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, mask_B11T, dropout_p)


def exclude_cudnn() -> None:
    """Keep torch from choosing cuDNN's attention in this process, also for transformers' models.

    torch prefers it on some GPUs (including H100), and it is silently wrong: its dropout rounds the probability to
    sixteenths (0.1 becomes 1/16 or 2/16; torch avoids that from 2.12 on: pytorch/pytorch#174245), and with a
    mask its backward pass can give NaN at lengths of 64 mod 128 (pytorch/pytorch#196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def plain_attention(*arguments: Any) -> torch.Tensor:
    """`attention` with plain products and masks from `keep_mask`."""
    return _PlainAttention.apply(*arguments)


class _PlainAttention(torch.autograd.Function):
    """Plain products; dropout scales the small tensors rather than the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout_p: float,
    ) -> torch.Tensor:
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-1, -2)
        if mask is not None:
            scores.masked_fill_(~mask, float("-inf"))
        weights = torch.softmax(scores, -1)
        ctx.keep = keep_mask(weights.shape, dropout_p) if dropout_p else None
        ctx.scale = 1 / (1 - dropout_p)
        ctx.save_for_backward(query, key, value, weights)
        if ctx.keep is None:
            return weights @ value
        return (apply_mask(weights, ctx.keep) @ value).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        gradient, kept = gradients[0], weights
        if ctx.keep is not None:
            gradient, kept = gradient * ctx.scale, apply_mask(weights, ctx.keep)
        value_gradient = kept.transpose(-1, -2) @ gradient
        weights_gradient = gradient @ value.transpose(-1, -2)
        if ctx.keep is not None:
            weights_gradient = apply_mask(weights_gradient, ctx.keep)
        scores_gradient = torch._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
        query_gradient = (scores_gradient @ key).mul_(query.shape[-1] ** -0.5)
        return query_gradient, scores_gradient.transpose(-1, -2) @ query, value_gradient, None, None
