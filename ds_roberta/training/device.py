"""The machine as DeepSpeed sees it: joining a run's processes, and the precisions of their device."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks
from ds_roberta.errors import LocalError
from ds_roberta.model.kernels import set_gpu_arithmetic
from ds_roberta.process import keep_freed_memory
from ds_roberta.rendezvous import (
    RENDEZVOUS_TIMEOUT,
    VARIABLES,
    check_world_size,
    port_of_mpi,
    set_ranks,
    wait_for_ranks,
)

os.environ.setdefault("DS_LOG_LEVEL", "warning")
import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedsOwnConfig
from pydantic import ValidationError


def init_distributed(rendezvous_timeout: float = RENDEZVOUS_TIMEOUT) -> Ranks:
    """Join the other processes of the launcher (deepspeed, torchrun, srun, mpirun), if there is one.

    Args:
        rendezvous_timeout: seconds to wait for the others.

    Raises:
        UserError: not all joined in time, the launcher started more processes than are in this run, or a host has
            fewer GPUs than processes.
    """
    set_ranks()
    if on_gpu() and "LOCAL_RANK" in os.environ:  # MPI's processes have none yet
        check_gpu(int(os.environ["LOCAL_RANK"]))
    wait_for_ranks(rendezvous_timeout)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # gloo is enough on a CPU; DeepSpeed would first compile a shared-memory operator for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    options: dict[str, Any] = (
        {} if all(name in os.environ for name in VARIABLES) else {"distributed_port": port_of_mpi()}
    )
    limit = timedelta(seconds=rendezvous_timeout)
    # On a CPU the control messages travel in the same group; on a GPU theirs is another one.
    deepspeed.init_distributed(verbose=False, **options, **({} if on_gpu() else {"timeout": limit}))
    check_world_size(torch.distributed.get_world_size())
    set_gpu_arithmetic()
    if on_gpu():
        # deepspeed.initialize does so too, but what is allocated or measured before it would be on the first GPU.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        return Ranks.current(limit)
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        local_processes = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, torch.get_num_threads() // local_processes))
    return Ranks.current(limit)


def check_gpu(local_rank: int) -> None:
    """Raise `LocalError` if the host has no GPU of this number."""
    count = get_accelerator().device_count()
    if local_rank >= count:
        raise LocalError(
            f"process {local_rank} (LOCAL_RANK) finds {count} GPUs, of which it takes the one of its number: start as "
            "many processes on a host as it has GPUs, and let each see all of them (srun --gpu-bind=none)"
        )


def make_deterministic() -> None:
    """Make a GPU repeat every operation bit for bit in this process, or torch raise where one cannot.

    By default the backward passes of its attention, and cuBLAS in several streams, add in any order
    (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    # Nothing reads such memory, and filling it costs time. The module's class has the attribute.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Make `torch.compile` leave functions unchanged.

    To check whether an optimizer is its Muon, which ours never is, DeepSpeed imports Muon. That module compiles three
    functions, for which torch imports its whole compiler; this would take a second at every start.
    """
    name = "TORCHDYNAMO_DISABLE"  # read at each call of torch.compile
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def on_gpu() -> bool:
    """Whether DeepSpeed's accelerator is not the CPU."""
    return get_accelerator().device_name() != "cpu"


def device_precisions() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The low precisions that "auto" prefers here, the best first, and all precisions that the device supports."""
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    low = [name for name in supported if supported[name]]
    if on_gpu():
        # Before Ampere, NVIDIA's GPUs compute in bf16 without tensor cores, and DeepSpeed counts that as support.
        emulated = accelerator.device_name() == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return tuple(name for name in low if not (name == "bf16" and emulated)), ("fp32", *low)
    # Without bf16 instructions, a processor is slower in bf16 than in fp32.
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ("bf16",) if fast_bf16 else (), ("fp32", *low)


def fastest_precision() -> str:
    """The precision in which the device multiplies matrices fastest."""
    return [*device_precisions()[0], "fp32"][0]


def choose_precision(config: DeepSpeedConfig) -> str:
    """The precision that the JSON asks for; the device decides "auto"."""
    return config.precision(*device_precisions())


def refused_by_deepspeed(content: dict[str, Any]) -> str | None:
    """Why DeepSpeed refuses a JSON's values, of which those that are "auto" are left out; None if it takes them."""

    def without_auto(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: without_auto(each) for key, each in value.items() if each != "auto"}

    try:
        DeepSpeedsOwnConfig({**without_auto(content), "train_micro_batch_size_per_gpu": 1})
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
    except Exception as error:  # its own, and whatever a value of a wrong type ends in
        return str(error) or type(error).__name__
    return None
