"""Whether numbers are finite: checked for everything that is saved, resumed from, started from or exported."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Either makes the sum so too, which takes one pass and no mask; if the sum of finite numbers overflows, each of them
    is checked.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that is not finite."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)
