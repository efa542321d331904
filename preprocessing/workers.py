"""Running the plan's units on processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ds_roberta.errors import UserError
from preprocessing.plan import Unit

Result = TypeVar("Result")


def run_units(units: Sequence[Unit], work: Callable[[Unit], Result], workers: int) -> Iterator[Result]:
    """Yield the results of all units, in the order in which they are done.

    One worker works in this process; at the first error, or an interruption, the others are stopped at once.

    Raises:
        UserError: a worker process was killed from outside; and whatever `work` raises.
    """
    workers = min(workers, len(units))
    if workers == 1:
        yield from map(work, units)
        return
    not_ours = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(work, unit) for unit in units]):
                yield future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                if worker not in not_ours:
                    worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"a worker process was killed, perhaps for lack of memory: try fewer than --workers {workers}"
                ) from error
            raise
