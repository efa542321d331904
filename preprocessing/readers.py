"""From the bytes of a file to documents: text, or a located reason why a piece of the file is not one.

A `.txt` file is cut into documents by blank lines, by every line, or not at all; a `.jsonl` file holds one a line, its
text in a column. Line ends are normalised to `\\n`, a byte-order mark at a file's start is dropped; nothing else of
the text changes. Documents are found in the bytes and decoded one by one, so that a bad byte spoils only its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ds_roberta.errors import UserError

SUFFIXES = (".txt", ".jsonl")
DOCUMENT_KINDS = ("blank-line", "file", "line")
KEPT = "kept"

_BOM = b"\xef\xbb\xbf"
_NEWLINE = rb"(?:\r\n|\r(?!\n)|\n)"
_LINE = re.compile(_NEWLINE)
_BLANK_LINES = re.compile(_NEWLINE + rb"(?:[ \t\v\f]*" + _NEWLINE + rb")+")
_BLANK_LINES_OF_LF = re.compile(rb"\n(?:[ \t\v\f]*\n)+")
"""The same where no `\\r` is: it opens with a fixed byte, so that the search skips to it (10 times faster)."""
_JSON_LINE = re.compile(rb"\n")

_REMEDIES = {
    "not_utf8": "convert the file, for example with iconv -t UTF-8",
    "bad_json": "mend or remove the line",
    "missing_column": "name the column that holds the text with --text_column",
}
"""What a user can do about each reject that ends the job. Empty documents are counted and passed over."""


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents; the output's bytes depend on these."""

    documents: str = "blank-line"
    text_column: str = "text"


@dataclass(frozen=True)
class Piece:
    """The bytes `start … end` of a file; both are borders of documents."""

    path: str
    start: int
    end: int


class Reject(NamedTuple):
    """A piece of a file that is not a document: why, and at which byte of the file."""

    reason: str
    offset: int
    detail: str = ""


def cut_pattern(path: str, options: ReadOptions) -> re.Pattern[bytes] | None:
    """What stands before a place where the file may be cut without cutting a document; None where it may not be."""
    if _is_jsonl(path) or options.documents == "line":
        return re.compile(rb"\n")
    if options.documents == "blank-line":
        return re.compile(rb"\n[ \t\v\f\r]*\n")
    return None


def read_documents(piece: Piece, options: ReadOptions) -> Iterator[str | Reject]:
    """Every document of a piece, in order: its text, or why it has none.

    Raises:
        UserError: the file cannot be read or has become shorter.
    """
    data = _read_bytes(piece)
    begin = len(_BOM) if piece.start == 0 and data.startswith(_BOM) else 0
    jsonl = _is_jsonl(piece.path)
    blank_is_border = jsonl or options.documents == "blank-line"
    for offset, raw in _spans(data, begin, _separator(jsonl, options)):
        if blank_is_border and not raw.strip():
            continue
        offset += piece.start
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Reject("not_utf8", offset + error.start, f"byte 0x{raw[error.start]:02x} is not UTF-8")
            continue
        document = _json_text(text, offset, options.text_column) if jsonl else text
        if isinstance(document, str):
            document = document.replace("\r\n", "\n").replace("\r", "\n")
            if not document or document.isspace():
                document = Reject("empty", offset)
        yield document


def accepted_documents(piece: Piece, options: ReadOptions, counts: Counter[str]) -> Iterator[str]:
    """The texts of a piece, counting in `counts` what was kept and, by reason, what was rejected.

    Raises:
        UserError: at the first document that is broken rather than empty, naming its place and the remedy.
    """
    for document in read_documents(piece, options):
        if isinstance(document, Reject):
            counts[document.reason] += 1
            if document.reason in _REMEDIES:
                raise UserError(
                    f"{piece.path!r}, line {_line_number(piece.path, document.offset)} (byte {document.offset}): "
                    f"{document.detail}; {_REMEDIES[document.reason]}"
                )
        else:
            counts[KEPT] += 1
            yield document


def sentences(text: str) -> list[str]:
    """The non-empty lines of a document without trailing white space: the units that packing keeps whole."""
    return [line for line in map(str.rstrip, text.split("\n")) if line]


def tokenizer_lines(document: list[str]) -> list[str]:
    """A document's sentences as the tokenizer sees them: all but the first open with a space.

    Byte-level BPE marks a word's start by the space before it. With it the first word of a line has the form that it
    has anywhere else, and the ids of the whole document decode to readable text.
    """
    return document[:1] + [f" {sentence}" for sentence in document[1:]]


def _is_jsonl(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def _separator(jsonl: bool, options: ReadOptions) -> re.Pattern[bytes] | None:
    if jsonl:
        return _JSON_LINE
    return {"blank-line": _BLANK_LINES, "line": _LINE, "file": None}[options.documents]


def _read_bytes(piece: Piece) -> bytes:
    try:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            data = file.read(piece.end - piece.start)
    except OSError as error:
        raise UserError(f"cannot read {piece.path!r}: {error.strerror}; make it readable or leave it out") from error
    if len(data) != piece.end - piece.start:
        raise UserError(f"{piece.path!r} became shorter while it was read: run the command again once it is complete")
    return data


def _spans(data: bytes, begin: int, separator: re.Pattern[bytes] | None) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of everything between separators; what follows a last separator counts if it is not nothing."""
    if separator is None:
        yield begin, data[begin:]
        return
    if separator is _BLANK_LINES and b"\r" not in data:
        separator = _BLANK_LINES_OF_LF
    for match in separator.finditer(data, begin):
        yield begin, data[begin : match.start()]
        begin = match.end()
    if begin < len(data):
        yield begin, data[begin:]


def _json_text(line: str, offset: int, column: str) -> str | Reject:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Reject("bad_json", offset, f"not valid JSON ({getattr(error, 'msg', error)})")
    if not isinstance(row, dict):
        return Reject("bad_json", offset, "not a JSON object")
    text = row.get(column)
    if not isinstance(text, str):
        has = "is not a string" if column in row else f"is missing (the line has {', '.join(map(repr, row)) or 'none'})"
        return Reject("missing_column", offset, f"column {column!r} {has}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Reject("bad_json", offset, "half of a surrogate pair stands alone in a \\u escape")
    return text


def _line_number(path: str, offset: int) -> int:
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines
