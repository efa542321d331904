"""When the encoder is compiled, and what stands in the way."""

import shutil

import pytest
import torch

from ds_roberta.errors import UserError
from ds_roberta.training import compilation
from ds_roberta.training.compilation import resolve_torch_compile


@pytest.fixture
def able_gpu(monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


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
        ("triton", 1, True, "Triton is not installed"),
        ("capability", 1, True, "this one has 6.1"),
    ],
)
def test_what_stands_in_the_way_is_named_and_auto_goes_on_without(
    able_gpu, monkeypatch, missing, zero_stage, on_gpu, message
):
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif missing == "triton":
        monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    elif missing == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(UserError, match=message):
        resolve_torch_compile("on", zero_stage, on_gpu)
    assert resolve_torch_compile("auto", zero_stage, on_gpu) is False
