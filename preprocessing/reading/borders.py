"""Where a text may be cut without cutting a document: for the plan's pieces, and for a stream's chunks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_NEWLINE = rb"(?:\r\n|\r(?!\n)|\n)"
_LINE = re.compile(_NEWLINE)
_BLANK_LINE = re.compile(_NEWLINE + rb"[ \t\v\f]*" + _NEWLINE)
_JSON_LINE = re.compile(rb"\n")
_LAST_WINDOW = 1 << 14
_LONGEST_BLANK = 1 << 20

BORDERS = {"blank-line": _BLANK_LINE, "line": _LINE, "json-line": _JSON_LINE, "file": None}
"""By kind of document: what stands before a border; nothing where a file is one document."""


def first_border(data: bytes, kind: str, complete: bool) -> int | None:
    """The offset behind the first thing that separates documents; None where there is none.

    Args:
        complete: whether nothing follows `data`; else a `\\r` at its end may be half of a `\\r\\n`.
    """
    pattern = BORDERS[kind]
    match = pattern.search(data, 0, _usable(data, complete)) if pattern else None
    return match.end() if match else None


def last_border(data: bytes, kind: str, complete: bool) -> int | None:
    """The offset behind the last thing that separates documents; None where there is none."""
    pattern, end, window = BORDERS[kind], _usable(data, complete), _LAST_WINDOW
    if pattern is None:
        return None
    if pattern is _JSON_LINE:
        return data.rfind(b"\n") + 1 or None
    while True:
        begin = max(0, end - window)
        last = None
        for match in pattern.finditer(data, begin, end):
            last = match.end()
        if last is not None or begin == 0:
            return last
        window *= 4


def cut_at_borders(blocks: Iterable[bytes], kind: str, longest: int) -> Iterator[tuple[int, bytes | int]]:
    """Gather the blocks of a stream into chunks that end at borders.

    A document that is longer than `longest` bytes is passed over: in its place comes the number of its bytes.

    Yields:
        Offset in the stream and bytes of each chunk.
    """
    offset, buffer, too_long = 0, b"", None  # the last is where a document begins that is too long
    for block in blocks:
        buffer = buffer + block if buffer else block
        if too_long is not None:
            border = first_border(buffer, kind, complete=False)
            if border is None:
                kept = _blank_end(buffer)
                offset, buffer = offset + len(buffer) - len(kept), kept
                continue
            offset, buffer = offset + border, buffer[border:]
            yield too_long, offset - too_long
            too_long = None
        border = last_border(buffer, kind, complete=False)
        if border is not None:
            yield offset, buffer[:border]
            offset, buffer = offset + border, buffer[border:]
        elif len(buffer) > longest:
            too_long = offset
    if too_long is not None:
        yield too_long, offset + len(buffer) - too_long
    elif buffer or kind == "file":
        yield offset, buffer


def _usable(data: bytes, complete: bool) -> int:
    return len(data) - (not complete and data.endswith(b"\r"))


def _blank_end(data: bytes) -> bytes:
    """The white space that ends `data`, in which a border may begin."""
    return data[max(len(data.rstrip(b" \t\v\f\r\n")), len(data) - _LONGEST_BLANK) :]
