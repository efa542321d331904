"""Refuse or delay the file system calls of a process, beneath every library: what a full or failing disk does.

Linux's seccomp hands the watched calls of a process, its threads and its children to the process that started it, which
answers each: let it happen, let it happen later, or fail with an error number. So Python, Rust and C++ meet the same
disk, and nothing is compiled. A sync is answered at once: only a power cut could tell.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path

from ds_roberta.errors import UserError

READ, WRITE, CREATE, RENAME, SYNC = "read", "write", "create", "rename", "sync"
_BY_DESCRIPTOR = {  # x86_64; the argument that is the descriptor of what changes
    READ: {0: 0, 17: 0, 19: 0, 295: 0, 327: 0},  # read, pread64, readv, preadv, preadv2
    # write, pwrite64, writev, pwritev, pwritev2, ftruncate, fallocate, sendfile, copy_file_range
    WRITE: {1: 0, 18: 0, 20: 0, 296: 0, 328: 0, 77: 0, 285: 0, 40: 0, 326: 2},
    SYNC: {74: 0, 75: 0},  # fsync, fdatasync
}
_BY_PATH: dict[str, dict[int, tuple[int | None, int]]] = {  # the folder's descriptor, if any, and the path
    CREATE: {2: (None, 0), 257: (0, 1), 83: (None, 0), 258: (0, 1), 86: (None, 1), 265: (2, 3)},  # open … linkat
    RENAME: {82: (None, 1), 264: (2, 3), 316: (2, 3)},
}
_FLAGS_OF_OPEN = {2: 1, 257: 2}
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_AT_FDCWD = 0xFFFFFF9C
_LONGEST_PATH = 4096
_PR_SET_NO_NEW_PRIVS, _SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER = 38, 317, 1, 8
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_LET_HAPPEN = 1
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_KILLED_AFTER_SECONDS = 600.0
_FORK = multiprocessing.get_context("fork")


@dataclass
class Disk:
    """Decides what happens to the calls that concern the files below a folder.

    Attributes:
        folder: other files are not concerned.
        kinds: the kinds of calls that are counted.
        refused: which call fails, from 1; 0 for none.
        number: the error it fails with.
        stays_full: whether later writes and files to create are refused, too.
        delayed: which calls happen late.
        seconds: by how much.
        count: calls so far.
        what: the calls that were refused or delayed.
    """

    folder: Path
    kinds: tuple[str, ...] = (WRITE, CREATE, RENAME, SYNC)
    refused: int = 0
    number: int = errno.ENOSPC
    stays_full: bool = False
    delayed: tuple[int, ...] = ()
    seconds: float = 0.0
    count: int = 0
    what: list[str] | None = None

    def answer(self, kind: str, path: str) -> int:
        """The error number with which a call fails; 0 if it happens."""
        if kind not in self.kinds or not path.startswith(f"{self.folder}/"):
            return 0
        self.count += 1
        is_refused = self.count == self.refused
        is_late = self.count in self.delayed
        if is_refused or is_late:
            self.what = [*(self.what or []), f"{kind} {Path(path).relative_to(self.folder)}"]
        if is_late:
            time.sleep(self.seconds)
        is_full = self.stays_full and 0 < self.refused < self.count and kind in (WRITE, CREATE)
        return self.number if is_refused or is_full else 0


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal; None if it was killed because it hung.
    """

    code: int | None
    output: str
    errors: str
    seconds: float


@dataclass(frozen=True)
class Running:
    """A process that was started; `listener` is the descriptor by which its calls are answered, if they are."""

    process: BaseProcess
    listener: int | None
    streams: tuple[Path, Path]
    began: float

    def ended(self, disk: Disk | None = None) -> Ended:
        """Wait for its end, and meanwhile answer its calls; it is killed if it hangs."""
        deadline = self.began + _KILLED_AFTER_SECONDS
        try:
            if self.listener is not None and disk is not None:
                _answer(self.listener, disk, self.process, deadline)
            self.process.join(max(0.0, deadline - time.monotonic()))
            code = self.process.exitcode
        finally:
            if self.process.is_alive():
                os.killpg(self.process.pid or 0, signal.SIGKILL)
            self.process.join()
            if self.listener is not None:
                os.close(self.listener)
        output, errors = (path.read_text(encoding="utf-8", errors="replace") for path in self.streams)
        return Ended(code, output, errors, time.monotonic() - self.began)


def start(body: Callable[[], None], folder: Path, logs: Path, watched: bool = False, name: str = "command") -> Running:
    """Run `body` in a forked process, in a folder.

    Args:
        logs: a folder for its output and errors, outside the one whose calls are answered.
        watched: whether its calls are to be answered.

    Raises:
        UserError: this system cannot watch calls.
    """
    if watched and (sys.platform != "linux" or platform.machine() != "x86_64"):
        raise UserError(f"faults of the disk need Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    began, streams = time.monotonic(), (logs / f"{name}.out", logs / f"{name}.err")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = _FORK.Process(target=_be, args=(body, folder, streams, theirs if watched else None))
            process.start()
        message, listeners = socket.recv_fds(ours, 64, 1)[:2] if watched else (b"", [None])
    if not listeners:
        process.join()
        raise UserError(f"faults of the disk need seccomp's notifications: {message.decode() or 'not known here'}")
    return Running(process, listeners[0], streams, began)


def spread(count: int, at_most: int) -> list[int]:
    """All numbers from 1 to `count`, or `at_most` of them at equal distances."""
    if count <= at_most:
        return list(range(1, count + 1))
    return [1 + (count - 1) * index // max(at_most - 1, 1) for index in range(at_most)]


def _be(body: Callable[[], None], folder: Path, streams: tuple[Path, Path], sending: socket.socket | None) -> None:
    os.setsid()
    os.chdir(folder)
    for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    if sending is not None:
        with sending:
            _hand_over_calls(sending)
    body()


def _hand_over_calls(sending: socket.socket) -> None:
    """Have the calls of this process answered by the one at the other end of the socket."""
    program = ctypes.create_string_buffer(_filter())
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(_filter()) // 8, ctypes.addressof(program)))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    descriptor = libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, argument)
    if descriptor < 0:
        sending.send(os.strerror(ctypes.get_errno()).encode())
        os._exit(1)
    socket.send_fds(sending, [b"watched"], [descriptor])
    os.close(descriptor)


def _filter() -> bytes:
    """A program of classic BPF, which hands over the watched calls, and of those that open files the ones to write."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    steps = [step(_LOAD, 0)]
    for number in chain(*_BY_DESCRIPTOR.values(), *_BY_PATH.values()):
        if number in _FLAGS_OF_OPEN:
            steps += [step(_JUMP_IF_EQUAL, number, 0, 4), step(_LOAD, 16 + 8 * _FLAGS_OF_OPEN[number])]
            steps += [step(_JUMP_IF_ANY, _CHANGES, 0, 1), step(_RETURN, _NOTIFY), step(_RETURN, _ALLOW)]
        else:
            steps += [step(_JUMP_IF_EQUAL, number, 0, 1), step(_RETURN, _NOTIFY)]
    return b"".join([*steps, step(_RETURN, _ALLOW)])


def _answer(listener: int, disk: Disk, process: BaseProcess, deadline: float) -> None:
    """Answer calls until no process with the filter is left."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while time.monotonic() < deadline:
        ready = poll.poll(200)
        if not ready:
            if process.exitcode is not None:
                return
            continue
        if ready[0][1] & select.POLLHUP:
            return
        request = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, request)
            call, thread = struct.unpack_from("QI", request)
            number, *arguments = struct.unpack_from("i12x6Q", request, 16)
            kind, path = _concerned(thread, number, arguments)
            refusal = disk.answer(kind, path)
            happens = not refusal and kind != SYNC
            fcntl.ioctl(listener, _SEND, struct.pack("QqiI", call, 0, -refusal, _LET_HAPPEN if happens else 0))
        except FileNotFoundError:  # the caller has been killed
            continue


def _concerned(thread: int, number: int, arguments: list[int]) -> tuple[str, str]:
    """The kind of a call, and the absolute path of the file that it concerns; empty if there is none."""
    for kind, calls in _BY_DESCRIPTOR.items():
        if number in calls:
            return kind, _link(f"/proc/{thread}/fd/{arguments[calls[number]] & 0xFFFFFFFF}")
    for kind, paths in _BY_PATH.items():
        if number in paths:
            folder, place = paths[number]
            path = _text(thread, arguments[place])
            if path.startswith("/"):
                return kind, path
            descriptor = _AT_FDCWD if folder is None else arguments[folder] & 0xFFFFFFFF
            parent = "cwd" if descriptor == _AT_FDCWD else f"fd/{descriptor}"
            return kind, f"{_link(f'/proc/{thread}/{parent}')}/{path}"
    raise AssertionError(number)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed, or never open: the call fails by itself
        return ""


def _text(thread: int, address: int) -> str:
    try:
        with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            try:
                content = memory.read(_LONGEST_PATH)
            except OSError:
                memory.seek(address)
                content = memory.read(4096 - address % 4096)  # the next page is not there
    except OSError:
        return ""
    return os.fsdecode(content.partition(b"\0")[0])
