"""What a run reports: rows of a JSONL file, and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_roberta.errors import UserError
from ds_roberta.files import append_line, errors_of_the_disk, load_json, read_json, write_text
from ds_roberta.progress import progress_bar

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


def read_record(path: Path) -> dict[str, Any]:
    """A run's `config.json`; raises `UserError` if it cannot be read or is not an object."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{str(path)!r} is not a JSON object: fix or remove it")
    return record


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


class Progress:
    """A bar over the run's steps that moves with every micro-step.

    Args:
        visible: false on ranks other than 0.
        first_line: what the bar shows until a step ends.
    """

    def __init__(self, max_steps: int, global_step: int, visible: bool, first_line: str = ""):
        self._max_steps, self._global_step, self._visible = max_steps, global_step, visible
        self._first_micro_step_end: float | None = None
        self._expected_time_said = not visible
        self._bar = progress_bar(
            total=max_steps,
            initial=global_step,
            disable=not visible,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
            dynamic_ncols=True,
            postfix=first_line,
        )

    def restart(self, global_step: int) -> None:
        """Move to `global_step`, after which a step may take a different time: the expected time is logged again."""
        self._global_step = self._bar.n = global_step
        self._first_micro_step_end = None
        self._expected_time_said = not self._visible

    def micro_step(self, micro_step: int, micro_steps: int, wait: Callable[[], object]) -> None:
        """Move on by one micro-step of `micro_steps`.

        Args:
            wait: returns when the device has finished the micro-step; called only for the first two after the run's
                start or a `restart`; the time between them gives the expected time of a step.
        """
        if not self._expected_time_said:
            wait()
            now = time.perf_counter()
            if self._first_micro_step_end is not None:
                self._say_expected_time((now - self._first_micro_step_end) * micro_steps, micro_steps)
            self._first_micro_step_end = now
        if micro_steps > 1:
            self._bar.set_description_str(
                f"step {self._global_step + 1}/{self._max_steps}, micro_step {micro_step + 1}/{micro_steps}",
                refresh=False,
            )
        self._bar.update(1 / micro_steps)

    def step(self, global_step: int, loss: float, tokens_per_second: float, mfu: float, seconds: float) -> None:
        self._global_step = global_step
        if not self._expected_time_said:
            self._say_expected_time(seconds, 1)
        self._bar.n = global_step  # the sum of fractions, without their rounding
        self._bar.set_description_str(f"step {global_step}/{self._max_steps}", refresh=False)
        rate = f"{tokens_per_second:,.0f} tokens/s, MFU {mfu:.0%}"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate}", refresh=False)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._visible:
            self._bar.write(message, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()

    def _say_expected_time(self, seconds: float, micro_steps: int) -> None:
        self._expected_time_said = True
        self.say(f"expected time per step: {duration(seconds)} ({micro_steps} micro-steps)")


def duration(seconds: float) -> str:
    """Seconds in words, in a suitable unit."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
