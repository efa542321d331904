"""The plan: how files are divided among shards, decided before the work starts.

A pure function of the inputs and the options. A unit's shards have its number, so the output's bytes do not
depend on who handles a unit or when. Large plain files are cut at the first document border after every
multiple of `unit_bytes`, tables between row groups or record batches; compressed files and `.csv` files, which can only
be read from the start, are not cut. Small files are combined until they fill a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from ds_roberta.errors import UserError
from ds_roberta.inputs.borders import first_border
from ds_roberta.inputs.columns import measure_table
from ds_roberta.inputs.pieces import ALL_PARTS, Damage, Piece
from ds_roberta.inputs.streams import (
    CSV,
    JSON_LINES,
    TABLES,
    begins_well,
    file_size,
    known_format,
    open_binary,
    readable,
)
from preprocessing.reading.accounts import Account, refuse_damage
from preprocessing.reading.documents import ReadOptions
from preprocessing.reading.readers import check_columns, read_documents

UNIT_BYTES = 8 << 20
_SEARCH_BYTES = 1 << 16


@dataclass(frozen=True)
class Unit:
    """A work unit: pieces of one source that one worker turns into shards numbered `index`."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


def plan_units(
    files: Sequence[str],
    options: ReadOptions,
    unit_bytes: int = UNIT_BYTES,
    sources: Mapping[str, str] | None = None,
    allow_damaged: bool = True,
) -> list[Unit]:
    """Cut and combine `files`, in their order, into units of about `unit_bytes`.

    Args:
        sources: the source's name of every file that has one.
        allow_damaged: whether a file whose first bytes or index show damage is left to the readers instead of raising.

    Raises:
        UserError: a file cannot be read, has another encoding or is damaged, or all are empty.
    """
    sources = sources or {}
    units: list[tuple[Piece, ...]] = []
    gathered: list[Piece] = []
    gathered_bytes = 0
    for path in files:
        pieces, damaged = _cut(path, options, unit_bytes, sources.get(path, ""))
        if damaged and not allow_damaged:
            _refuse(pieces[-1], options)
        full = gathered_bytes + sum(piece.bytes for piece in pieces) > unit_bytes
        if gathered and (len(pieces) > 1 or full or gathered[0].source != pieces[0].source):
            units.append(tuple(gathered))
            gathered, gathered_bytes = [], 0
        if len(pieces) > 1:
            units.extend((piece,) for piece in pieces)
        else:
            gathered += pieces
            gathered_bytes += pieces[0].bytes
    if gathered:
        units.append(tuple(gathered))
    plan = [Unit(index, pieces) for index, pieces in enumerate(units)]
    if not any(unit.bytes for unit in plan):
        raise UserError(f"the corpus is empty: {len(files)} input file(s), 0 bytes; choose files with text as --input")
    return plan


def _cut(path: str, options: ReadOptions, unit_bytes: int, source: str) -> tuple[list[Piece], bool]:
    """Return the pieces of a file, and whether the last one is damaged, as far as a first look can show."""
    kind, compression = known_format(path)
    if kind in TABLES:
        parts, damaged = measure_table(path, options.text_column, partial(check_columns, path, options))
        return _cut_table(path, parts, unit_bytes, source), damaged
    with readable(path), open_binary(path) as file:
        size = file_size(file)
        damaged = not begins_well(path, file, compression)
        borders = [0]
        if compression is None and kind != CSV:
            border_kind = "json-line" if kind == JSON_LINES else options.documents
            searched = 0
            for target in range(unit_bytes, size, unit_bytes) if border_kind != "file" else ():
                if target <= searched:
                    continue  # a document reaches beyond this position
                searched, found = _border_after(file, target, size, border_kind, options.longest_raw)
                if found and searched < size:
                    borders.append(searched)
    return [Piece(path, start, end, source) for start, end in zip(borders, [*borders[1:], size], strict=True)], damaged


def _border_after(file: BinaryIO, target: int, size: int, kind: str, longest: int) -> tuple[int, bool]:
    """Return the first border after `target` and True; or, if none is within a document's length, the end of the search
    and False."""
    length = _SEARCH_BYTES
    while True:
        file.seek(target)
        data = file.read(length)
        complete = target + len(data) >= size
        border = first_border(data, kind, complete)
        if border is not None:
            return target + border, True
        if complete or length > longest:
            return target + len(data), False
        length *= 4


def _cut_table(path: str, parts: Sequence[int], unit_bytes: int, source: str) -> list[Piece]:
    pieces, start, weight = [], 0, 0
    for index, part in enumerate(parts):
        if weight and weight + part > unit_bytes:
            pieces.append(Piece(path, start, index, source, weight))
            start, weight = index, 0
        weight += part
    # A file that cannot be opened is also a piece: reading it shows why, and loses nothing if it can be opened then.
    return [*pieces, Piece(path, start, len(parts) or ALL_PARTS, source, max(weight, 1))]


def _refuse(piece: Piece, options: ReadOptions) -> None:
    account = Account()
    for item in read_documents(piece, options):
        if isinstance(item, Damage):
            account.damaged(piece.path, item)
    refuse_damage({piece.path: account})
