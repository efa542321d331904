"""Rows of `.jsonl`, `.csv` and quoted `.tsv` files, each with its place, or where and why a part is not a row.

Rows are found in the bytes and decoded one by one, so that a bad byte spoils only one row.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from ds_roberta.files import load_json
from ds_roberta.inputs.borders import BOM, has_return_ends, read_chunks
from ds_roberta.inputs.pieces import Damage, Piece, Reject
from ds_roberta.inputs.streams import Damaged, share_read

_CSV_FIELD_LIMIT = (1 << 31) - 1
"""The highest limit that the parser takes; `csv_rows` itself checks how long a row is."""
_WITHOUT_COMMA = re.compile(r"""(['"])\s+\1""")
"""In an array of numpy, which Python would read as one text."""
_WITHOUT_QUOTES = re.compile(rb'[^"\r\n]+')


class Row(NamedTuple):
    """Values by column; where the row begins, as in `Reject`; and its first line, counted from 1 within the piece."""

    values: dict[str, Any]
    offset: int
    line: int


def json_rows(piece: Piece, longest: int) -> Iterator[Row | Reject | Damage]:
    """Yield the JSON object of each line that is not blank.

    Strings may hold lone surrogates, which JSON can write.

    Args:
        longest: a line with more bytes is rejected.

    Raises:
        UserError: the file cannot be read or has become shorter.
    """
    number = 0
    for offset, chunk in read_chunks(piece, "json-line", longest):
        if not isinstance(chunk, bytes):
            number += 1
            yield chunk
            continue
        if offset == 0 and chunk.startswith(BOM):
            offset, chunk = len(BOM), chunk[len(BOM) :]
        for line in chunk.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line and not line.isspace():
                yield _json_row(line, offset, number)
            offset += len(line) + 1


def csv_rows(
    piece: Piece, longest: int, check_header: Callable[[list[str]], None], delimiter: str = ","
) -> Iterator[Row | Reject | Damage]:
    """Yield each row after the header; quoted fields may hold delimiters and line ends.

    Bytes that are not UTF-8 are lone surrogates in the values.

    Args:
        longest: a line with more bytes is not held in memory, and its row is rejected; a quote that is open for more
            bytes of other lines counts as damage.
        check_header: called with the names of the columns; may raise.

    Raises:
        UserError: the file cannot be read or has become shorter.
    """
    lines = _Lines(piece, longest, delimiter)
    rows = csv_reader(lines, delimiter)
    header: list[str] | None = None
    is_first = True
    while True:
        offset = lines.begin_row()
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except (csv.Error, _Unclosed) as error:
            if lines.ended or isinstance(error, _Unclosed):
                yield _unclosed_quote(offset, lines, "" if lines.ended else f" {error}")
                break
            yield Reject("bad_csv", offset, f"not a valid row ({error})")
            is_first = False
            continue
        except Damaged as damage:
            yield Damage(damage.reason, offset, damage.detail)
            break
        if lines.are_shortened:
            yield Reject("too_long", offset, f"more than {longest} bytes", bytes=lines.offset - offset)
            is_first = False
            continue
        if not row:
            continue
        if header is None:
            header = row
            check_header(header)
            continue
        if len(row) != len(header):
            yield Reject("bad_csv", offset, other_width(len(row), len(header), is_first))
        else:
            yield Row(dict(zip(header, row, strict=True)), offset, line)
        is_first = False


def csv_reader(lines: Iterable[str], delimiter: str) -> Any:
    """A parser of quoted cells of any length."""
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def other_width(fields: int, names: int, is_first: bool) -> str:
    """What is wrong with a row that has not as many fields as the header has names."""
    cause = "; the first may be R's row names, which write.table(..., row.names = FALSE) leaves out"
    count = "1 field" if fields == 1 else f"{fields} fields"
    return f"the row has {count}, the header {names}{cause if is_first and fields == names + 1 else ''}"


def not_utf8(offset: int, error: UnicodeDecodeError) -> Reject:
    """The rejection of what begins at `offset` for the byte that is not UTF-8."""
    byte = error.object[error.start]
    return Reject("not_utf8", offset, f"byte {offset + error.start} (0x{byte:02x}) is not UTF-8")


def parse_json(raw: bytes) -> Any:
    """The value that JSON text holds. NaN is accepted, and strings may have lone surrogates.

    Raises:
        UnicodeDecodeError, ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        value = orjson.loads(raw)
    except ValueError:  # stricter than other parsers
        return load_json(raw.decode("utf-8"))
    return load_json(raw.decode("utf-8")) if _may_be_rounded(value) else value


def parse_cell(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that text in a `.csv` is, as JSON or Python writes it; None if it is neither."""
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if found is None and not _WITHOUT_COMMA.search(text):
        with suppress(ValueError, SyntaxError, RecursionError):
            found = ast.literal_eval(text.strip())
    return found if isinstance(found, list | dict) else None


def _may_be_rounded(value: Any) -> bool:
    """Whether a number may be an integer of more than 64 bits, of which orjson keeps the first digits only."""
    left = [value]
    while left:
        value = left.pop()
        if type(value) is float:
            if abs(value) >= 1 << 63:
                return True
        elif type(value) is dict:
            left += value.values()
        elif type(value) is list:
            left += value
    return False


def _json_row(raw: bytes, offset: int, line: int) -> Row | Reject | Damage:
    try:
        values = parse_json(raw)
    except UnicodeDecodeError as error:
        return not_utf8(offset, error)
    except ValueError as error:
        return Reject("bad_json", offset, f"not valid JSON ({getattr(error, 'msg', error)})")
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        detail = (
            f"an array of {len(values)} documents in one line ({len(raw)} bytes), where each should have its own line"
        )
        return Damage("json_array", offset, detail)
    if not isinstance(values, dict):
        return Reject("bad_json", offset, "not a JSON object")
    return Row(values, offset, line)


class _Unclosed(Exception):
    """A row does not end where it should."""


class _Lines:
    """The lines of a `.csv` file for the parser, which asks for another while a quoted field is open.

    Bytes that are not UTF-8 pass through as lone surrogates. Of a line that is too long, the parser gets what it needs
    to find the row's end: its quotes, and a byte on either side of them.

    Attributes:
        offset: the byte after the last line given.
        are_shortened: whether a line of the row being parsed was too long.
        ended: whether the file has.
    """

    def __init__(self, piece: Piece, longest: int, delimiter: str):
        self.offset = self._held = 0
        self.are_shortened = self.ended = False
        self._longest = longest
        self._escaped_quotes = re.compile(rb'(?<=[^"\r\n%b])(?:"")+(?!")' % re.escape(delimiter).encode())
        self._outline = bytearray()
        self._lines = self._iterate(piece)

    def begin_row(self) -> int:
        """Say that the next line is a row's first, and return where it begins."""
        self._held, self.are_shortened = 0, False
        return self.offset

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._held > self._longest:
            raise _Unclosed(f"within {self._longest} bytes")
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self._held += len(line)
        return line.decode("utf-8", "surrogateescape")

    def length(self) -> int:
        """Return the size of the whole file, as far as it can be read; this uses up the lines."""
        with suppress(Damaged):
            for _ in self._lines:
                pass
        return self.offset

    def _pass_over(self, part: bytes) -> None:
        """Outline a part of a line that is too long; an even number of quotes within a field opens and closes none."""
        if len(self._outline) <= self._longest:
            part = self._escaped_quotes.sub(b"", part)
            self._outline += _WITHOUT_QUOTES.sub(lambda match: match[0][:1] + match[0][-1:], part)

    def _iterate(self, piece: Piece) -> Iterator[bytes]:
        kind = "line" if has_return_ends(piece) else "json-line"
        for offset, chunk in read_chunks(piece, kind, self._longest, self._pass_over):
            self.offset = offset
            if isinstance(chunk, Damage):
                raise Damaged(chunk.reason, chunk.detail)
            if isinstance(chunk, Reject):
                self.offset += chunk.bytes
                self.are_shortened = True
                # More quotes than can be held: as if none were open at its end.
                yield bytes(self._outline) if len(self._outline) <= self._longest else b"\n"
                self._outline.clear()
                continue
            if offset == 0 and chunk.startswith(BOM):
                self.offset, chunk = len(BOM), chunk[len(BOM) :]
            lines = chunk.splitlines(keepends=True)
            if kind == "json-line" and b"\r" in chunk:  # no line ends there
                lines = re.findall(rb"[^\n]*\n|[^\n]+", chunk)
            for line in lines:
                self.offset += len(line)
                yield line


def _unclosed_quote(offset: int, lines: _Lines, within: str) -> Damage:
    total = lines.length()
    detail = (
        f"the quote that opens here is not closed{within}, so the {total - offset} bytes from this row on "
        f"are lost, {share_read(offset, total)}"
    )
    return Damage("unclosed_quote", offset, detail)
