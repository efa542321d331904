"""What all processes of a run must have alike, whatever hosts they are on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

import ds_roberta
from ds_roberta.data.shards import Corpus
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.files import json_fingerprint

_PATHS = ("data_dir", "deepspeed_config")  # compared by content: a host may have them elsewhere


def shared_facts(
    options: dict[str, Any], deepspeed_config: DeepSpeedConfig, corpus: Corpus, precision: str
) -> dict[str, str]:
    """This process's program, options, data and precision, as a comparison between hosts shows them."""
    return {
        "ds_roberta": f"{ds_roberta.__version__} of source {source_fingerprint()}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **{f"--{name}": str(value) for name, value in options.items() if name not in _PATHS},
        "--deepspeed_config": f"of content {json_fingerprint(deepspeed_config.content)}",
        "--data_dir": f"of data {corpus.manifest.fingerprint}",
        "precision": precision,
    }


def source_fingerprint() -> str:
    """A hash of this package's Python files: it tells of changes that no commit has."""
    package = Path(ds_roberta.__file__).parent
    digest = xxhash.xxh3_128()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
