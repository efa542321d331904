"""The small files by which `datasets` opens a data folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ds_roberta.files import write_json

DATASETS_FILES = ("state.json", "dataset_info.json")


def write_datasets_files(folder: Path, split: str, shards: Sequence[str], fingerprint: str) -> None:
    """Write `state.json` and `dataset_info.json` of a split, as `datasets.Dataset.save_to_disk` does.

    Args:
        shards: the names of its files, at least one.
    """
    schema = pa.ipc.open_stream(pa.memory_map(str(folder / shards[0]))).schema
    features = {
        field.name: {"feature": {"dtype": str(field.type.value_type), "_type": "Value"}, "_type": "List"}
        for field in schema
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    info = {"citation": "", "description": "", "features": features}
    for name, content in zip(DATASETS_FILES, (state, info), strict=True):
        write_json(folder / name, content)
