"""Whether numbers are finite: asked of all that is saved, resumed from, begun with or exported."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    One of these makes the sum so too, which is known in one pass without a mask; where the sum of finite numbers
    overflows, each is looked at.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that `is_finite` denies."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)
