"""The learning rate as a pure function of the step."""

from __future__ import annotations

from ds_roberta.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """RoBERTa's schedule: linear warm-up to the peak, then linear decay to zero (Liu et al. 2019, section 3.1).

    Args:
        step: the optimizer step about to be taken, from 1 to `max_steps`; the last one still learns a little.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return peak * (schedule.max_steps - step + 1) / (schedule.max_steps - schedule.warmup_steps)
