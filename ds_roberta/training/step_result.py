"""What the trainer is told of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """What the optimizer did: `skipped` where fp16's loss scale made the gradient overflow and nothing was updated.

    `grad_norm` is the 2-norm before clipping, infinite where it is not finite; `loss_scale` is 1 without fp16.
    """

    grad_norm: float
    skipped: bool
    loss_scale: float
