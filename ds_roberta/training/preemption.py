"""Stop requests: Ctrl-C and the signals by which schedulers announce that time is up."""

from __future__ import annotations

import signal
from types import FrameType

from ds_roberta.distributed import Ranks

STOPPED_EXIT_CODE = 85
"""Exit code of a run that was asked to stop and saved: start the same command again to go on."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal until all processes have agreed on it. A context manager: handlers are put back at its end.

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
        """Whether any process was asked to stop; call on all processes at the same place."""
        return self._ranks.any(self._received is not None)
