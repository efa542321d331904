"""What counts as a spike of the loss: a pure function of the step's loss and the losses before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ds_roberta.errors import UserError

WINDOW = 100
"""Number of earlier losses that a loss is compared with; a stage's first losses, which fall fast, are not checked."""
_DEVIATIONS_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


class LossSpike(UserError):
    """A loss is far above those before it, or a number is not finite; nothing of the step is saved.

    Attributes:
        problem: the message without the remedy, which a rollback does not need.
        step: the last step whose data was drawn, counted from 1.
    """

    def __init__(
        self,
        problem: str,
        step: int,
        remedy: str = ": lower the learning rate or warm up longer, and resume from the last checkpoint",
    ):
        super().__init__(problem + remedy)
        self.problem, self.step = problem, step


def spike_limit(recent_losses: Sequence[float], threshold: float) -> float:
    """The largest loss that is not a spike: median + threshold * robust standard deviation of the recent losses.

    Single outliers hardly move either (Hampel 1974, "The influence curve and its role in robust estimation").
    It is infinite until there are `WINDOW` losses. A falling loss widens the deviation and raises the limit, and no
    loss is too low.
    """
    if len(recent_losses) < WINDOW:
        return math.inf
    median = statistics.median(recent_losses)
    deviation = statistics.median(abs(loss - median) for loss in recent_losses)
    return median + threshold * _DEVIATIONS_TO_SIGMA * deviation


def with_loss(recent_losses: Sequence[float], loss: float) -> list[float]:
    """The last `WINDOW` losses with this step's, spikes included, so that a loss that stays high becomes normal."""
    return [*recent_losses, *([loss] if math.isfinite(loss) else [])][-WINDOW:]
