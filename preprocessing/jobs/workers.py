"""Spread work over the processes of this machine or of an MPI job, or do it all in this process.

Every process exits as soon as its parent dies. Otherwise the workers of a killed job, or the ranks of a killed mpirun,
would go on writing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ds_roberta.errors import UserError
from ds_roberta.lease import JobStopped, Task

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_SECONDS = 0.3


class Workers:
    """Runs a function on the items of a list; without an executor, in this process.

    Used as a context manager, it ends all work after an error, before the folder that the work writes to is removed.
    """

    def __init__(self, count: int, executor: Executor | None, stop: Callable[[], None]):
        self.count, self._executor, self._stop = count, executor, stop

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop()

    def run(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the results for all items, in the order in which they finish.

        Raises:
            JobStopped: a worker process was killed from outside; and whatever `work` raises.
        """
        if self._executor is None or len(items) == 1:
            yield from map(work, items)
            return
        try:
            for future in as_completed([self._executor.submit(work, item) for item in items]):
                yield future.result()
        except BrokenProcessPool as error:
            raise JobStopped(
                "a worker process was killed, perhaps for lack of memory: repeat the command to resume, "
                f"perhaps with fewer than --workers {self.count}"
            ) from error


@contextmanager
def local_workers(count: int) -> Iterator[Workers]:
    """`count` processes on this machine; a single worker works in this process."""
    if count == 1:
        yield Workers(1, None, lambda: None)
        return
    not_ours = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_begin_worker, initargs=(os.getpid(),)) as pool:

        def stop() -> None:
            pool.shutdown(wait=False, cancel_futures=True)
            workers = [worker for worker in multiprocessing.active_children() if worker not in not_ours]
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()

        yield Workers(count, pool, stop)


def is_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether mpirun or srun started this process as one of several ranks."""
    if any(int(environment.get(name, 1)) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        return True
    return "PMIX_RANK" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def refuse_strangers(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` if srun started several tasks that do not know of each other, and would each do all work."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and not is_mpi(environment):
        raise UserError(
            f"srun started {tasks} tasks that do not know of each other: give srun --mpi=pmix, start one task (-n 1), "
            f"or give each its share with --task I/{tasks}"
        )


@contextmanager
def mpi_workers() -> Iterator[Workers | None]:
    """Yield the other ranks as workers in rank 0; in the other ranks, yield None once all work is done.

    Raises:
        UserError: mpi4py is missing.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        raise UserError(
            f"started as one of several MPI processes, but mpi4py cannot be imported ({error}): "
            "pip install 'ds_roberta[mpi]', or start the command without mpirun"
        ) from error
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        if pool is None:
            yield None
            return
        executor: Any = pool  # declared as None by mpi4py's stubs
        ranks = MPI.COMM_WORLD.Get_size() - 1
        yield Workers(ranks, executor, lambda: executor.shutdown(wait=True, cancel_futures=True))


def slurm_task(environment: Mapping[str, str] = os.environ) -> Task | None:
    """Return this process's number (from 0) and the number of tasks of its SLURM array, or None outside an array.

    Raises:
        UserError: the array's numbers are not evenly spaced, so a task cannot derive its own from them.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    number, first, last, step, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
    )
    if last - first != (count - 1) * step or (number - first) % step:
        raise UserError(
            f"the SLURM array of {count} tasks from {first} to {last} has gaps: number them without gaps, as in "
            f"--array=0-{count - 1}, or give each task its share with --task I/{count}"
        )
    return (number - first) // step, count


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
