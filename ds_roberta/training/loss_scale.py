"""fp16's loss scale: DeepSpeed's scaler, which grows only when a step is over, and overflows that it cannot cure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ds_roberta.errors import UserError

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_NAMES_SHOWN = 3


class LossScale:
    """The loss scale of DeepSpeed's fp16 optimizer.

    Args:
        wrapper: that optimizer; its `_update_scale` is replaced. (Its scaler is pickled with DeepSpeed's checkpoints,
            so that is not changed.)
        non_finite_gradients: names the parameters whose reduced gradient is not finite; a collective call.
    """

    def __init__(self, wrapper: Any, non_finite_gradients: Callable[[], list[str]]):
        self._wrapper, self._non_finite_gradients = wrapper, non_finite_gradients
        self._loss_is_finite = True
        # DeepSpeed calls it before it divides the gradient by the scale, or clears what has overflowed.
        wrapper._update_scale = self._update

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's; a checkpoint in its own layout brings another one."""
        return self._wrapper.loss_scaler

    @property
    def state(self) -> dict[str, float]:
        """The numbers of a dynamic scaler; empty if the scale is fixed."""
        return {name: getattr(self._scaler, name) for name in _STATE} if self._scaler.dynamic else {}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        for name, value in state.items() if self._scaler.dynamic else ():
            setattr(self._scaler, name, value)

    @property
    def value(self) -> float:
        return float(self._scaler.loss_scale)

    def begin_step(self, loss: float) -> None:
        """Note a step's loss, the same on all ranks: if it is not finite, the loss scale is not to blame."""
        self._loss_is_finite = math.isfinite(loss)

    def end_step(self) -> bool:
        """Count a step that has been taken; returns whether DeepSpeed skipped it because the gradient overflowed."""
        if self._loss_is_finite and not self._wrapper.overflow:
            self._scaler.update_scale(False)
        return self._loss_is_finite and bool(self._wrapper.overflow)

    def _update(self, overflow: bool) -> None:
        """Lower the scale after an overflow, on all ranks alike.

        DeepSpeed would skip steps forever where it cannot, or end with a traceback. It would also double the scale
        here after enough steps without an overflow, and divide the gradient by twice the scale that it has.
        """
        if not overflow or not self._loss_is_finite:
            return
        if not self._can_fall:
            floor = "at its floor (fp16.min_loss_scale)" if self._scaler.dynamic else "fixed (fp16.loss_scale)"
            names = self._non_finite_gradients()
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            raise UserError(
                f"the gradient overflows in fp16 with the loss scale {self._scaler.cur_scale:g}, which is {floor} (not "
                f"finite: {', '.join(names[:_NAMES_SHOWN]) or 'no single parameter'}{more}): lower the "
                "learning rate or warm up longer, let the scale fall further, or train in bf16 or fp32, from the "
                "last checkpoint"
            )
        self._scaler.update_scale(True)

    @property
    def _can_fall(self) -> bool:
        scaler = self._scaler
        if not scaler.dynamic:
            return False
        tolerates = scaler.delayed_shift > 1 and scaler.cur_hysteresis > 1  # DeepSpeed's count of free overflows
        return bool(tolerates or scaler.cur_scale > scaler.min_scale)
