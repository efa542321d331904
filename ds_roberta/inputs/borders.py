"""Cut a stream of bytes into chunks that end where a document or a line ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from ds_roberta.inputs.pieces import Damage, Piece, Reject
from ds_roberta.inputs.streams import Damaged, known_format, read_blocks

BOM = b"\xef\xbb\xbf"
NEWLINE = rb"(?:\r\n|\r(?!\n)|\n)"
LINE_END = re.compile(NEWLINE)
_BLANK_LINE = re.compile(NEWLINE + rb"[ \t\v\f]*" + NEWLINE)
_JSON_LINE = re.compile(rb"\n")
_BLANK = b" \t\v\f\r\n"
_LAST_WINDOW = 1 << 14
_LONGEST_BLANK = 1 << 20

BORDERS = {"blank-line": _BLANK_LINE, "line": LINE_END, "json-line": _JSON_LINE, "file": None}
"""For each kind of document, what comes before a border; None if the whole file is one document."""


def read_chunks(
    piece: Piece, kind: str, longest: int, pass_over: Callable[[bytes], None] | None = None
) -> Iterator[tuple[int, bytes | Reject | Damage]]:
    """Yield offset and bytes of parts that hold whole documents; for parts that cannot be read, the reason.

    Args:
        kind: a key of `BORDERS`.
        longest: a document with more bytes is rejected, and is not held in memory.
        pass_over: called with all parts of such a document in turn, before its `Reject` is yielded.

    Raises:
        UserError: the file cannot be read or has become shorter.
    """
    compression = known_format(piece.path).compression
    origin = piece.start if compression is None else 0
    end = origin
    try:
        blocks = read_blocks(piece.path, piece.start, piece.end, compression)
        for offset, chunk in cut_at_borders(blocks, kind, longest, pass_over):
            offset += origin
            if isinstance(chunk, int):
                yield offset, Reject("too_long", offset, f"more than {longest} bytes", bytes=chunk)
            else:
                end = offset + len(chunk)
                yield offset, chunk
    except Damaged as damage:
        yield end, Damage(damage.reason, end, damage.detail)


def has_return_ends(piece: Piece) -> bool:
    """Whether the first line of a file ends with only `\\r`, as old programs wrote it."""
    try:
        head = next(read_blocks(piece.path, piece.start, piece.end, known_format(piece.path).compression), b"")
    except Damaged:
        return False
    match = LINE_END.search(head)
    return match is not None and match[0] == b"\r" and match.end() < len(head)


def first_border(data: bytes, kind: str, complete: bool) -> int | None:
    """Return the offset after the first separator of documents, or None if there is none.

    Args:
        complete: whether nothing follows `data`; otherwise a `\\r` at its end may be half of a `\\r\\n`.
    """
    pattern = BORDERS[kind]
    match = pattern.search(data, 0, _usable(data, complete)) if pattern else None
    return match.end() if match else None


def last_border(data: bytes, kind: str, complete: bool, searched: int = 0) -> int | None:
    """Return the offset after the last separator of documents, or None if there is none.

    Args:
        searched: none begins before this offset.
    """
    pattern, end, window = BORDERS[kind], _usable(data, complete), _LAST_WINDOW
    if pattern is None:
        return None
    if pattern is _JSON_LINE:
        return data.rfind(b"\n", searched) + 1 or None
    while True:
        begin = max(searched, end - window)
        last = None
        for match in pattern.finditer(data, begin, end):
            last = match.end()
        if last is not None or begin == searched:
            return last
        window *= 4


def cut_at_borders(
    blocks: Iterable[bytes], kind: str, longest: int, pass_over: Callable[[bytes], None] | None = None
) -> Iterator[tuple[int, bytes | int]]:
    """Gather the blocks of a stream into chunks that end at borders.

    For a document longer than `longest` bytes, its size is yielded instead of its bytes, which `pass_over` gets.

    Yields:
        The offset in the stream and the bytes of each chunk.
    """
    offset, buffer, searched, too_long = 0, b"", 0, None  # the last is where an overlong document begins

    def release(size: int) -> None:
        nonlocal offset, buffer
        if pass_over is not None:
            pass_over(buffer[:size])
        offset, buffer = offset + size, buffer[size:]

    for block in blocks:
        buffer = buffer + block if buffer else block
        if too_long is not None:
            searched = 0
            border = first_border(buffer, kind, complete=False)
            if border is None:
                release(len(buffer) - len(_blank_end(buffer)))
                continue
            release(border)
            yield too_long, offset - too_long
            too_long = None
        border = last_border(buffer, kind, complete=False, searched=searched)
        if border is not None:
            yield offset, buffer[:border]
            offset, buffer = offset + border, buffer[border:]
        elif len(buffer) > longest:
            too_long = offset
        searched = len(buffer.rstrip(_BLANK)) if border is None else 0  # a border may begin in the blanks after it
    if too_long is not None:
        release(len(buffer))
        yield too_long, offset - too_long
    elif buffer or kind == "file":
        yield offset, buffer


def _usable(data: bytes, complete: bool) -> int:
    return len(data) - (not complete and data.endswith(b"\r"))


def _blank_end(data: bytes) -> bytes:
    """Return the white space at the end of `data`, in which a border may begin."""
    return data[max(len(data.rstrip(_BLANK)), len(data) - _LONGEST_BLANK) :]
