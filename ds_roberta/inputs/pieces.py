"""What the readers of files agree on: pieces of files, and the parts of them that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ALL_PARTS = 1 << 62
"""The end of a table's piece that has all row groups or record batches of its file, however many there are."""


@dataclass(frozen=True)
class Piece:
    """A part of a file that begins and ends between documents, and the name of the source that it belongs to.

    `start … end` are bytes of a plain text file, all bytes of a compressed one, row groups of a Parquet file and
    record batches of an Arrow file. `weight` is the size of a table's piece for the plan.
    """

    path: str
    start: int
    end: int
    source: str = ""
    weight: int = 0

    @property
    def bytes(self) -> int:
        return self.weight or self.end - self.start


class Reject(NamedTuple):
    """A document or row that cannot be used: why not, and where it begins.

    `offset` is a byte of the (decompressed) file, or a row of a table, both counted from 0. `documents` is above 1
    if that many rows share the reason. `bytes` is the size of a document that is too long.
    """

    reason: str
    offset: int
    detail: str = ""
    documents: int = 1
    bytes: int = 0


class Damage(NamedTuple):
    """A part of a file that cannot be read; it is unknown how many documents it held.

    `offset` is where it begins, as in `Reject`. `documents` is the number of rows known to be lost, or 0.
    """

    reason: str
    offset: int
    detail: str
    documents: int = 0
