"""Progress bars on stderr that write rarely into a log file and never stop the work."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any

from tqdm import tqdm

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 15.0
"""How often a bar is written."""
_DELAY_SECONDS = 0.5
"""Work that ends sooner shows no bar."""


class Messages:
    """stderr for progress bars: output that it refuses (a log on a full disk) is lost, and the work continues."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_bar(**options: Any) -> tqdm[Any]:
    """A bar of `tqdm` with these options. A log file gets few of the updates that a terminal shows."""
    every = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(file=Messages(), mininterval=every, **options)


@contextmanager
def byte_bar(total: int, what: str, done: int = 0) -> Iterator[tqdm[Any]]:
    """A bar over bytes with MB/s and the time left; `done` of them were done before it began."""
    # An error is one line: a bar that has just begun is not shown yet, and an older one is erased first.
    with progress_bar(
        total=total, initial=done, desc=what, unit="B", unit_scale=True, delay=_DELAY_SECONDS, miniters=0
    ) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = False
            raise


@contextmanager
def clock(what: str) -> Iterator[Callable[[], None]]:
    """Show the time that work without any other output takes; yields a function that starts the clock."""
    ended = threading.Event()

    def show() -> None:
        every = 1.0 if sys.stderr.isatty() else _LOG_SECONDS
        shape = "{desc}: {elapsed}"
        with tqdm(file=Messages(), desc=what, bar_format=shape, delay=_DELAY_SECONDS, mininterval=0, miniters=0) as bar:
            while not ended.wait(every):
                bar.update(0)

    thread = threading.Thread(target=show, daemon=True)
    try:
        yield thread.start
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def document_bar(total: int, what: str, done: int = 0) -> Iterator[Callable[[int, int], None]]:
    """As `byte_bar`, with documents/s: yields a function that takes the numbers of bytes and documents just done."""
    with byte_bar(total, what, done) as bar:
        documents = 0

        def update(size: int, more_documents: int) -> None:
            nonlocal documents
            documents += more_documents
            seconds = bar.format_dict["elapsed"]
            if seconds:
                bar.set_postfix_str(f"{documents / seconds:,.0f} documents/s", refresh=False)
            bar.update(size)

        yield update


class StepBar:
    """A bar over a run's steps with the loss and the time left; a context manager.

    Args:
        what: the run, in words.
        done: steps that were taken before.
        visible: false on ranks other than 0.
    """

    def __init__(self, max_steps: int, what: str, done: int = 0, visible: bool = True):
        self._bar = progress_bar(
            total=max_steps,
            initial=done,
            desc=what,
            disable=not visible,
            delay=_DELAY_SECONDS,
            miniters=0,
            smoothing=0,  # the time left then includes the evaluations to come
            dynamic_ncols=True,
            bar_format="{desc}: step {n_fmt}/{total_fmt}{postfix} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]",
        )

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:  # as in `byte_bar`
            self._bar.leave = False
        self._bar.close()

    def step(self, loss: Callable[[], float]) -> None:
        """Move on by one step.

        Args:
            loss: gives the step's loss; called only when the bar is written, because on a GPU it waits for the device.
        """
        if not self._bar.disable and time.time() - self._bar.last_print_t >= self._bar.mininterval:
            self._bar.set_postfix_str(f"loss {loss():.3f}", refresh=False)
        self._bar.update()

    def interrupted(self) -> AbstractContextManager[None]:
        """A context for other lines on the screen: the bar is erased, if it is shown, and comes back after them."""
        if self._bar.disable or self._bar.last_print_t == self._bar.start_t:
            return nullcontext()
        return self._bar.external_write_mode(file=self._bar.fp)
