"""What is kept beside a run so that it can be understood and done again."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ds_roberta
from ds_roberta.config import RunConfig
from ds_roberta.training.batch import BatchPlan
from ds_roberta.training.peak import Peak

if TYPE_CHECKING:
    from ds_roberta.training.engine import Engine


def run_record(
    config: RunConfig,
    engine: Engine,
    monitors: dict[str, Any],
    plans: list[BatchPlan],
    precision: str,
    compiled: bool,
    peak: Peak,
) -> dict[str, Any]:
    """All that reproduces the run: settings, the DeepSpeed configuration as resolved, versions, commit, machine."""
    return {
        "run": config.as_json(),
        "deepspeed": engine.config,
        "monitors": monitors,
        "batches": [asdict(plan) for plan in plans],
        "precision": precision,
        "compiled": compiled,
        "device": str(engine.device),
        "peak": asdict(peak),
        "versions": {
            "ds_roberta": ds_roberta.__version__,
            "deepspeed": engine.deepspeed_version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this program, where it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
