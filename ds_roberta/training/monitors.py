"""TensorBoard, CSV files and Weights & Biases, set up by the DeepSpeed JSON's sections, written where DeepSpeed would.

DeepSpeed itself does not get the sections: it would add other series, against a sample counter that restarts with
every start. Here x is `global_step`, and a series has each step once. `metrics.jsonl` is the record: when a run starts,
resumes or rolls back, every monitor is made to match what is left of it.
"""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ds_roberta.errors import UserError
from ds_roberta.files import append_line, errors_of_the_disk, load_json, write_json, write_text
from ds_roberta.training.wandb_monitor import WandbMonitor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ds_roberta.training.metrics import MetricsLog

Point = tuple[int, dict[str, float]]
"""A step, and its values by the series' names."""

RECORD_NAME = "monitors.json"
"""The file in the run's folder with the id by which W&B and the monitors' folders know the run."""
OWNER_NAME = ".run_id"
"""The file in a monitor's folder with the id of the run that writes there."""
_PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}
_FILES = {"tensorboard": "*tfevents*", "csv_monitor": "Train_*.csv"}


def point(row: dict[str, Any]) -> Point:
    """A row of `metrics.jsonl` as monitors show it; null, which means not finite, becomes NaN."""
    values = {f"Train/{name}": math.nan if value is None else value for name, value in row.items()}
    return int(values.pop("Train/global_step")), values


class Monitor(Protocol):
    def start(self, points: list[Point], global_step: int) -> None:
        """Show exactly `points`, the run's so far; the next ones follow step `global_step`."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def saved(self, global_step: int) -> None:
        """Note that no step up to `global_step` will be undone."""
        return None

    def close(self, complete: bool) -> None:
        return None


class Monitors:
    """The monitors of a run on the rank that opened them; on the others every method does nothing.

    A monitor that fails during the run (a full disk, a lost service) is reported and left out until the next start.
    """

    def __init__(self, output_dir: Path, sections: dict[str, Any], may_roll_back: bool):
        """
        Args:
            sections: `DeepSpeedConfig.monitors`.
            may_roll_back: whether steps may be undone during the run.
        """
        self._output_dir, self._sections, self._may_roll_back = output_dir, sections, may_roll_back
        self._open: dict[str, Monitor] = {}
        self._say: Callable[[str], object] = print

    def check(self) -> None:
        """Check that packages and folders can be used; nothing is written.

        Raises:
            UserError: a package is missing, or a folder has another run's files.
        """
        run_id = self._run_id()
        for name in self._sections.keys() & _PACKAGES.keys():
            _import(name)
        for name in self._sections.keys() & _FILES.keys():
            _check_owner(_folder(self._sections[name]), name, run_id)

    def open(self, say: Callable[[str], object]) -> None:
        """Claim the folders and the W&B run; the run's folder must exist.

        Raises:
            UserError: a folder cannot be written; nobody is logged in to W&B.
        """
        self._say = say
        if not self._sections:
            return
        run_id = self._run_id() or secrets.token_hex(4)
        with errors_of_the_disk(self._record):
            write_json(self._record, {"run_id": run_id, "output_dir": str(self._output_dir.resolve())})
        for name, section in self._sections.items():
            if name == "wandb":
                monitor = WandbMonitor.open(section, run_id, self._may_roll_back, say)
                if monitor is not None:
                    self._open[name] = monitor
            else:
                folder = _folder(section)
                _take_folder(folder, name, run_id)
                self._open[name] = CsvMonitor(folder) if name == "csv_monitor" else TensorBoardMonitor(folder)

    def start(self, metrics: MetricsLog, global_step: int, say: Callable[[str], object]) -> None:
        """Make every monitor match a log that is at `global_step`; messages go to `say` from now on."""
        self._say = say
        if self._open:
            points = [point(row) for row in metrics.rows()]
            self._each(lambda monitor: monitor.start(points, global_step))

    def write(self, row: dict[str, Any]) -> None:
        """Show a row of `metrics.jsonl`."""
        step, values = point(row)
        self._each(lambda monitor: monitor.write(step, values))

    def saved(self, global_step: int) -> None:
        """Say that a checkpoint of `global_step` is complete: a rollback goes no further back."""
        self._each(lambda monitor: monitor.saved(global_step))

    def close(self, complete: bool) -> None:
        """Close the monitors.

        Args:
            complete: whether the run is complete; if not, its last step may yet be evaluated.
        """
        self._each(lambda monitor: monitor.close(complete))
        self._open = {}

    def _each(self, call: Callable[[Monitor], None]) -> None:
        for name, monitor in list(self._open.items()):
            try:
                call(monitor)
            except Exception as error:  # no error of a library may end a run of days
                del self._open[name]
                self._say(f"{name} fails and is left out until the next start: {error!r}")

    @property
    def _record(self) -> Path:
        return self._output_dir / RECORD_NAME

    def _run_id(self) -> str | None:
        """The run's id; None if it has none yet, or if its folder is a copy of another, to which the id belongs."""
        if not self._record.exists():
            return None
        record = _read_record(self._record)
        original = Path(record.get("output_dir") or self._output_dir, RECORD_NAME)
        if original.exists() and not original.samefile(self._record):
            return None if _read_record(original)["run_id"] == record["run_id"] else record["run_id"]
        return record["run_id"]


def _read_record(path: Path) -> dict[str, str]:
    try:
        record = load_json(path.read_text(encoding="utf-8"))
        return {**record, "run_id": str(record["run_id"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged: remove it, and the monitors begin a new run") from error


def _import(section: str) -> None:
    module, package = _PACKAGES[section]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{section}.enabled is true, but {package} cannot be imported ({error}): pip install {package}, or set "
            f"{section}.enabled to false"
        ) from error


def _folder(section: dict[str, Any]) -> Path:
    """Where DeepSpeed writes with this section: by default in the working directory."""
    return Path(section.get("output_path", ""), section.get("job_name", "DeepSpeedJobName"))


def _check_owner(folder: Path, section: str, run_id: str | None) -> None:
    owner = folder / OWNER_NAME
    found = owner.read_text(encoding="utf-8").strip() if owner.is_file() else None
    if (found is None or found != run_id) and any(folder.glob(_FILES[section])):
        raise UserError(
            f"{section} would mix two runs: {str(folder)!r} has the files of another; choose another "
            f"{section}.job_name or output_path, or remove the folder"
        )


def _take_folder(folder: Path, section: str, run_id: str) -> None:
    """Claim a monitor's folder for this run, or raise `UserError`."""
    with errors_of_the_disk(folder, remedy=f"change {section}.output_path"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / OWNER_NAME, run_id + "\n")


class CsvMonitor(Monitor):
    """Writes a CSV file for each series, with the columns `global_step` and the series' name."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._paths: dict[str, Path] = {}

    def start(self, points: list[Point], global_step: int) -> None:
        lines: dict[str, list[str]] = {}
        for step, values in points:
            for name, value in values.items():
                lines.setdefault(name, []).append(f"{step},{value!r}")
        self._paths = {name: self._begin(name, rows) for name, rows in lines.items()}
        for path in set(self._folder.glob(_FILES["csv_monitor"])) - set(self._paths.values()):
            path.unlink()

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            line = f"{step},{value!r}"
            if name in self._paths:
                append_line(self._paths[name], line)
            else:
                self._paths[name] = self._begin(name, [line])

    def _begin(self, name: str, lines: list[str]) -> Path:
        path = self._folder / f"{name.replace('/', '_')}.csv"
        write_text(path, "\n".join([f"global_step,{name.split('/')[-1]}", *lines, ""]))
        return path


class TensorBoardMonitor(Monitor):
    """Writes event files; those of a new start hide what earlier ones contain from its first step on."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written = folder / ".written_up_to"  # the last step whose events are there
        self._writer: SummaryWriter | None = None

    def start(self, points: list[Point], global_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close(complete=False)
        # The run's current step is hidden too: its evaluation is repeated. So is the last one written, which may have
        # lacked a row, and all if it is unknown.
        hide_from = None
        if any(self._folder.glob(_FILES["tensorboard"])):
            written = self._written.read_text(encoding="utf-8") if self._written.exists() else ""
            hide_from = min(global_step, int(written or 0))
        self._note(hide_from or 0)
        self._writer = SummaryWriter(str(self._folder), purge_step=hide_from)
        for step, values in points:
            if hide_from is None or step >= hide_from:
                self._add(self._writer, step, values)
        self._writer.flush()
        self._note(global_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None
        self._add(self._writer, step, values)
        self._writer.flush()  # a kill loses what is still buffered
        self._note(step)

    def _note(self, step: int) -> None:
        self._written.write_text(str(step), encoding="utf-8")

    def close(self, complete: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    @staticmethod
    def _add(writer: SummaryWriter, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
