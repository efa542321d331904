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
import os
import random
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import check_replaceable, partial_folder, put_in_place, sync_directory, sync_file, write_json

FIRST_STAGE = "tokenizer"
"""The stage that makes `data`."""
UNITS = "units"
"""The stage that takes long: without a record of it there is nothing to go on from."""
Record = dict[str, Any]
Task = tuple[int, int]
"""Number, from 0, and count of the array task that a process is."""
HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0
_PATIENCE_SECONDS = 3.0
"""How long a new job waits for an old one that is just ending, and for another that begins at the same moment."""


class JobStopped(UserError):
    """The job ended before its time, but its finished units are kept: the same command goes on from them."""


class LeaseHeld(UserError):
    """A living job holds a lease that excludes the one asked for."""


@dataclass(frozen=True)
class Holder:
    """What a lease says of the process that holds it."""

    plan: str
    task: tuple[int, int] | None
    host: str
    pid: int
    machine: str
    process: str
    since: str

    @classmethod
    def this_process(cls, plan: str, task: tuple[int, int] | None) -> Holder:
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(plan, task, socket.gethostname(), pid, _machine(), _process(pid), since)

    def excludes(self, other: Holder) -> bool:
        """Whether the two may not work at the same time: only different tasks of one array on one plan may."""
        both_tasks = self.task is not None and other.task is not None
        if not both_tasks or self.plan != other.plan:
            return True
        assert self.task is not None
        assert other.task is not None
        return self.task[1] != other.task[1] or self.task[0] == other.task[0]

    def on_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == _machine()


@dataclass(frozen=True)
class Lease:
    """A held lease; small and picklable, so that every worker has it."""

    path: Path

    def check(self) -> None:
        """Raise `JobStopped` if the lease was taken away, because another job thought this one dead."""
        try:
            # Opening asks the server of a network file system; a mere stat may be answered from a cache.
            with self.path.open("rb"):
                pass
        except FileNotFoundError:
            raise JobStopped(
                f"this job lost its lease ({self.path} is gone): another job took the output over, or the folder was "
                "removed; see what runs, then give the same command again"
            ) from None


@contextmanager
def held_lease(folder: Path, plan: str, task: tuple[int, int] | None, output: Path) -> Iterator[Lease]:
    """Hold a lease in `folder` while the context lasts, keeping it fresh from a thread.

    Args:
        plan: the plan's fingerprint.
        task: number (from 0) and count of the array task that this process is, if it is one.
        output: what the user calls the job, for the error.

    Raises:
        LeaseHeld: a living job holds a lease that excludes this one.
    """
    lease = _acquire(folder, Holder.this_process(plan, task), output)
    ended = threading.Event()

    def keep_fresh() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # gone: the workers and the next check will find out
                os.utime(lease.path)

    threading.Thread(target=keep_fresh, daemon=True).start()
    try:
        yield lease
    finally:
        ended.set()
        lease.path.unlink(missing_ok=True)


def is_alive(path: Path) -> bool:
    """Whether a process still holds the lease `path`; may watch it for a minute if that is on another machine."""
    holder = _read(path)
    if holder is None:
        return False
    if holder.on_this_machine():
        return _process(holder.pid) == holder.process
    # Clocks of machines differ, so nothing but change is believed: a living holder touches its lease.
    first, deadline = _touched(path), time.monotonic() + DEAD_AFTER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = _touched(path)
        if now is None:
            return False
        if now != first:
            return True
    return False


def _acquire(folder: Path, ours: Holder, output: Path) -> Lease:
    # Write first, look then: of two jobs that begin at once, at least one sees the other.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{secrets.token_hex(8)}.json"
        _write(path, ours)
        try:
            other = _living_excluder(folder, path, ours)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if other is None:
            return Lease(path)
        path.unlink(missing_ok=True)
        if time.monotonic() > deadline:
            raise LeaseHeld(
                f"another job writes {str(output)!r}: process {other.pid} on {other.host}, since {other.since}; "
                f"wait for it, end it ('kill {other.pid}' on {other.host}), or give another --output"
            )
        time.sleep(random.uniform(0.2, 0.6))


def _living_excluder(folder: Path, own: Path, ours: Holder) -> Holder | None:
    """A living holder that excludes us, if there is one; dead leases are removed."""
    for path in sorted(folder.glob("*.json")):
        holder = None if path == own else _read(path)
        if holder is None or not ours.excludes(holder):
            continue
        if not holder.on_this_machine():
            print(f"waiting to see whether process {holder.pid} on {holder.host} still writes …", flush=True)
        if is_alive(path):
            return holder
        path.unlink(missing_ok=True)
    return None


def _write(path: Path, holder: Holder) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> Holder | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**{**content, "task": content["task"] and tuple(content["task"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # removed meanwhile, or not a lease


def _touched(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _machine() -> str:
    """Identity of the running system and its process numbers; empty where it cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(pid: int) -> str:
    """Identity of a living process, so that a number given to another one is not mistaken; empty if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start_time = fields[0], fields[19]
    return "" if state in "ZX" else start_time


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
