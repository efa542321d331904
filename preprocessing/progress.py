"""The progress bars of the commands that read text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ds_roberta.command_line import Messages

_LOG_SECONDS = 30.0
"""How often a bar is written into a log file."""


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
        delay=0.5,
        mininterval=every,
    ) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = False
            raise


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
