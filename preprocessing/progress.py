"""The progress bar of the commands that read text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def byte_bar(total: int, what: str) -> Iterator[tqdm[Any]]:
    """A bar over bytes with MB/s and the time left, on stderr."""
    # An error is one line: a bar that has just begun is not shown yet, an older one is wiped away before it.
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=0.5) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = False
            raise
