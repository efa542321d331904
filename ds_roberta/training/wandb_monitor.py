"""The monitor for Weights & Biases, with one W&B run for all starts of a training run.

W&B rejects a step that is smaller than one it has, and its rewinding of a run is a preview that works neither
offline nor with a self-hosted server. So no step is sent twice: the last step that W&B already has is read from
its server or, offline, from the files of earlier starts, and later steps are sent from `metrics.jsonl`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError

FINISH_TIMEOUT = 120
"""Seconds that the end of a run waits for an upload; WANDB_FINISH_TIMEOUT sets another."""


class WandbMonitor:
    """Sends a step's rows as one W&B row at the W&B step `global_step`.

    The newest step's row waits for the next row, because the step's evaluation may still come.
    """

    def __init__(self, run: Any, sent: int, may_roll_back: bool):
        """
        Args:
            run: a `wandb.Run`.
            sent: the last step that W&B has; -1 for none.
            may_roll_back: steps wait until a checkpoint makes them final.
        """
        self._run, self._sent = run, sent
        self._final = -1.0 if may_roll_back else math.inf
        self._waiting: dict[int, dict[str, Any]] = {}

    @classmethod
    def open(
        cls, section: dict[str, Any], run_id: str, may_roll_back: bool, say: Callable[[str], object]
    ) -> WandbMonitor | None:
        """Start or resume the W&B run.

        Args:
            section: `wandb` of the DeepSpeed JSON.

        Returns:
            None if the service cannot be reached, which is reported by `say`. The next start sends what is missing.

        Raises:
            UserError: nobody is logged in, or W&B refuses the settings.
        """
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_TIMEOUT))
        try:
            run = wandb.init(
                project=section.get("project", "deepspeed"),
                group=section.get("group"),
                entity=section.get("team"),
                id=run_id,
                resume="allow",
            )
            run.define_metric("Train/*", step_metric="global_step")
            return cls(run, last_recorded_step(run), may_roll_back)
        except (UsageError, AuthenticationError) as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"wandb cannot start ({text}): wandb login, or WANDB_MODE=offline, or set wandb.enabled to false"
            ) from error
        except Exception as error:  # a run goes on without the service
            text = " ".join(str(error).split())
            say(f"wandb cannot be reached and is left out; the next start sends what is missing: {text}")
            return None

    def start(self, points: list[tuple[int, dict[str, float]]], global_step: int) -> None:
        self._waiting = {}
        self.saved(global_step)
        for step, values in points:
            self.write(step, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step > self._sent:
            self._waiting.setdefault(step, {"global_step": step}).update(values)
            self._send(self._waiting.keys() - {step})

    def saved(self, global_step: int) -> None:
        self._final = max(self._final, global_step)
        self._send(self._waiting.keys() - {max(self._waiting, default=-1)})

    def close(self, complete: bool) -> None:
        if complete:
            self._final = math.inf
            self._send(self._waiting.keys())
        self._run.finish(exit_code=0 if complete else 1)

    def _send(self, steps: Iterable[int]) -> None:
        for step in sorted(steps):
            if step <= self._final:
                self._run.log(self._waiting.pop(step), step=step, commit=True)
                self._sent = step


def last_recorded_step(run: Any) -> int:
    """The last step of a W&B run that its server or, offline, the files of earlier starts have; -1 for none."""
    if not run.offline:
        return run.step - 1
    name = f"run-{run.id}.wandb"
    paths = Path(run.settings.wandb_dir).glob(f"*run-*-{run.id}/{name}")
    return max((step for path in paths for step in recorded_steps(path)), default=-1)


def recorded_steps(path: Path) -> Iterator[int]:
    """The steps of the rows in one of W&B's local files, up to where a kill may have cut it off."""
    from wandb.proto import wandb_internal_pb2

    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 1 << 15, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format (github.com/google/leveldb, doc/log_format.md) after a header."""
    position, parts = _FILE_HEADER, bytearray()
    while position + _RECORD_HEADER.size <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _RECORD_HEADER.size:
            position += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, position)
        position += _RECORD_HEADER.size + length
        if kind == 0 or position > len(data):
            return
        parts += data[position - length : position]
        if kind in (_FULL, _LAST):
            yield bytes(parts)
            parts.clear()
