"""Where a process computes, and in which precision, on machines that have GPUs."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

from ds_roberta.distributed import PATIENCE
from ds_roberta.errors import LocalError
from ds_roberta.rendezvous import RENDEZVOUS_TIMEOUT
from ds_roberta.training import device
from ds_roberta.training.device import device_precisions, init_distributed


@pytest.fixture
def gpu(monkeypatch):
    """An accelerator as DeepSpeed sees a CUDA device; `taken` are the devices that the process was set to."""
    accelerator = SimpleNamespace(
        taken=[],
        device_name=lambda: "cuda",
        device_count=lambda: 4,
        is_bf16_supported=lambda: True,
        is_fp16_supported=lambda: True,
    )
    accelerator.set_device = accelerator.taken.append
    monkeypatch.setattr(device, "get_accelerator", lambda: accelerator)
    return accelerator


def test_a_process_takes_its_own_gpu_before_anything_is_put_there(gpu, monkeypatch, tmp_path):
    def join(**given):
        assert not gpu.taken
        assert "timeout" not in given  # the gradients' group has DeepSpeed's
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "wait_for_ranks", lambda timeout: None)
    monkeypatch.setattr(device.deepspeed, "init_distributed", join)
    groups = []
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **given: groups.append(given))
    try:
        assert init_distributed().local_rank == 3
        assert gpu.taken == [3]
        assert groups == [{"backend": "gloo", "timeout": timedelta(seconds=RENDEZVOUS_TIMEOUT)}]
    finally:
        dist.destroy_process_group()


def test_a_process_without_a_gpu_of_its_own_is_named_before_it_meets_others(gpu, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "4")
    with pytest.raises(LocalError, match=r"process 4 \(LOCAL_RANK\) finds 4 GPUs.*--gpu-bind=none"):
        init_distributed()
    assert not gpu.taken


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What DeepSpeed is given when this process, on a CPU, joins a run of its own."""
    given = {}

    def join(**options):
        given.update(options)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name, value in (("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "wait_for_ranks", lambda timeout: None)
    monkeypatch.setattr(device.deepspeed, "init_distributed", join)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield given
    dist.destroy_process_group()


def test_processes_on_a_cpu_wait_long_for_what_one_does_for_all(given):
    init_distributed(7)
    assert given["timeout"] == timedelta(seconds=7)  # but not for the others to come
    assert dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout == PATIENCE


@pytest.mark.parametrize("launchers_name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_processes_on_a_host_share_its_threads(given, monkeypatch, launchers_name):
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(launchers_name, "2")
    torch.set_num_threads(6)
    try:
        init_distributed()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("emulated", "best"), [(False, ("bf16", "fp16")), (True, ("fp16",))])
def test_bf16_without_tensor_cores_is_used_on_request_only(gpu, monkeypatch, emulated, best):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert device_precisions() == (best, ("fp32", "bf16", "fp16"))
