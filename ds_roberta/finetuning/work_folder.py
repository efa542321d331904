"""The folder with a fine-tuning's runs until its output is written: the same command continues from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ds_roberta.files import json_fingerprint
from ds_roberta.finetuning.one_run import Setting
from ds_roberta.finetuning.task import Encoded
from ds_roberta.process import logger
from ds_roberta.transformers_folder import weights_files


def open_work_folder(output: Path, asked: Mapping[str, Any], model: Path, encoded: Mapping[str, Encoded]) -> Path:
    """The folder of a plan's runs; one with another plan is removed. What is asked for, the model's files and the
    examples make a plan, however the paths are written.

    Args:
        asked: without paths, and without settings and seeds: each run has its own folder.
        encoded: the examples of each split.
    """
    work = output.parent / f".{output.name}.runs"
    files = [model / "config.json", *weights_files(model)]
    content = {
        **asked,
        "model": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "examples": {split: _fingerprint(rows) for split, rows in encoded.items()},
    }
    plan = json_fingerprint(json.loads(json.dumps(content, default=str)))
    if work.exists() and not (work / plan).exists():
        logger.info(f"{work} belongs to another fine-tuning, which was interrupted: starting from scratch")
        shutil.rmtree(work)
    (work / plan).mkdir(parents=True, exist_ok=True)
    return work / plan


def run_folder(work: Path, setting: Setting, seed: int) -> Path:
    return work / f"rate-{setting.learning_rate!r}-batch-{setting.train_batch_size}-seed-{seed}"


def keep_finished(work: Path) -> None:
    """Remove the runs' folder after a run has diverged, unless others have finished."""
    if any(work.iterdir()):
        logger.info(f"the other runs stay in {work.parent}: the same command with other learning rates takes them over")
    else:
        shutil.rmtree(work.parent)


def _fingerprint(encoded: Encoded) -> str:
    """A 128-bit hash of examples, whose `repr` leaves out their places, and of what the model is given of them."""
    digest = xxhash.xxh3_128()
    for part in (*encoded.inputs, *encoded.features):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
