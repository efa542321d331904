"""This process: its log, its memory, its end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import sys
import time
from typing import Any, NoReturn

logger = logging.getLogger("ds_roberta")
STOPPED_EXIT_CODE = 85
"""Exit code of a run that was asked to stop and saved: run the same command again to continue."""
_SECONDS_TO_LEAVE = 5.0
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse large freed blocks instead of returning each one to the system.

    Every step makes the same large tensors. Getting fresh pages for them takes a quarter of a CPU run's time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 26)):
            libc.mallopt(option, value)


def set_up_logging() -> None:
    """Show messages of this project from INFO on; DeepSpeed's and others' only from WARNING on."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)


def leave(code: int) -> NoReturn:
    """End a process that has communicated: run the exit handlers, flush, and skip the interpreter's shutdown.

    A gloo thread may still hold the last collective's tensor and needs the interpreter to release it. Before Python
    3.14 a thread that asks for the interpreter while it finalizes aborts the process, so a finished run would fail.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        if code not in (0, STOPPED_EXIT_CODE) and not _others_leave(mpi.COMM_WORLD):
            mpi.COMM_WORLD.Abort(code)  # to finalize would be to wait for them
        mpi.Finalize()
    os._exit(code)


def _others_leave(communicator: Any) -> bool:
    """Whether all processes of MPI come here within some seconds, as after an error that they share."""
    request, deadline = communicator.Ibarrier(), time.monotonic() + _SECONDS_TO_LEAVE
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
