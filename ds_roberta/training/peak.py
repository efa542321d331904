"""A device's peak FLOP/s; a run's model FLOPs utilisation (`mfu`) is a share of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_roberta.distributed import Ranks

# Dense bf16 (V100: fp16) tensor FLOP/s with fp32 accumulation, by torch's name of the device, from NVIDIA's data sheets
# (half of those "with sparsity"): V100 (2018), A100 80GB (2021), A10 (2021), H100 Tensor Core GPU (2023), H200 (2024),
# L40S (2023), L4 (2023), HGX B200 (2024); Ada GPU Architecture white paper, appendix A (2022).
_DATA_SHEETS = (
    (r"Tesla V100-SXM2-\d+GB", 125e12),
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe", 312e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA H100 80GB HBM3", 989e12),  # SXM
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H200", 989e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA GeForce RTX 4090", 165e12),
)
DATA_SHEET, MEASURED = "data sheet", "measured"
_FIRST_SIZE, _LAST_SIZE = 1_024, 8_192
_SIZE_SECONDS = 0.1
_LARGER_SECONDS = 0.2
"""Seconds; a larger product is tried if it is expected to take no longer."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and whether they come from its data sheet or were measured at the run's start."""

    flops_per_second: float
    source: str


def device_peak(device: torch.device, precision: str, ranks: Ranks) -> Peak:
    """The peak of a run's devices, their mean if they differ; all ranks call it.

    For a GPU in the table it is the data sheet's, in fp32 too. Others are measured, by all processes at the same time,
    so that those on one machine share it as they do in training.

    Args:
        precision: "fp32" or the lower one that the device is fast at, to measure in.
    """
    ranks.barrier()
    known = data_sheet_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rate = measured_rate(device, precision) if known is None else known
    return Peak(ranks.sum(rate)[0] / ranks.world_size, MEASURED if known is None else DATA_SHEET)


def data_sheet_rate(device_name: str) -> float | None:
    """FLOP/s by torch's name of a GPU; None if the table does not have it, for example a MIG slice."""
    return next((rate for pattern, rate in _DATA_SHEETS if re.fullmatch(pattern, device_name)), None)


def measured_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the best size of square matrix products, in about half a second."""
    size, best = _FIRST_SIZE, 0.0
    while True:
        rate = product_rate(device, precision, size, _SIZE_SECONDS)
        best = max(best, rate)
        size *= 2
        if size > _LAST_SIZE or 2 * size**3 / rate > _LARGER_SECONDS:
            return best


def product_rate(
    device: torch.device,
    precision: str,
    size: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of the fastest among the products of two `size` x `size` matrices that fit into `seconds`.

    The fastest is used because only other work on the machine makes one slower than another.

    Args:
        seconds: wall-clock time; at least one product is timed.
        clock: the function that gives the time, in seconds.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def timed() -> float:
        begun = clock()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begun

    timed()  # prepares kernels and memory
    end, fastest = time.perf_counter() + seconds, timed()
    while time.perf_counter() < end:
        fastest = min(fastest, timed())
    return 2 * size**3 / fastest
