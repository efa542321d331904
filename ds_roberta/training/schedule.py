"""The learning rate and the share of masked tokens as pure functions of the step."""

from __future__ import annotations

from ds_roberta.config import MaskingConfig, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """RoBERTa's schedule: linear warm-up to the peak, then linear decay to zero (Liu et al. 2019, section 3.1).

    Args:
        step: the optimizer step about to be taken, from 1 to `max_steps`; the last one still learns a little.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return peak * (schedule.max_steps - step + 1) / (schedule.max_steps - schedule.warmup_steps)


def mlm_probability(schedule: ScheduleConfig, masking: MaskingConfig, step: int) -> float:
    """The share of tokens to mask: in a straight line from the run's first step to its last.

    Args:
        step: the optimizer step, counted from 0 as the loader does.
    """
    progress = step / max(schedule.max_steps - 1, 1)
    return masking.mlm_probability + (masking.final_probability - masking.mlm_probability) * progress
