"""Leases: at most one living job writes an output.

A lease is a small file with a random name, one for each process that runs a job (or an array task of one). On the same
machine it is alive as long as its process; seen from another machine, as long as it is touched. The next job removes a
dead lease, and a job whose own lease is gone stops. No locks are used: on network file systems they are unreliable,
while creating, opening and removing a file are not. (filelock's `SoftFileLease` has one holder per file and does not
record its work, so tasks could not share a plan.)
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_roberta.errors import UserError

Task = tuple[int, int]
"""The number (from 0) of this process's array task, and the number of tasks."""
HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0
_PATIENCE_SECONDS = 3.0
"""How long a new job waits for one that is just ending, or that begins at the same moment."""


class JobStopped(UserError):
    """The job ended early, but its finished units are kept: the same command resumes from them."""


class LeaseHeld(UserError):
    """A living job holds a lease that excludes the requested one."""


@dataclass(frozen=True)
class Holder:
    """The content of a lease: which process holds it."""

    plan: str
    task: Task | None
    host: str
    pid: int
    machine: str
    process: str
    since: str

    @classmethod
    def this_process(cls, plan: str, task: Task | None) -> Holder:
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(plan, task, socket.gethostname(), pid, _machine(), _process(pid), since)

    def excludes(self, other: Holder) -> bool:
        """Return whether two holders may not work at once: only different tasks of one array on one plan may."""
        if self.task is None or other.task is None or self.plan != other.plan:
            return True
        return self.task[1] != other.task[1] or self.task[0] == other.task[0]

    def on_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == _machine()


@dataclass(frozen=True)
class Lease:
    """A held lease; small and picklable, so that every worker can have it."""

    path: Path

    def check(self) -> None:
        """Raise `JobStopped` if the lease was taken away, because another job thought this one dead."""
        try:
            # Opening asks the server of a network file system; a mere stat may be answered from a cache.
            with self.path.open("rb"):
                pass
        except FileNotFoundError:
            raise JobStopped(
                f"this job lost its lease ({self.path} is gone): another job took over the output, or the folder was "
                "removed; check which jobs are running, then repeat the command"
            ) from None


def leases_folder(output: Path) -> Path:
    """Where the lease on an output that is replaced as a whole is, while a job holds it."""
    return output.parent / f".{output.name}.leases"


def leases_within(output: Path) -> Path:
    """Where the lease on an output that stays is, while a job holds it; the folder around it may be read-only."""
    return output / ".leases"


@contextmanager
def sole_writer(output: Path, folder: Path) -> Iterator[Lease]:
    """Hold the lease on `output` for the length of the context.

    Args:
        folder: of the lease, from `leases_folder` or `leases_within`.

    Raises:
        LeaseHeld: a living job holds it.
        OSError: it cannot be written.
    """
    try:
        with held_lease(folder, "", None, output) as lease:
            yield lease
    finally:
        with suppress(OSError):  # another job's lease may be there
            folder.rmdir()


@contextmanager
def held_lease(folder: Path, plan: str, task: Task | None, output: Path) -> Iterator[Lease]:
    """Hold a lease in `folder` for the length of the context; a thread keeps it fresh.

    Args:
        plan: the plan's fingerprint.
        task: this process, if it is an array task.
        output: the job's output, by which the error names the job.

    Raises:
        LeaseHeld: a living job holds a lease that excludes this one.
    """
    # Write, then look: of two jobs that begin at the same time, at least one sees the other.
    ours, deadline = Holder.this_process(plan, task), None
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{secrets.token_hex(8)}.json"
        if not _write(path, ours):
            continue
        with _kept_fresh(path):
            other = _living_excluder(folder, path, ours)
            if other is None:
                yield Lease(path)
                return
        deadline = deadline or time.monotonic() + _PATIENCE_SECONDS
        if time.monotonic() > deadline:
            raise _held_by(other, output)
        time.sleep(random.uniform(0.2, 0.6))


def refuse_others(folder: Path, output: Path) -> None:
    """Raise `LeaseHeld` if a living job of another kind has a lease on `output` in `folder`."""
    other = _living_excluder(folder, None, Holder.this_process("", None))
    if other is not None:
        raise _held_by(other, output)


def _held_by(other: Holder, output: Path) -> LeaseHeld:
    return LeaseHeld(
        f"another job is writing {str(output)!r}: process {other.pid} on {other.host}, since {other.since}; "
        f"wait for it, end it ('kill {other.pid}' on {other.host}), or choose another output"
    )


def is_alive(path: Path) -> bool:
    """Return whether a process still holds the lease `path`; for a holder on another machine this can take a minute."""
    holder = _read(path)
    if holder is None:
        return False
    if holder.on_this_machine():
        return _process(holder.pid) == holder.process
    # Clocks differ between machines, so only a change counts: a living holder touches its lease.
    first, deadline = _touched(path), time.monotonic() + DEAD_AFTER_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = _touched(path)
        if now is None:
            return False
        if now != first:
            return True
    return False


@contextmanager
def _kept_fresh(path: Path) -> Iterator[None]:
    """Touch a lease now and then, and remove it at the end of the context."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # gone: the workers and the next check will notice
                os.utime(path)

    threading.Thread(target=touch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)


def _living_excluder(folder: Path, own: Path | None, ours: Holder) -> Holder | None:
    """Return a living holder that excludes this job, if any, and remove dead leases."""
    for path in sorted(folder.glob("*.json")):
        holder = None if path == own else _read(path)
        if holder is None or not ours.excludes(holder):
            continue
        if not holder.on_this_machine():
            print(f"waiting to see whether process {holder.pid} on {holder.host} is still writing …", flush=True)
        if is_alive(path):
            return holder
        path.unlink(missing_ok=True)
    return None


def _write(path: Path, holder: Holder) -> bool:
    """Write a lease; return False if another job that has just ended removed the folder."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(asdict(holder)), encoding="utf-8")
        temporary.replace(path)
    except FileNotFoundError:
        return False
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return True


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
    """Return what identifies the running system and its process numbers; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(pid: int) -> str:
    """Return what identifies a living process even if its number is reused later; empty if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start_time = fields[0], fields[19]
    return "" if state in "ZX" else start_time
