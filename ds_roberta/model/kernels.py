"""Attention, dropout, cross-entropy, embeddings and LayerNorm, for cases where torch's are slow or inexact on a CPU or
take too much memory.

Shapes: B sequences, H heads, T tokens, K size of a head; N tokens of all sequences; M rows, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.data.layout import FlatLayout

_LEVELS = 1 << 16
_CPU_ROWS, _GPU_ROWS = 8, 1024
"""Rows in float32 at a time: on a CPU a block stays in the cache, on a GPU it fills the device."""


def keep_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """0 with probability `p`, to the nearest 1/65,536, otherwise 1: int16, drawn from torch's CPU generator.

    torch draws one Bernoulli number after another on a CPU. Comparing 16 random bits per element from one SFC64 stream
    as integers is eight times faster.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    count = math.prod(shape)
    bits = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count])
    return bits.ge_(round(p * _LEVELS) - _LEVELS // 2).view(shape)


def apply_mask(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`values` where `keep` is 1, else zero; contiguous, of the same shape."""
    # A 16-bit float's bits times 0 or 1 are zero or the value.
    if values.element_size() == 2:
        return (values.view(torch.int16) * keep).view(values.dtype)
    return values * keep


class _CPUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, p: float) -> torch.Tensor:
        keep = keep_mask(values.shape, p)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return apply_mask(values, keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        return apply_mask(gradients[0].contiguous(), keep).mul_(ctx.scale), None


def cpu_dropout(values: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout with masks from `keep_mask`, whether in training or not."""
    return _CPUDropout.apply(values, p)


class Dropout(nn.Dropout):
    """`nn.Dropout`, with our own masks on a CPU."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if values.device.type != "cpu":
            return F.dropout(values, self.p, self.training)
        return cpu_dropout(values, self.p) if self.training and self.p else values


class Embedding(nn.Embedding):
    """`nn.Embedding`, whose backward pass on a CPU adds up a row's gradients in 16 bits if they have these: in a
    micro-batch of 8,192 tokens, that of a frequent token is then wrong by 6% and more.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return table_rows(self.weight, ids) if self.weight.device.type == "cpu" else super().forward(ids)


def table_rows(table_VD: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`F.embedding`, with gradients added up exactly on a CPU: (…) ids to (…, D)."""
    if table_VD.device.type != "cpu":  # there, `index_select` adds them up inexactly and in any order
        return F.embedding(ids, table_VD)
    return table_VD.index_select(0, ids.flatten()).unflatten(0, ids.shape)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, whose backward pass on a CPU adds up the gradients of weight and bias in 16 bits if they have
    these: in a micro-batch of 8,192 tokens they are then wrong by 10 and 50%.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if values.device.type == "cpu" and values.element_size() == 2 and torch.is_grad_enabled():
            return _CPULayerNorm.apply(values, self.weight, self.bias, self.eps)
        return super().forward(values)


class _CPULayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        output, mean, rstd = torch.native_layer_norm(values, weight_D.shape, weight_D, bias_D, eps)
        ctx.save_for_backward(values, weight_D, bias_D, mean, rstd)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        values, weight_D, bias_D, mean, rstd = ctx.saved_tensors
        gradient, shape = gradients[0].contiguous(), list(weight_D.shape)
        of_values, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, values, shape, mean, rstd, weight_D, bias_D, [True, False, False]
        )
        normalised = torch.native_layer_norm(values, shape, None, None, ctx.eps)[0]
        of_weight_D = normalised.mul_(gradient).flatten(0, -2).sum(0)  # `sum` adds in fp32
        return of_values, of_weight_D, gradient.flatten(0, -2).sum(0), None


def attention(
    query_BHTK: torch.Tensor,
    key_BHTK: torch.Tensor,
    value_BHTK: torch.Tensor,
    mask_B11T: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """softmax(Q Kᵀ / √K) V, with dropout of the weights.

    On a CPU torch's fused kernel takes twice the time of plain products in bf16, and leaves its fast path with dropout.
    On a GPU torch uses flash attention in 16 bits if no key is masked, else the memory-efficient kernel; never cuDNN's,
    see `set_gpu_arithmetic`. Their forward passes are reproducible bit for bit. Their backward passes may add the key
    blocks' shares of a query's gradient in any order, so two runs can round differently.

    Args:
        mask_B11T: bool, false at keys to ignore; None to attend to all.
        dropout_p: 0 outside training.

    Returns:
        (B, H, T, K) in the arguments' dtype.
    """
    if query_BHTK.device.type == "cpu":
        return plain_attention(query_BHTK, key_BHTK, value_BHTK, mask_B11T, dropout_p)
    return F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, mask_B11T, dropout_p)


def set_gpu_arithmetic() -> None:
    """Keep torch from fast but inexact arithmetic on a GPU in this process, also for transformers' models.

    Products in fp32 do not use TF32, and the partial sums of those in 16 bits are added in fp32, whatever torch's
    defaults and the environment say. cuDNN's attention is excluded: torch prefers it on some GPUs (including H100), and
    it is silently wrong. Its dropout rounds the probability to sixteenths (0.1 becomes 1/16 or 2/16; torch avoids that
    from 2.12 on: pytorch/pytorch#174245), and with a mask its backward pass can give NaN at lengths of 64 mod 128
    (pytorch/pytorch#196678).
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def plain_attention(*arguments: Any) -> torch.Tensor:
    """As `attention`, with plain products and dropout by `keep_mask`."""
    return _PlainAttention.apply(*arguments)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout_p: float,
    ) -> torch.Tensor:
        ctx.dropout_p = dropout_p
        attended, saved = _attend(query, key, value, mask, dropout_p)
        ctx.save_for_backward(*saved)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_attend_backward(gradients[0], ctx.saved_tensors, ctx.dropout_p), None, None


def flat_attention(
    query_ND: torch.Tensor,
    key_ND: torch.Tensor,
    value_ND: torch.Tensor,
    layout: FlatLayout,
    heads: int,
    dropout_p: float,
) -> torch.Tensor:
    """`attention` of each part of a flat layout to itself: (N, D) in the arguments' dtype.

    On a GPU this is flash attention of varying lengths, for 16 bits only. `torch.nn.attention.varlen` has no dropout;
    the operator beneath nested tensors, which is called here, does.
    """
    if layout.cu_seqlens is None:
        return _FlatAttention.apply(query_ND, key_ND, value_ND, layout, heads, dropout_p)
    query_NHK, key_NHK, value_NHK = (each.unflatten(-1, (heads, -1)) for each in (query_ND, key_ND, value_ND))
    bounds, longest = layout.cu_seqlens, layout.longest
    attended_NHK, *_ = torch.ops.aten._flash_attention_forward(
        query_NHK, key_NHK, value_NHK, bounds, bounds, longest, longest, dropout_p, False, False
    )
    return attended_NHK.flatten(1)


class _FlatAttention(torch.autograd.Function):
    """`_PlainAttention`, a block after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: FlatLayout,
        heads: int,
        dropout_p: float,
    ) -> torch.Tensor:
        ctx.layout, ctx.heads, ctx.dropout_p = layout, heads, dropout_p
        out = torch.empty_like(query)
        out[layout.tokens :] = 0
        kept: list[torch.Tensor | None] = []
        for block in layout.blocks:
            own = [split_heads(block.spread(each), heads) for each in (query, key, value)]
            mask = None if block.is_token is None else block.is_token[:, None, None, :]
            attended, saved = _attend(own[0], own[1], own[2], mask, dropout_p)
            block.collect(attended.transpose(1, 2), out)
            kept += saved
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, found = ctx.saved_tensors, [torch.empty_like(gradients[0]) for _ in range(3)]
        for each in found:
            each[ctx.layout.tokens :] = 0
        for number, block in enumerate(ctx.layout.blocks):
            saved = kept[number * _SAVED : (number + 1) * _SAVED]
            gradient = split_heads(block.spread_gradient(gradients[0]), ctx.heads)
            for each, out in zip(_attend_backward(gradient, saved, ctx.dropout_p), found, strict=True):
                block.collect(each.transpose(1, 2), out)
        return *found, None, None, None


def split_heads(values_BTD: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, D) as (B, H, T, D / H)."""
    return values_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)


_SAVED = 5
"""Tensors that `_attend` keeps for the backward pass."""


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout_p: float
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """`attention` by plain products, and what `_attend_backward` needs; dropout scales the small tensors only."""
    query = query * query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    weights = torch.softmax(scores, -1)
    keep = keep_mask(weights.shape, dropout_p) if dropout_p else None
    saved = (query, key, value, weights, keep)
    if keep is None:
        return weights @ value, saved
    return (apply_mask(weights, keep) @ value).mul_(1 / (1 - dropout_p)), saved


def _attend_backward(
    gradient: torch.Tensor, saved: Sequence[Any], dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value."""
    query, key, value, weights, keep = saved
    kept = weights
    if keep is not None:
        gradient, kept = gradient * (1 / (1 - dropout_p)), apply_mask(weights, keep)
    value_gradient = kept.transpose(-1, -2) @ gradient
    weights_gradient = gradient @ value.transpose(-1, -2)
    if keep is not None:
        weights_gradient = apply_mask(weights_gradient, keep)
    scores_gradient = torch._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
    query_gradient = (scores_gradient @ key).mul_(query.shape[-1] ** -0.5)
    return query_gradient, scores_gradient.transpose(-1, -2) @ query, value_gradient


CrossEntropy = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes logits, (M, V), and labels, (M,), of which the last ones may be missing: those rows count for nothing.

It returns the sum of the cross-entropies, a float32 scalar in nats, and the sum of their gradients over the rows, (V,)
float32. The logits are overwritten by their gradient.
"""


def cross_entropy_by_rows(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`CrossEntropy`, a few rows at a time in float32 (the idea of Hsu et al. 2024, Liger Kernel, section 3.2)."""
    losses = []
    summed = torch.zeros(logits_MV.shape[1], device=logits_MV.device)
    logits_MV[len(labels_M) :] = 0
    rows = _CPU_ROWS if logits_MV.device.type == "cpu" else _GPU_ROWS
    for block, targets in zip(logits_MV[: len(labels_M)].split(rows), labels_M[:, None].split(rows), strict=True):
        log_probs = torch.log_softmax(block, -1, dtype=torch.float32)
        losses.append(log_probs.gather(1, targets))
        gradient = log_probs.exp_().scatter_add_(1, targets, -torch.ones_like(losses[-1]))
        summed += gradient.sum(0)
        block.copy_(gradient)
    return -torch.cat(losses).sum(), summed


def whole_cross_entropy(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`CrossEntropy` in one expression, for torch.compile; a label below 0 is a missing one."""
    has_label_M1 = (labels_M >= 0)[:, None]
    is_label_MV = torch.arange(logits_MV.shape[1], device=logits_MV.device) == labels_M[:, None]
    log_probs_MV = torch.log_softmax(logits_MV, -1, dtype=torch.float32)
    loss = -torch.where(is_label_MV, log_probs_MV, 0).sum()
    gradient_MV = (log_probs_MV.exp() - is_label_MV.float()) * has_label_M1
    logits_MV.copy_(gradient_MV)
    return loss, gradient_MV.sum(0)


def linear_cross_entropy(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_M: torch.Tensor,
    cross_entropy: CrossEntropy = cross_entropy_by_rows,
) -> torch.Tensor:
    """The sum of the cross-entropies of `hidden @ weight.T + bias` against `labels`: a float32 scalar, in nats.

    There may be fewer labels than rows of `hidden`; the last rows then count for nothing.

    The logits are the largest tensor of a small model. They are held once, in the parameters' dtype.
    """
    return _LinearCrossEntropy.apply(hidden_MD, weight_VD, bias_V, labels_M, cross_entropy)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        cross_entropy: CrossEntropy,
    ) -> torch.Tensor:
        logits = F.linear(hidden, weight, bias)
        loss, bias_gradient = cross_entropy(logits, labels)
        ctx.save_for_backward(hidden, weight, logits, bias_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, logits_gradient, bias_gradient = ctx.saved_tensors
        (scale,) = gradients
        return (
            (logits_gradient @ weight) * scale.to(weight.dtype),
            logits_gradient.T @ (hidden * scale.to(hidden.dtype)),
            (bias_gradient * scale).to(weight.dtype),
            None,
            None,
        )
