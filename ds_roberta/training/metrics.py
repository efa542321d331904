"""What a run reports: rows of a JSONL file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_roberta.errors import UserError
from ds_roberta.files import append_line, errors_of_the_disk, load_json, write_text

METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "config.json"
"""The file next to the metrics with all that is needed to reproduce the run; `ds_roberta.training.run` writes it."""
MACHINE_COLUMNS = ("tokens_per_second", "mfu", "step_seconds", "data_wait_share", "memory_gb")
"""What may differ between two runs with the same settings and number of processes: all other columns are equal."""
_REMEDY = "fix this, then run the same command again to continue from the newest checkpoint"


def memory_gb(device: torch.device) -> float:
    """Memory in 10⁹ bytes: on a GPU the most that this process has allocated so far, else what it uses now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a `metrics.jsonl`, and whether its last line was left out because a killed run wrote only a part.

    Raises:
        UserError: the file cannot be read, or a line is not an object with a `global_step` and numbers.
    """
    try:
        *lines, end = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}): fix this") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_parse_row(line))
        except ValueError as error:
            raise UserError(f"line {number} of {str(path)!r} is broken ({error}): fix or remove it") from error
    return rows, bool(end)


def _parse_row(line: bytes) -> dict[str, Any]:
    row = load_json(line)
    if not isinstance(row, dict) or type(row.get("global_step")) is not int:
        raise ValueError("not an object with a global_step")
    for name, value in row.items():
        if not (value is None or isinstance(value, int | float)):
            raise ValueError(f"{name} is {value!r}, not a number")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(f"{name} is too large a number")
    return row


class MetricsLog:
    """Appends rows to `metrics.jsonl`, one JSON object a line.

    Attributes:
        latest: the last value of each column.
    """

    def __init__(self, output_dir: Path, global_step: int, is_evaluated: bool = True):
        """Open the log of a run that is at `global_step`.

        Rows that the run will write again are removed: later steps, lost in a crash, and this step's evaluation.

        Args:
            is_evaluated: whether this step's evaluation is due again.
        """
        self._path = output_dir / METRICS_NAME
        kept = [
            row
            for row in self.rows()
            if row["global_step"] < global_step + (not is_evaluated or "eval_loss" not in row)
        ]
        if self._path.exists():
            with errors_of_the_disk(self._path, remedy=_REMEDY):
                write_text(self._path, "".join(f"{json.dumps(row)}\n" for row in kept))
        self.latest: dict[str, Any] = {}
        for row in kept:
            self.latest |= row

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return read_metrics(self._path)[0] if self._path.exists() else []

    def write(self, row: dict[str, Any]) -> None:
        """Append a row.

        Raises:
            DiskError: it could not be written; what was there before stays.
        """
        with errors_of_the_disk(self._path, remedy=_REMEDY):
            append_line(self._path, json.dumps(row))
        self.latest |= row
