"""`"train_micro_batch_size_per_gpu": "auto"`: the largest micro-batch that fits this device.

On a GPU, memory is measured in the running process at two small sizes, with gradients and optimizer state there, and
grows in a straight line between and beyond them. All ranks take the smallest answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_roberta.config import MaskingConfig
from ds_roberta.data.loader import MicroBatch

if TYPE_CHECKING:  # sizes are computed without DeepSpeed
    from ds_roberta.training.engine import Engine

CPU_TOKENS = 4_096
"""Tokens of a micro-batch on a CPU: measured on 2 cores, fewer or more are slower there."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that a micro-batch may fill; the rest is for fragments and collectives."""
_PROBE_SIZES = (4, 8)


def largest_micro_batch_size(engine: Engine, max_seq_length: int, masking: MaskingConfig, limit: int) -> int:
    """The micro-batch size to train with, at most `limit`, the same on all ranks."""
    if engine.device.type == "cpu":
        return min(limit, max(1, CPU_TOKENS // max_seq_length))
    small, large = (peak_bytes(engine, size, max_seq_length, masking) for size in _PROBE_SIZES)
    capacity = torch.cuda.get_device_properties(engine.device).total_memory * MEMORY_SHARE
    return engine.ranks.min(min(limit, fitting_size(small, large, capacity)))


def fitting_size(small_bytes: float, large_bytes: float, capacity_bytes: float) -> int:
    """The largest size whose peak, on the line through the two probes, stays within the capacity; at least 1."""
    per_sequence = (large_bytes - small_bytes) / (_PROBE_SIZES[1] - _PROBE_SIZES[0])
    fixed = small_bytes - per_sequence * _PROBE_SIZES[0]
    return max(1, int((capacity_bytes - fixed) // max(per_sequence, 1)))


def peak_bytes(engine: Engine, size: int, max_seq_length: int, masking: MaskingConfig) -> int:
    """Peak memory of one micro-step of full sequences."""
    masked = max(1, round(max(masking.mlm_probability, masking.final_probability) * max_seq_length))
    positions = torch.arange(size)[:, None] * max_seq_length + torch.arange(masked)
    micro_batch = MicroBatch(
        input_ids=torch.zeros(size, max_seq_length, dtype=torch.int64),
        attention_mask=torch.ones(size, max_seq_length, dtype=torch.bool),
        masked_positions=positions.flatten(),
        labels=torch.zeros(size * masked, dtype=torch.int64),
        tokens=0,
        sequences=0,
    )
    torch.cuda.reset_peak_memory_stats(engine.device)
    engine.rehearse(micro_batch)
    return torch.cuda.max_memory_allocated(engine.device)
