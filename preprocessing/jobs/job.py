"""The work of one job on disk: each item is done once, by any process, however often the job is killed.

    .NAME.partial/                 next to the output NAME
      leases/  finishing/          who is working, and who moves the output into place
      PLAN/                        named by the plan's fingerprint
        PHASE/NNNNN.json           a finished item: its result, written last
        data/ …                    what the items made; `data` becomes the output
        scratch/                   what is being made now

An item is written into a folder of its own in `scratch`; then its files are moved into place and its record is written.
An item's bytes depend only on the plan, so doing one twice does no harm. The plan's fingerprint is in the path, so a
process left over from another plan finds nothing to write to.

While a job is alive it holds a lease (`ds_roberta.lease`), which its workers check before they write.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import check_replaceable, partial_folder, put_in_place, sync_directory, sync_file, write_json
from ds_roberta.lease import Lease, Task, held_lease, leases_folder, refuse_others

FIRST_PHASE = "tokenizer"
"""Name of the phase that makes `data`."""
UNITS = "units"
"""Name of the long phase: without a record of it, there is nothing to resume."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The folder of a plan's work, and the lease that protects it. Small and picklable."""

    folder: Path
    lease: Lease

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def is_published(self) -> bool:
        """Whether the output is already in place, because the job was killed just after moving it there."""
        return self.finished(FIRST_PHASE) > 0 and not self.data.exists()

    def record(self, phase: str, index: int) -> Record | None:
        """The result of an item, or None if it is not finished."""
        try:
            return json.loads(self._record_path(phase, index).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def finished(self, phase: str) -> int:
        """The number of finished items of a phase."""
        return sum(1 for _ in (self.folder / phase).glob("[0-9]*.json"))

    def do(self, phase: str, index: int, work: Callable[[Path], Record]) -> Record:
        """Do one item and record it.

        Args:
            work: writes files into the empty folder it is given, under the paths that they get in the job's folder,
                and returns the item's record.

        Raises:
            JobStopped: the lease was lost; nothing is moved into place.
            Exception: whatever `work` raises.
        """
        self.lease.check()
        scratch = self.folder / "scratch" / f"{phase}-{index:05d}-{secrets.token_hex(4)}"
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
            for parent in {parent for file in files for parent in file.parents}:
                sync_directory(self.folder / parent)
            path = self._record_path(phase, index)
            path.parent.mkdir(exist_ok=True)
            write_json(path, record)
            return record
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _record_path(self, phase: str, index: int) -> Path:
        return self.folder / phase / f"{index:05d}.json"


@contextmanager
def opened_job(output: Path, plan: str, task: Task | None, is_ours: Callable[[Path], bool], kind: str) -> Iterator[Job]:
    """Take the lease on `output`, remove the work of other plans, and yield the job of `plan` with its finished items.

    If no unit is finished at the end, the work is removed; otherwise it is kept so that the same plan can resume.

    Raises:
        UserError: another job is alive, the output must not be replaced, or `task` is given and there is finished work
            of another plan.
    """
    root, is_open = partial_folder(output), False
    refuse_others(leases_folder(output), output)
    try:
        with held_lease(root / "leases", plan, task, output) as lease:
            refuse_others(
                leases_folder(output), output
            )  # again: one that began meanwhile sees our lease, or we its own
            check_replaceable(output, is_ours, kind)
            others = [entry for entry in root.iterdir() if entry.name not in ("leases", "finishing", plan)]
            _give_up(others, task)
            is_open = True
            for entry in others:
                shutil.rmtree(entry)
            job = Job(root / plan, lease)
            if task is None:  # otherwise other tasks may be writing there
                shutil.rmtree(job.folder / "scratch", ignore_errors=True)
            yield job
    finally:
        is_left = not any((root / "leases").glob("*.json")) and not any((root / plan / UNITS).glob("*.json"))
        if is_left and is_open:
            shutil.rmtree(root, ignore_errors=True)
        elif not is_open:  # what else is there belongs to another job
            with suppress(OSError):
                (root / "leases").rmdir()
                root.rmdir()


def _give_up(others: Sequence[Path], task: Task | None) -> None:
    """Say how many finished units of other plans are going to be removed; those of an array are refused to one task."""
    finished = sum(1 for entry in others for _ in (entry / UNITS).glob("[0-9]*.json"))
    if finished and task is not None:
        raise UserError(
            f"{finished} units in {others[0].parent} were finished with other inputs, filter or options than task "
            f"{task[0] + 1}/{task[1]} has: submit it with theirs, or remove that folder to begin again"
        )
    if finished:
        print(f"begins again: {finished} units were finished with other inputs, filter or options, and are removed")


def publish(job: Job, output: Path) -> None:
    """Move the finished data into place and remove the rest of the job."""
    for leftover in job.data.rglob(".*.tmp"):  # of a job that was killed while writing the manifest
        leftover.unlink()
    job.lease.check()
    put_in_place(job.data, output)
    clear(job)


def clear(job: Job) -> None:
    """Remove what a published job left next to the output."""
    with suppress(OSError):  # the output is whole
        # Renamed first, so that no other task takes a half-removed job for work to resume.
        job.folder.rename(job.folder.with_name("done"))
    shutil.rmtree(job.folder.parent, ignore_errors=True)
