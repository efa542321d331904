"""The plan: which bytes of which files make which shard, decided before the work begins.

A pure function of the inputs and the options. A unit gives one shard of each split under its own number, so the
output's bytes do not depend on who handles a unit or when. Large files are cut at the first border of documents
behind every multiple of `unit_bytes`; small files are gathered until they fill a unit.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ds_roberta.errors import UserError
from preprocessing.readers import Piece, ReadOptions, cut_pattern

UNIT_BYTES = 8 << 20
MAX_PIECE_BYTES = 1 << 30
"""A piece lies in a worker's memory and in one shard, whose offsets are 32 bits."""


@dataclass(frozen=True)
class Unit:
    """What one worker turns into one shard of each split; `index` is the shards' number."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


def plan_units(files: Sequence[str], options: ReadOptions, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut and gather `files`, in their order, into units of about `unit_bytes`.

    Raises:
        UserError: a file cannot be read, all are empty, or one holds a piece too long to be one document.
    """
    units: list[tuple[Piece, ...]] = []
    gathered: list[Piece] = []
    for path in files:
        pieces = _cut(path, options, unit_bytes)
        if len(pieces) > 1 or sum(piece.end - piece.start for piece in [*gathered, *pieces]) > unit_bytes:
            if gathered:
                units.append(tuple(gathered))
            gathered = []
        if len(pieces) > 1:
            units.extend((piece,) for piece in pieces)
        else:
            gathered += pieces
    if gathered:
        units.append(tuple(gathered))
    plan = [Unit(index, pieces) for index, pieces in enumerate(units)]
    if not any(unit.bytes for unit in plan):
        raise UserError(f"the corpus is empty: {len(files)} input file(s), 0 bytes; give files with text as --input")
    return plan


def _cut(path: str, options: ReadOptions, unit_bytes: int) -> list[Piece]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            pattern = cut_pattern(path, options)
            borders = [0]
            if size > unit_bytes and pattern is not None:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    for target in range(unit_bytes, size, unit_bytes):
                        if target <= borders[-1]:
                            continue  # a document reached beyond this place
                        match = pattern.search(data, target)
                        border = match.end() if match else size
                        del match  # it holds the map open
                        if border >= size:
                            break
                        borders.append(border)
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror}; make it readable or leave it out") from error
    pieces = [Piece(path, start, end) for start, end in zip(borders, [*borders[1:], size], strict=True)]
    longest = max(piece.end - piece.start for piece in pieces)
    if longest > MAX_PIECE_BYTES:
        raise UserError(
            f"{path!r} has {longest} bytes without a border between documents, at most {MAX_PIECE_BYTES} are possible: "
            "separate its documents by blank lines, or use --documents line"
        )
    return pieces
