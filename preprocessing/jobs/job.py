"""The work of one job on disk: steps that are done once, whoever does them and however often the job is killed.

    .NAME.partial/                 beside the output NAME
      leases/  finishing/          who works, and who puts the output into place
      PLAN/                        named by the plan's fingerprint
        STAGE/NNNNN.json           a finished step: what became of it, written last
        data/ …                    what the steps made; `data` becomes the output
        scratch/                   what is being made

A step writes into a folder of its own in `scratch`, then moves its files into place and writes its record. Since a
step's bytes depend on the plan alone, a step done twice does no harm; since the plan's fingerprint is in the path, an
orphan of another plan finds nothing to write to.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_roberta.files import check_replaceable, partial_folder, put_in_place, sync_directory, sync_file, write_json
from preprocessing.jobs.lease import Lease, held_lease

FIRST_STAGE = "tokenizer"
"""The stage that makes `data`."""
UNITS = "units"
"""The stage that takes long: without a record of it there is nothing to go on from."""
Record = dict[str, Any]
Task = tuple[int, int]
"""Number, from 0, and count of the array task that a process is."""


@dataclass(frozen=True)
class Job:
    """The folder of a plan's work, and the lease under which it is written. Small and picklable."""

    folder: Path
    lease: Lease

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def is_published(self) -> bool:
        """Whether the data is in the output's place already, the job having been killed just then."""
        return self.finished(FIRST_STAGE) > 0 and not self.data.exists()

    def record(self, stage: str, index: int) -> Record | None:
        """What became of a step, or None if it is not finished."""
        try:
            return json.loads(self._record_path(stage, index).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def finished(self, stage: str) -> int:
        """The number of finished steps of a stage."""
        return sum(1 for _ in (self.folder / stage).glob("[0-9]*.json"))

    def do(self, stage: str, index: int, work: Callable[[Path], Record]) -> Record:
        """Do a step.

        Args:
            work: writes files into the empty folder it gets, at the places that they shall have in the job's folder,
                and returns the step's record.

        Raises:
            JobStopped: the lease was lost; nothing is moved into place. And whatever `work` raises.
        """
        self.lease.check()
        scratch = self.folder / "scratch" / f"{stage}-{index:05d}-{secrets.token_hex(4)}"
        scratch.mkdir(parents=True)
        try:
            record = work(scratch)
            files = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
            for file in files:
                sync_file(scratch / file)
            self.lease.check()
            for file in files:
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                (scratch / file).replace(self.folder / file)
            for parent in {file.parent for file in files}:
                sync_directory(self.folder / parent)
            path = self._record_path(stage, index)
            path.parent.mkdir(exist_ok=True)
            write_json(path, record)
            return record
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _record_path(self, stage: str, index: int) -> Path:
        return self.folder / stage / f"{index:05d}.json"


@contextmanager
def opened_job(output: Path, plan: str, task: Task | None, is_ours: Callable[[Path], bool], kind: str) -> Iterator[Job]:
    """Take the lease on `output` and yield the job of `plan` with its finished steps; other plans' work is removed.

    If no unit is finished in the end, nothing is left; else the work stays for the same plan.

    Raises:
        UserError: another job is alive, or the output must not be replaced.
    """
    root = partial_folder(output)
    try:
        with held_lease(root / "leases", plan, task, output) as lease:
            check_replaceable(output, is_ours, kind)
            for entry in root.iterdir():
                if entry.name not in ("leases", "finishing", plan):
                    shutil.rmtree(entry)
            job = Job(root / plan, lease)
            if task is None:  # else other tasks may be writing there
                shutil.rmtree(job.folder / "scratch", ignore_errors=True)
            yield job
    finally:
        _remove_without_work(root, plan)


def publish(job: Job, output: Path) -> None:
    """Put the finished data into the output's place and remove the rest of the job."""
    for leftover in job.data.rglob(".*.tmp"):  # of a job that was killed as it wrote the manifest
        leftover.unlink()
    job.lease.check()
    put_in_place(job.data, output)
    clear(job)


def clear(job: Job) -> None:
    """Remove what a published job left beside the output."""
    with suppress(OSError):  # the output is whole
        # In one move, so that no other task takes what is left of the job for work to go on with.
        job.folder.rename(job.folder.with_name("done"))
    shutil.rmtree(job.folder.parent, ignore_errors=True)


def _remove_without_work(root: Path, plan: str) -> None:
    others = any((root / "leases").glob("*.json"))
    if not others and not any((root / plan / UNITS).glob("*.json")):
        shutil.rmtree(root, ignore_errors=True)
