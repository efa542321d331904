"""The progress bars of the commands that read text."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ds_roberta.command_line import Messages

_LOG_SECONDS = 30.0
"""How often a bar is written into a log file."""
_DELAY_SECONDS = 0.5
"""What ends before shows no bar."""


@contextmanager
def byte_bar(total: int, what: str, done: int = 0) -> Iterator[tqdm[Any]]:
    """A bar over bytes with MB/s and the time left, on stderr; `done` were there before it began."""
    # An error is one line: a bar that has just begun is not shown yet, an older one is wiped away before it.
    every = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
    with tqdm(
        file=Messages(),
        total=total,
        initial=done,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=_DELAY_SECONDS,
        mininterval=every,
        miniters=0,
    ) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = False
            raise


@contextmanager
def clock(what: str) -> Iterator[Callable[[], None]]:
    """Show on stderr how long something takes that gives no other sign; yields a function that begins it."""
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
    """As `byte_bar`, with documents/s: yields a function that is told of bytes and documents that are done."""
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
