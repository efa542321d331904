"""Compilation of the encoder by torch.compile.

Each layer is compiled, not the model: all layers share one graph per shape, and the number of masked tokens,
which differs between micro-batches, is never part of one. Embeddings are not compiled: inductor sums the gradient of a
table by atomic additions, whose order, and so whose rounding, varies.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_roberta.data.layout import FlatLayout
from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.model import kernels
from ds_roberta.model.encoder import Padding, RobertaEncoder
from ds_roberta.training.metrics import duration

_GRAPHS_AT_MOST = 256
"""torch gives up after 8 and continues uncompiled; a length takes 4, with or without padding, training or not."""
_TRITON_CAPABILITY = (7, 0)


def resolve_torch_compile(torch_compile: str, zero_stage: int, on_gpu: bool) -> bool:
    """Whether to compile: "auto" does on a GPU where possible.

    Raises:
        UserError: it is "on", but compilation is not possible.
    """
    if torch_compile == "off" or (torch_compile == "auto" and not on_gpu):
        return False
    obstacle = _obstacle(zero_stage, on_gpu)
    if obstacle is not None and torch_compile == "on":
        raise UserError(f"--torch_compile on cannot work: {obstacle}, or give --torch_compile off")
    return obstacle is None


def _obstacle(zero_stage: int, on_gpu: bool) -> str | None:
    """Why compilation is not possible."""
    if zero_stage == 3:
        return "at ZeRO stage 3 hooks of each module gather its parameters, which breaks its graph: choose stage 1 or 2"
    if not on_gpu:
        found = any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++")))
        return None if found else "there is no C++ compiler: install g++"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install it"
    capability = torch.cuda.get_device_capability()
    if capability < _TRITON_CAPABILITY:
        return "Triton needs a GPU of compute capability 7.0, this one has {}.{}: use another".format(*capability)
    found = any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang")))
    return None if found else "there is no C compiler, which Triton needs: install gcc"


def compile_layers(encoder: RobertaEncoder, backend: str = "inductor") -> None:
    """Compile the layers in place, each shape when it first occurs; parameters keep their names."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = _GRAPHS_AT_MOST
    # Otherwise kernels are chosen by timing them, and a resumed run might round differently.
    torch._inductor.config.deterministic = True
    # Their seeds are Python numbers, each of which would need a separate graph. They are excluded only here because
    # that imports torch's compiler, which takes a second.
    for name in ("cpu_dropout", "plain_attention"):
        setattr(kernels, name, torch.compiler.disable(getattr(kernels, name)))
    for layer in encoder.layer:
        layer.compile(backend=backend, dynamic=False)
    _hide_gradients_of_new_shapes(encoder)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["stats"]["unique_graphs"] if utils else 0


def _hide_gradients_of_new_shapes(encoder: RobertaEncoder) -> None:
    """Set gradients aside while a graph may be made: torch 2.13 makes none if their dtype is not the weight's.

    If none was made, a warning says so: torch itself continues silently.
    """
    met: set[tuple[object, ...]] = set()
    hidden: list[tuple[nn.Parameter, torch.Tensor | None]] = []

    def hide(module: nn.Module, inputs: tuple[torch.Tensor, Padding]) -> None:
        states, padding = inputs
        bounds = padding.cu_seqlens if isinstance(padding, FlatLayout) else None
        shapes = (states.shape, padding is None, None if bounds is None else bounds.shape)
        case = (shapes, module.training, torch.is_grad_enabled())
        if case in met:
            return
        met.add(case)
        for parameter in module.parameters():
            hidden.append((parameter, parameter.grad))
            parameter.grad = None

    def restore(*_: object) -> None:
        for parameter, gradient in hidden:
            parameter.grad = gradient
        if hidden and not compiled_graphs():
            logger.warning("torch.compile made no graph: the layers run uncompiled (TORCH_LOGS=+dynamo shows why)")
        hidden.clear()

    encoder.register_forward_pre_hook(hide)
    encoder.register_forward_hook(restore, always_call=True)


def compilation_notice(config: dict[str, Any]) -> str | None:
    """The message to log before DeepSpeed compiles its FusedAdam; None with torch's Adam, which is already compiled.

    If a start is killed while it compiles, it leaves a lock, for which all later starts wait silently.

    Args:
        config: from `DeepSpeedConfig.resolved`.
    """
    if config["optimizer"]["params"].get("torch_adam", False):
        return None
    from torch.utils import cpp_extension  # a slow import

    lock = Path(cpp_extension._get_build_directory("fused_adam", verbose=False)) / "lock"
    notice = "DeepSpeed compiles its FusedAdam (torch_adam is false) unless it did so before: this takes minutes"
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return notice
    return (
        f"{notice}; the lock {str(lock)!r} is {duration(max(age, 0.0))} old: another start is compiling, or one was "
        "killed, and then this one waits until you remove the lock"
    )
