"""The same contracts on a GPU, against the CPU's findings.

Sequences have 512 tokens: with several blocks of keys the backward pass of attention adds their parts in any order, so
that only what comes before it repeats bit for bit. Each case runs in its own process group, so that a
failing case hides no other.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from groups import run_group

from ds_roberta.config import PackingConfig
from ds_roberta.data.layout import FlatLayout
from ds_roberta.data.packing import build_index
from ds_roberta.data.shards import Corpus
from ds_roberta.model.kernels import attention, flat_attention, plain_attention, set_gpu_arithmetic
from ds_roberta.training.device import make_deterministic

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LENGTH = 512


@pytest.fixture(scope="module")
def findings(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function of a case, and of a device, which runs it once."""
    build_index(Corpus.open(corpus_folder), "train", PackingConfig(LENGTH))

    @functools.cache
    def run(case: str, accelerator: str = "cuda"):
        folder = tmp_path_factory.mktemp(f"{case}-{accelerator}")
        (found,) = run_group(1, case, corpus_folder, folder, accelerator, length=LENGTH).values()
        return found

    return run


def tolerance(name: str) -> float:
    return 1e-5 if "fp32" in name else 1e-3


def test_every_stage_and_precision_follows_the_cpu(findings):
    expected = findings("reference", "cpu")
    for name, rows in findings("partition").items():
        np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=tolerance(name), err_msg=name)


def test_a_resumed_run_begins_as_the_unbroken_one_bit_for_bit_and_follows_it(findings):
    for name, case in findings("resume").items():
        for layout in ("portable", "deepspeed"):
            first, *_ = losses = case[layout]["losses"]
            assert first == case["unbroken"][0], f"{name} {layout}"
            np.testing.assert_allclose(losses, case["unbroken"], rtol=tolerance(name), err_msg=f"{name} {layout}")


def test_a_compiled_model_follows_the_one_that_is_not(findings):
    for name, losses in findings("compilation").items():
        for compiled in ("layers", "model"):
            np.testing.assert_allclose(losses[compiled], losses["eager"], rtol=tolerance(name), err_msg=name)


def test_dropout_of_a_compiled_model_follows_the_seed(findings):
    for name, losses in findings("compilation").items():
        assert losses["dropout_again"][0] == losses["dropout"][0], name
        np.testing.assert_allclose(losses["dropout_again"], losses["dropout"], rtol=tolerance(name), err_msg=name)
        assert not np.allclose(losses["dropout"], losses["model"], rtol=1e-5), name


def test_an_fp16_overflow_skips_the_step(findings):
    assert findings("overflow") == {"skipped": True, "unchanged": True, "scales": [2.0**39]}


def test_an_overflow_that_no_loss_scale_cures_names_the_tensor(findings):
    found = findings("overflow_at_the_floor")
    assert len(found) == 6
    assert all("(not finite: lm_head.bias):" in message for _, message in found.values())


def test_the_automatic_micro_batch_fits_and_fills_the_memory(findings):
    found = findings("micro_batch")
    assert 0.6 * found["free"] < found["peak"] < 0.95 * found["free"]


def test_trials_that_run_out_of_memory_leave_no_trace(findings):
    for name, found in findings("trials").items():
        assert found["size"] == 3, name


def padding(length: int, padded: bool) -> torch.Tensor | None:
    return (torch.arange(length) < 3 * length // 4).expand(2, 1, 1, length) if padded else None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [LENGTH, 448])  # 64 mod 128, where cuDNN's gradients can be NaN
def test_attention_and_its_gradients_are_the_cpus(length, padded):
    set_gpu_arithmetic()
    torch.manual_seed(0)
    *inputs, gradient = torch.randn(4, 2, 4, length, 64)
    mask = padding(length, padded)
    found = []
    for device, dtype, function in (("cpu", torch.float32, plain_attention), ("cuda", torch.bfloat16, attention)):
        own = [values.detach().to(device, dtype).requires_grad_() for values in inputs]
        output = function(*own, None if mask is None else mask.to(device), 0.0)
        output.backward(gradient.to(device, dtype))
        found.append([output.detach(), *(values.grad for values in own)])
    for expected, values in zip(*found, strict=True):
        torch.testing.assert_close(values.float().cpu(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_attention_drops_the_share_asked_for(padded):
    set_gpu_arithmetic()
    torch.manual_seed(0)
    query, key = torch.zeros(2, 2, 4, LENGTH, 64, dtype=torch.bfloat16, device="cuda")
    value = torch.eye(LENGTH, 64, dtype=torch.bfloat16, device="cuda").expand(2, 4, LENGTH, 64)  # shows the weights
    mask = padding(LENGTH, padded)
    weights = attention(query, key, value, None if mask is None else mask.cuda(), 0.1)
    assert abs(float((weights == 0).float().mean()) - 0.1) < 0.005


def flat_layout() -> FlatLayout:
    return FlatLayout.of_shape(np.array([LENGTH, 300, 65, 2]), None, 2 * LENGTH, LENGTH).to(torch.Tensor.cuda)


def test_attention_without_padding_and_its_gradients_are_the_cpus():
    torch.manual_seed(0)
    lengths = np.array([LENGTH, 300, 65, 2])
    *inputs, gradient = torch.randn(4, 2 * LENGTH, 4 * 64)
    own, found = int(lengths.sum()), []
    gradient[own:] = 0
    for device, dtype, layout in (
        ("cpu", torch.float32, FlatLayout.of_lengths(lengths)),
        ("cuda", torch.bfloat16, flat_layout()),
    ):
        leaves = [values.detach().to(device, dtype).requires_grad_() for values in inputs]
        output = flat_attention(*leaves, layout, 4, 0.0)
        output.backward(gradient.to(device, dtype))
        found.append([output.detach()[:own], *(values.grad for values in leaves)])
    for expected, values in zip(*found, strict=True):
        torch.testing.assert_close(values.float().cpu(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_attention_without_padding_drops_the_share_asked_for():
    torch.manual_seed(0)
    query, key = torch.zeros(2, 2 * LENGTH, 4 * 64, dtype=torch.bfloat16, device="cuda")
    value = torch.eye(64, dtype=torch.bfloat16, device="cuda").repeat(2 * LENGTH // 64, 4)  # shows the weights
    layout = FlatLayout.of_shape(np.full(2 * LENGTH // 64, 64), None, 2 * LENGTH, LENGTH).to(torch.Tensor.cuda)
    weights = flat_attention(query, key, value, layout, 4, 0.1)
    assert abs(float((weights == 0).float().mean()) - 0.1) < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_gradients_repeat_bit_for_bit(monkeypatch, dtype):
    set_gpu_arithmetic()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make_deterministic()
    try:
        rows = torch.randn(4, 4, 8, LENGTH, 64, device="cuda", dtype=dtype)
        flat = torch.randn(4, 2 * LENGTH, 4 * 64, device="cuda", dtype=dtype)
        attentions = [(rows, lambda *own: attention(*own, None, 0.1))]
        attentions += [(rows, lambda *own: attention(*own, padding(LENGTH, True)[:1].cuda(), 0.1))]
        if dtype == torch.bfloat16:
            attentions += [(flat, lambda *own: flat_attention(*own, flat_layout(), 4, 0.1))]
        for (*inputs, gradient), function in attentions:
            found = []
            for _ in range(5):
                torch.manual_seed(0)
                leaves = [values.clone().requires_grad_() for values in inputs]
                function(*leaves).backward(gradient)
                found.append([values.grad for values in leaves])
            assert all(torch.equal(one, other) for own in found for one, other in zip(own, found[0], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
