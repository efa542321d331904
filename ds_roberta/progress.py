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


class MicroStepBar:
    """A bar over the run's steps that moves with every micro-step.

    Args:
        visible: false on ranks other than 0.
        first_line: what the bar shows until a step ends.
    """

    def __init__(self, max_steps: int, global_step: int, visible: bool, first_line: str = ""):
        self._max_steps, self._global_step, self._visible = max_steps, global_step, visible
        self._first_micro_step_end: float | None = None
        self._expected_time_said = not visible
        self._bar = progress_bar(
            total=max_steps,
            initial=global_step,
            disable=not visible,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
            dynamic_ncols=True,
            postfix=first_line,
        )

    def restart(self, global_step: int) -> None:
        """Move to `global_step`, after which a step may take a different time: the expected time is logged again."""
        self._global_step = self._bar.n = global_step
        self._first_micro_step_end = None
        self._expected_time_said = not self._visible

    def micro_step(self, micro_step: int, micro_steps: int, wait: Callable[[], object]) -> None:
        """Move on by one micro-step of `micro_steps`.

        Args:
            wait: returns when the device has finished the micro-step; called only for the first two after the run's
                start or a `restart`; the time between them gives the expected time of a step.
        """
        if not self._expected_time_said:
            wait()
            now = time.perf_counter()
            if self._first_micro_step_end is not None:
                self._say_expected_time((now - self._first_micro_step_end) * micro_steps, micro_steps)
            self._first_micro_step_end = now
        if micro_steps > 1:
            self._bar.set_description_str(
                f"step {self._global_step + 1}/{self._max_steps}, micro_step {micro_step + 1}/{micro_steps}",
                refresh=False,
            )
        self._bar.update(1 / micro_steps)

    def step(self, global_step: int, loss: float, tokens_per_second: float, mfu: float, seconds: float) -> None:
        self._global_step = global_step
        if not self._expected_time_said:
            self._say_expected_time(seconds, 1)
        self._bar.n = global_step  # the sum of fractions, without their rounding
        self._bar.set_description_str(f"step {global_step}/{self._max_steps}", refresh=False)
        rate = f"{tokens_per_second:,.0f} tokens/s, MFU {mfu:.0%}"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate}", refresh=False)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._visible:
            self._bar.write(message, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()

    def _say_expected_time(self, seconds: float, micro_steps: int) -> None:
        self._expected_time_said = True
        self.say(f"expected time per step: {duration(seconds)} ({micro_steps} micro-steps)")


def duration(seconds: float) -> str:
    """Seconds in words, in a suitable unit."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
