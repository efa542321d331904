"""When the encoder is compiled and padding left out, and what stands in the way."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_roberta.config import model_config
from ds_roberta.errors import UserError
from ds_roberta.training import compilation
from ds_roberta.training.compilation import resolve_torch_compile
from ds_roberta.training.run_data import resolve_padding_free


@pytest.fixture
def able_gpu(monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation, "_python_header", lambda: Path(__file__))


@pytest.mark.parametrize(
    ("torch_compile", "zero_stage", "on_gpu", "compiled"),
    [
        ("auto", 0, True, True),
        ("auto", 2, True, True),
        ("auto", 3, True, False),
        ("auto", 1, False, False),
        ("on", 1, False, True),
        ("on", 1, True, True),
        ("off", 1, True, False),
        ("off", 3, False, False),
    ],
)
def test_auto_compiles_on_a_gpu_where_it_can(able_gpu, torch_compile, zero_stage, on_gpu, compiled):
    assert resolve_torch_compile(torch_compile, zero_stage, on_gpu) is compiled


@pytest.mark.parametrize(
    ("missing", "zero_stage", "on_gpu", "message"),
    [
        ("", 3, True, "ZeRO stage 3"),
        ("compiler", 1, False, "no C\\+\\+ compiler"),
        ("compiler", 1, True, "no C compiler"),
        ("headers", 1, True, "Triton needs Python's headers, and there is no '/nowhere/Python.h'"),
        ("triton", 1, True, "Triton is not installed"),
        ("capability", 1, True, "this one has 6.1"),
    ],
)
def test_what_stands_in_the_way_is_named_and_auto_goes_on_without(
    able_gpu, monkeypatch, missing, zero_stage, on_gpu, message
):
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif missing == "headers":
        monkeypatch.setattr(compilation, "_python_header", lambda: Path("/nowhere/Python.h"))
    elif missing == "triton":
        monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    elif missing == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(UserError, match=message):
        resolve_torch_compile("on", zero_stage, on_gpu)
    assert resolve_torch_compile("auto", zero_stage, on_gpu) is False


@pytest.mark.parametrize(
    ("choice", "compiled", "on_gpu", "precision", "padding_free"),
    [
        ("auto", False, False, "fp32", True),
        ("auto", True, False, "fp32", False),
        ("auto", True, True, "bf16", False),
        ("on", True, True, "bf16", True),
        ("on", False, True, "fp16", True),
        ("on", False, False, "bf16", True),
        ("off", False, False, "bf16", False),
    ],
)
def test_padding_is_left_out_on_a_cpu_and_elsewhere_on_request(
    able_gpu, choice, compiled, on_gpu, precision, padding_free
):
    config = SimpleNamespace(padding_free=choice, attention="within-sequences", model=model_config("tiny", 99, 32))
    assert resolve_padding_free(config, compiled, on_gpu, precision) is padding_free
    config.attention = "within-documents"
    if padding_free:
        assert resolve_padding_free(config, compiled, on_gpu, precision)
    else:
        with pytest.raises(UserError, match="--attention within-documents cannot work with padding"):
            resolve_padding_free(config, compiled, on_gpu, precision)


@pytest.mark.parametrize(
    ("compiled", "on_gpu", "precision", "heads", "message"),
    [
        (True, False, "bf16", 4, "compiled layers need shapes that do not change: give --torch_compile off"),
        (True, True, "fp32", 4, "flash attention is in bf16 or fp16 only"),
        (True, True, "bf16", 64, "up to 256, not of 4"),
        (True, True, "fp16", 4, "compute capability 8.0, this one has 7.5"),
    ],
)
def test_why_padding_cannot_be_left_out(able_gpu, monkeypatch, compiled, on_gpu, precision, heads, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    model = replace(model_config("tiny", 99, 32), num_attention_heads=heads)
    config = SimpleNamespace(padding_free="on", attention="within-sequences", model=model)
    with pytest.raises(UserError, match=message):
        resolve_padding_free(config, compiled, on_gpu, precision)
