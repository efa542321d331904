"""Turn the bytes of a file into documents, or say where and why a piece of the file is not one.

A `.txt` file is cut into documents by blank lines, by every line, or not at all; a `.jsonl` file holds one per line and
a `.csv` file one per row, the text in a column; `columns` reads `.parquet` and `.arrow`. Line ends are normalised to
`\\n`, and a byte-order mark at a file's start is dropped; nothing else in the text changes here. Documents are found in
the bytes and decoded one by one, so that a bad byte spoils only one document.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import orjson

from preprocessing.reading.columns import check_columns, read_table
from preprocessing.reading.documents import Damage, Document, Piece, ReadOptions, Reject
from preprocessing.reading.streams import CSV, JSON_LINES, TABLES, Damaged, known_format, read_blocks, share_read

_BOM = b"\xef\xbb\xbf"
_NEWLINE = rb"(?:\r\n|\r(?!\n)|\n)"
_LINE = re.compile(_NEWLINE)
_BLANK_LINES = re.compile(_NEWLINE + rb"(?:[ \t\v\f]*" + _NEWLINE + rb")+")
_BLANK_LINES_WITHOUT_RETURNS = re.compile(rb"\n[ \t\v\f]*\n(?:[ \t\v\f]*\n)*")
_CSV_FIELD_LIMIT = (1 << 31) - 1
"""The highest limit that the parser takes; this module itself checks how long a row is."""
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\v\f]*" + _NEWLINE + rb")+")
_BLANK_LINE = re.compile(_NEWLINE + rb"[ \t\v\f]*" + _NEWLINE)
_JSON_LINE = re.compile(rb"\n")
_LAST_WINDOW = 1 << 14
_LONGEST_BLANK = 1 << 20

BORDERS = {"blank-line": _BLANK_LINE, "line": _LINE, "json-line": _JSON_LINE, "file": None}
"""For each kind of document, what comes before a border; None if the whole file is one document."""


def read_documents(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    """Yield every document of a piece in order, or the reason why it cannot be one.

    Raises:
        UserError: the file cannot be read or has become shorter.
    """
    kind = known_format(piece.path).kind
    if kind in TABLES:
        found = read_table(piece, options)
    elif kind == CSV:
        found = _read_csv(piece, options)
    elif kind == JSON_LINES:
        found = _read_json_lines(piece, options)
    else:
        found = _read_text(piece, options)
    for item in found:
        if isinstance(item, Document):
            if "\r" in item.text:
                item = item._replace(text=item.text.replace("\r\n", "\n").replace("\r", "\n"))
            if not item.text or item.text.isspace():
                item = Reject("empty", item.offset)
        yield item


def _read_json_lines(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    for offset, chunk in _chunks(piece, "json-line", options):
        if not isinstance(chunk, bytes):
            yield chunk
            continue
        if offset == 0 and chunk.startswith(_BOM):
            offset, chunk = len(_BOM), chunk[len(_BOM) :]
        for line in chunk.split(b"\n"):
            if line and not line.isspace():
                yield _json_document(line, offset, options)
            offset += len(line) + 1


def _read_text(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    kind = options.documents
    for offset, chunk in _chunks(piece, kind, options):
        if not isinstance(chunk, bytes):
            yield chunk
            continue
        begin = len(_BOM) if offset == 0 and chunk.startswith(_BOM) else 0
        for place, raw in _spans(chunk, begin, _separator(kind, chunk)):
            if kind == "blank-line" and not raw.strip():
                continue
            if kind == "blank-line" and (leading := _LEADING_BLANK_LINES.match(raw)):
                # They belong to the border before, which may be cut after any of its blank lines.
                place, raw = place + leading.end(), raw[leading.end() :]
            try:
                yield Document(raw.decode("utf-8"), offset + place)
            except UnicodeDecodeError as error:
                yield _not_utf8(offset + place, error)


def _chunks(piece: Piece, kind: str, options: ReadOptions) -> Iterator[tuple[int, bytes | Reject | Damage]]:
    """Yield offset and bytes of parts that hold whole documents; for parts that cannot be read, the reason."""
    compression = known_format(piece.path).compression
    origin = piece.start if compression is None else 0
    end = origin
    try:
        blocks = read_blocks(piece.path, piece.start, piece.end, compression)
        for offset, chunk in cut_at_borders(blocks, kind, options.longest_raw):
            offset += origin
            if isinstance(chunk, int):
                yield offset, Reject("too_long", offset, f"more than {options.longest_raw} bytes", bytes=chunk)
            else:
                end = offset + len(chunk)
                yield offset, chunk
    except Damaged as damage:
        yield end, Damage(damage.reason, end, damage.detail)


def _separator(kind: str, chunk: bytes) -> re.Pattern[bytes] | None:
    if kind == "blank-line":
        return _BLANK_LINES if b"\r" in chunk else _BLANK_LINES_WITHOUT_RETURNS
    return _LINE if kind == "line" else None


def _spans(data: bytes, begin: int, separator: re.Pattern[bytes] | None) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of everything between separators; what follows the last one counts unless it is empty."""
    if separator is None:
        yield begin, data[begin:]
        return
    for match in separator.finditer(data, begin):
        yield begin, data[begin : match.start()]
        begin = match.end()
    if begin < len(data):
        yield begin, data[begin:]


def _json_document(raw: bytes, offset: int, options: ReadOptions) -> Document | Reject | Damage:
    strict = True
    try:
        row = orjson.loads(raw)
    except ValueError:  # stricter than other parsers: NaN, deep nesting, lone surrogates in other keys
        strict = False
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return _not_utf8(offset, error)
        except (ValueError, RecursionError) as error:
            return Reject("bad_json", offset, f"not valid JSON ({getattr(error, 'msg', error)})")
    if isinstance(row, list) and any(isinstance(item, dict) for item in row):
        detail = f"an array of {len(row)} documents in one line ({len(raw)} bytes), where each should have its own line"
        return Damage("json_array", offset, detail)
    if not isinstance(row, dict):
        return Reject("bad_json", offset, "not a JSON object")
    text = row.get(options.text_column)
    if text is None and options.text_column in row:
        return Document("", offset)
    if not isinstance(text, str):
        has = f"the line has {', '.join(map(repr, row)) or 'none'}"
        what = "is not a string" if options.text_column in row else f"is missing ({has})"
        return Reject("missing_column", offset, f"column {options.text_column!r} {what}")
    identity, source = _name(row, options.id_column), _name(row, options.source_column)
    if not strict:
        try:
            for value in (text, identity, source):
                (value or "").encode("utf-8")
        except UnicodeEncodeError:
            return Reject("bad_json", offset, "a \\u escape is half of a surrogate pair")
    return Document(text, offset, identity, source)


def _name(row: dict[str, Any], column: str | None) -> str | None:
    value = None if column is None else row.get(column)
    return None if value is None else str(value)


class _Unclosed(Exception):
    """A row does not end where it should."""


class _TooLong(Exception):
    """A line within a row is too long to be read."""

    def __init__(self, reject: Reject):
        super().__init__(reject.detail)
        self.reject = reject


class _Lines:
    """The lines of a `.csv` file for the parser, which asks for another while a quoted field is open.

    `offset` is the byte after the last line given; `row` is where the row being parsed begins. Bytes that are not UTF-8
    pass through as lone surrogates.
    """

    def __init__(self, piece: Piece, options: ReadOptions):
        self.offset = self.row = 0
        self.ended = False
        self._longest = options.longest_raw
        self._lines = self._iterate(piece, options)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.offset - self.row > self._longest:
            raise _Unclosed(f"within {self._longest} bytes (more with a higher --max_characters)")
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        if isinstance(line, Reject):
            raise _TooLong(line)
        return line

    def length(self) -> int:
        """Return the size of the whole file, as far as it can be read; this uses up the lines."""
        with suppress(Damaged):
            for _ in self._lines:
                pass
        return self.offset

    def _iterate(self, piece: Piece, options: ReadOptions) -> Iterator[str | Reject]:
        kind = "line" if _has_return_ends(piece) else "json-line"
        for offset, chunk in _chunks(piece, kind, options):
            self.offset = offset
            if isinstance(chunk, Damage):
                raise Damaged(chunk.reason, chunk.detail)
            if isinstance(chunk, Reject):
                self.offset += chunk.bytes
                yield chunk
                continue
            if offset == 0 and chunk.startswith(_BOM):
                self.offset, chunk = len(_BOM), chunk[len(_BOM) :]
            lines = chunk.splitlines(keepends=True)
            if kind == "json-line" and b"\r" in chunk:  # no line ends there
                lines = re.findall(rb"[^\n]*\n|[^\n]+", chunk)
            for line in lines:
                self.offset += len(line)
                yield line.decode("utf-8", "surrogateescape")


def _has_return_ends(piece: Piece) -> bool:
    """Whether the first line of a file ends with only `\\r`, as old programs wrote it."""
    try:
        head = next(read_blocks(piece.path, piece.start, piece.end, known_format(piece.path).compression), b"")
    except Damaged:
        return False
    match = _LINE.search(head)
    return match is not None and match[0] == b"\r" and match.end() < len(head)


def _read_csv(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    lines = _Lines(piece, options)
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    rows = csv.reader(lines, strict=True)
    header: list[str] | None = None
    number = 0  # of the row, 0 for the first after the header
    while True:
        offset = lines.row = lines.offset
        try:
            row = next(rows)
        except StopIteration:
            break
        except (csv.Error, _Unclosed) as error:
            if lines.ended or isinstance(error, _Unclosed):
                yield _unclosed_quote(offset, number, lines, "" if lines.ended else f" {error}")
                break
            yield Reject("bad_csv", offset, f"not a valid row ({error})")
            number += 1
            continue
        except _TooLong as error:
            yield error.reject
            number += 1
            continue
        except Damaged as damage:
            yield Damage(damage.reason, offset, damage.detail)
            break
        if not row:
            continue
        if header is None:
            header = row
            wanted = (options.text_column, options.id_column, options.source_column)
            check_columns(piece.path, header, options)
            columns = [row.index(column) if column in row else None for column in wanted]
        else:
            yield _csv_document(row, header, columns, offset, options.text_column)
            number += 1


def _unclosed_quote(offset: int, number: int, lines: _Lines, within: str) -> Damage:
    total = lines.length()
    detail = (
        f"the quote that opens in row {number} is not closed{within}, so the {total - offset} bytes from this row on "
        f"are lost, {share_read(offset, total)}"
    )
    return Damage("unclosed_quote", offset, detail)


def _csv_document(
    row: list[str], header: list[str], columns: list[int | None], offset: int, name: str
) -> Document | Reject:
    if len(row) != len(header):
        return Reject("bad_csv", offset, f"the row has {len(row)} fields, the header {len(header)}")
    if columns[0] is None:
        return Reject("missing_column", offset, f"column {name!r} is missing (the header has {', '.join(header)})")
    text, identity, source = (None if column is None else row[column] for column in columns)
    try:
        for field in (text, identity, source):
            (field or "").encode("utf-8")
    except UnicodeEncodeError:
        return Reject("not_utf8", offset, "a byte of the row is not UTF-8")
    return Document(text or "", offset, identity, source)


def _not_utf8(offset: int, error: UnicodeDecodeError) -> Reject:
    return Reject("not_utf8", offset + error.start, f"byte 0x{error.object[error.start]:02x} is not UTF-8")


def first_border(data: bytes, kind: str, complete: bool) -> int | None:
    """Return the offset after the first separator of documents, or None if there is none.

    Args:
        complete: whether nothing follows `data`; otherwise a `\\r` at its end may be half of a `\\r\\n`.
    """
    pattern = BORDERS[kind]
    match = pattern.search(data, 0, _usable(data, complete)) if pattern else None
    return match.end() if match else None


def last_border(data: bytes, kind: str, complete: bool) -> int | None:
    """Return the offset after the last separator of documents, or None if there is none."""
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

    For a document longer than `longest` bytes, its size is yielded instead of its bytes.

    Yields:
        The offset in the stream and the bytes of each chunk.
    """
    offset, buffer, too_long = 0, b"", None  # the last is where an overlong document begins
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
    """Return the white space at the end of `data`, in which a border may begin."""
    return data[max(len(data.rstrip(b" \t\v\f\r\n")), len(data) - _LONGEST_BLANK) :]
