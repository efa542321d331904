"""Who may write a folder: a lease that a job holds while it lives, and that its workers look at before they write.

A lease is a small file with a random name beside the work, one for each process that runs a job (or an array task of
one). It lives as long as its process does on the same machine; from another machine, as long as it is touched. A dead
lease is removed by the next job, and whoever finds its own lease gone stops. No locks are used: on network file
systems they are unreliable, while creating, opening and removing a file are not.
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
