"""DeepSpeed's FusedAdam, for which `"torch_adam": false` asks on a GPU: DeepSpeed compiles it without a word."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ds_roberta.training.metrics import duration


def compilation_notice(config: dict[str, Any]) -> str | None:
    """What is logged before DeepSpeed compiles FusedAdam; None where torch's Adam is taken, which is compiled already.

    A start that is killed while it compiles leaves a lock, for which all later ones wait in silence.

    Args:
        config: from `DeepSpeedConfig.resolved`.
    """
    if config["optimizer"]["params"].get("torch_adam", False):
        return None
    from torch.utils import cpp_extension  # it takes a moment

    lock = Path(cpp_extension._get_build_directory("fused_adam", verbose=False)) / "lock"
    notice = "DeepSpeed compiles its FusedAdam (torch_adam is false) unless it did before: that takes minutes"
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return notice
    return (
        f"{notice}; the lock {str(lock)!r} is {duration(max(age, 0.0))} old: another start is compiling, or one was "
        "killed, and then this one waits until you remove the lock"
    )
