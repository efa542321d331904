"""Compilation of the model by torch.compile.

Each layer is compiled, not the model: all layers share one graph per shape. What comes before and after the layers is
compiled in parts of its own. Look-ups of rows, in embeddings or of masked tokens, are in none: inductor sums their
gradients by atomic additions, whose order, and so whose rounding, varies.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.data.layout import FlatLayout
from ds_roberta.errors import UserError
from ds_roberta.model import kernels
from ds_roberta.model.encoder import RobertaEncoder
from ds_roberta.model.objectives import MaskedLM, Objective
from ds_roberta.process import logger
from ds_roberta.progress import duration

_GRAPHS_AT_MOST = 256
"""torch gives up after 8 and continues uncompiled; a length takes 4, with or without padding, training or not."""
_HEAD_SHAPES = 32
"""Of a compiled head: with 15% of the tokens masked, all but a few micro-batches have one of two."""
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
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):
        return "there is no C compiler, which Triton needs: install gcc"
    if not _python_header().is_file():
        return f"Triton needs Python's headers, and there is no {str(_python_header())!r}: install python3-dev"
    return None


def _python_header() -> Path:
    """The file that Triton includes; like Triton, it is looked for where the system's packages have it."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return Path(sysconfig.get_path("include", scheme), "Python.h")


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


def compile_model(model: Objective, backend: str = "inductor") -> None:
    """Compile the layers, and what comes before and after them, in place; parameters keep their names."""
    compile_layers(model.roberta.encoder, backend)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=backend, dynamic=False)

    embeddings = model.roberta.embeddings
    embeddings.normalise = compiled(embeddings.normalise)  # type: ignore[method-assign]
    _hide_gradients_of_new_shapes(embeddings)
    if isinstance(model, MaskedLM):
        head, cross_entropy = model.lm_head, compiled(kernels.whole_cross_entropy)
        head.transform = compiled(head.transform)  # type: ignore[method-assign]
        head.cross_entropy = lambda logits, labels: cross_entropy(
            logits, F.pad(labels, (0, len(logits) - len(labels)), value=-1)
        )
        model.head_shapes = _HEAD_SHAPES
        _hide_gradients_of_new_shapes(head)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils.counters["stats"]["unique_graphs"] if utils else 0


def _hide_gradients_of_new_shapes(compiled: nn.Module) -> None:
    """Set gradients aside while a graph may be made: torch 2.13 makes none if their dtype is not the weight's.

    If none was made, a warning says so: torch itself continues silently.
    """
    met: set[tuple[object, ...]] = set()
    hidden: list[tuple[nn.Parameter, torch.Tensor | None]] = []

    def hide(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        case = (*map(_shape, inputs[:2]), module.training, torch.is_grad_enabled())
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

    compiled.register_forward_pre_hook(hide)
    compiled.register_forward_hook(restore, always_call=True)


def _shape(value: torch.Tensor | FlatLayout | None) -> tuple[int, ...] | None:
    values = value.cu_seqlens if isinstance(value, FlatLayout) else value
    return None if values is None else tuple(values.shape)


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
