"""Schedules of the learning rate and of the share to mask."""

from __future__ import annotations

import math

from ds_roberta.config import MaskingConfig, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Linear warm-up to the peak, then a decay; the default, "linear" to zero, is RoBERTa's (Liu et al. 2019, 3.1).

    With p, the share of the decay that is over, the rate is `peak * (r + (1 - r) * f(p))` where r is `min_lr_ratio`:

    * "linear": f = 1 - p, and r = 0.
    * "polynomial": f = (1 - p)^power, as in fairseq and transformers.
    * "cosine": f = (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, without restarts).
    * "warmup_stable_decay": the peak until the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395), then f by
      `decay_type`: 1 - p, the cosine, or 1 - sqrt(p) (Hägele et al. 2024, arXiv:2405.18392).

    After the warm-up these are transformers' values of the step before: p = 0 at the first step of the decay.

    Args:
        step: the optimizer step about to be taken, from 1 to `max_steps`; the last one still learns a little.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.lr_scheduler_type == "linear":
        return peak * (schedule.max_steps - step + 1) / (schedule.max_steps - schedule.warmup_steps)
    shape, decay_steps = schedule.lr_scheduler_type, schedule.max_steps - schedule.warmup_steps
    if shape == "warmup_stable_decay":
        assert schedule.decay_type is not None
        assert schedule.decay_steps is not None
        shape, decay_steps = schedule.decay_type, schedule.decay_steps
    passed = step - 1 - (schedule.max_steps - decay_steps)
    if passed <= 0:
        return peak
    assert schedule.min_lr_ratio is not None
    factor = _decay(shape, passed / decay_steps, schedule.lr_power)
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * factor)


def _decay(shape: str, progress: float, power: float | None) -> float:
    """The factor of a decay, from 1 at progress 0 to 0 at progress 1."""
    if shape == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if shape == "1-sqrt":
        return 1 - math.sqrt(progress)
    return (1 - progress) ** (1.0 if power is None else power)


def mlm_probability(schedule: ScheduleConfig, masking: MaskingConfig, step: int) -> float:
    """The share of tokens to mask, linear from the run's first step to its last.

    Args:
        step: the optimizer step, counted from 0 as the loader does.
    """
    progress = step / max(schedule.max_steps - 1, 1)
    return masking.mlm_probability + (masking.final_probability - masking.mlm_probability) * progress
