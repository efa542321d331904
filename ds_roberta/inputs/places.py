"""Places in files for messages, and what a user can do about what is wrong there."""

from __future__ import annotations

from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.inputs.borders import has_return_ends
from ds_roberta.inputs.pieces import Piece
from ds_roberta.inputs.streams import (
    TABLES,
    Damaged,
    file_size,
    known_format,
    open_binary,
    read_blocks,
    readable,
)

_LINES_COUNTED_UP_TO = 1 << 30
REMEDIES = {
    "not_utf8": "convert the file, for example with iconv -t UTF-8",
    "bad_json": "fix or remove the line",
    "bad_csv": "fix or remove the row",
    "missing_column": "name the column that holds the text with --text_column",
}
"""What a user can do about each kind of bad document."""
DAMAGE_REMEDIES = {
    "truncated": "download the file again",
    "corrupt": "download the file again",
    "unclosed_quote": "close the quote",
    "json_array": "convert the file, for example with jq -c '.[]'",
}
"""What a user can do about each kind of damage."""


def located(path: str, place: dict[str, Any]) -> str:
    """Format a file, a position and what is wrong there, in one line."""
    kind = counted_in(path)
    where = f"{kind} {place[kind]}"
    line = line_number(path, place[kind]) if kind == "byte" else None
    return f"{path!r}, {where if line is None else f'line {line} ({where})'}: {place['detail']}"


def counted_in(path: str) -> str:
    """Return what an `offset` in a file counts: rows or bytes."""
    return "row" if known_format(path).kind in TABLES else "byte"


def line_number(path: str, offset: int) -> int | None:
    """Return the line of a byte, counted from 1; None if it is so far into the file that counting would take long."""
    if offset > _LINES_COUNTED_UP_TO:
        return None
    lines, left = 1, offset
    try:
        with readable(path), open_binary(path) as file:
            whole = Piece(path, 0, file_size(file))
        ends = (b"\n", b"\r") if has_return_ends(whole) else (b"\n",)
        for block in read_blocks(path, 0, whole.end, known_format(path).compression):
            lines += sum(map(block[:left].count, ends))
            left -= min(left, len(block))
            if not left:
                break
    except (Damaged, UserError):
        return None
    return lines
