"""The processes of a run: their ranks, what they agree on, and requests to stop.

Control messages (stop requests, counts, choices) travel over gloo and CPU tensors, so that they never wait for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from ds_roberta.errors import UserError, user_message
from ds_roberta.process import logger

Result = TypeVar("Result")

PATIENCE = timedelta(days=1)
"""How long processes wait for one that works for all, such as on the packing index of a trillion tokens. They notice at
once if it ends, by its closed connections."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of processes, and the group for control messages."""

    rank: int
    world_size: int
    local_rank: int
    control_group: dist.ProcessGroup | None

    @classmethod
    def current(cls, limit: timedelta) -> Ranks:
        """This process's rank in the default process group, which must exist; a collective call.

        Args:
            limit: how long the group for control messages may take to form: only then is the end of one process
                noticed by the others.
        """
        control_group = dist.group.WORLD
        if dist.get_backend() != "gloo":
            control_group = dist.new_group(backend="gloo", timeout=limit)
        _set_pg_timeout(PATIENCE, control_group)
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), control_group)

    @classmethod
    def of_one_process(cls) -> Ranks:
        """Those of a process that runs without others, in no group."""
        return cls(0, 1, 0, None)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The values' sums over all processes, in float64."""
        return self._reduce(list(values), dist.ReduceOp.SUM)

    def sum_each(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """The sums of named scalars over all processes."""
        return dict(zip(values, self.sum(*map(float, values.values())), strict=True))

    def min(self, value: int) -> int:
        return int(self._reduce([float(value)], dist.ReduceOp.MIN)[0])

    def max(self, value: int) -> int:
        return int(self._reduce([float(value)], dist.ReduceOp.MAX)[0])

    def any(self, flag: bool) -> bool:
        return self._reduce([float(flag)], dist.ReduceOp.MAX)[0] > 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, any picklable object, on all processes."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Run `function` on rank 0; return its value on all processes, or raise its error there as a `UserError`."""
        value, problem = _attempt(function) if self.is_main else (None, None)
        if self.any(value is not None or problem is not None):  # usually there is nothing to send
            value, problem = self.broadcast((value, problem))
        if problem is not None:
            raise UserError(*problem)
        return cast(Result, value)

    @contextlib.contextmanager
    def main_holds(self, context: contextlib.AbstractContextManager[Result]) -> Iterator[Result | None]:
        """Enter a context on rank 0, which gets its value, and leave it at the end; all raise an error on entering."""
        entered: list[Result] = []
        with contextlib.ExitStack() as held:
            self.on_main(lambda: entered.append(held.enter_context(context)))
            yield entered[0] if entered else None

    def together(self, function: Callable[[], Result]) -> Result:
        """Run `function` on every rank and return its value here; raise a `UserError` on all ranks if any rank met one.

        The error is the first one meant for users; it names the hosts that met it, unless all did.
        """
        value, problem = _attempt(function)
        problems = self.gather((socket.gethostname(), problem))
        first = next((text for _, text in problems if text is not None), None)
        if first is not None:
            hosts = sorted({host for host, text in problems if text == first})
            everywhere = all(text == first for _, text in problems)
            raise UserError(*first) if everywhere else UserError(f"on {', '.join(hosts)}: {first[0]}", *first[1:])
        return cast(Result, value)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Compare facts that all ranks must share with rank 0's.

        Raises:
            UserError: a rank's facts differ from rank 0's; the first difference is named, with the rank's host.
        """
        everyones = self.gather((socket.gethostname(), dict(facts)))
        main_host, expected = everyones[0]
        for rank, (host, found) in enumerate(everyones):
            for name in {**expected, **found}:
                if found.get(name) != expected.get(name):
                    raise UserError(
                        f"rank {rank} on {host} has {name} {found.get(name)!r}, rank 0 on {main_host} has "
                        f"{expected.get(name)!r}: give all hosts the same program, data and options"
                    )

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on all processes."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def log(self, message: str) -> None:
        """Log a message once for all processes."""
        if self.is_main:
            logger.info(message)

    def _reduce(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self.control_group)
        return tensor.tolist()


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, tuple[str, ...] | None]:
    """The function's value, or the lines of an error that users should see; raises any other error."""
    try:
        return function(), None
    except Exception as error:
        problem = user_message(error)
        if problem is None:
            raise
        return None, problem


class StopRequest:
    """Remembers a signal until all processes have agreed on it. A context manager that restores the handlers.

    The first signal asks for a checkpoint and a clean end; a second Ctrl-C ends the process at once. (A launcher
    passes Ctrl-C on as SIGTERM, which therefore does not count as the second.)
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._received: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; call on all processes at the same point."""
        return self._ranks.any(self._received is not None)
