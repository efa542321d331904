"""Turn the bytes of a file into documents, or say where and why a piece of the file is not one.

A `.txt` file is cut into documents by blank lines, by every line, or not at all; a `.jsonl` file holds one per line,
and a table one per row, the text in a column. Line ends are normalised to `\\n`, and a byte-order mark at a file's
start is dropped; nothing else in the text changes here. Documents are decoded one by one, so that a bad byte spoils
only one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from ds_roberta.errors import UserError
from ds_roberta.inputs.borders import BOM, LINE_END, NEWLINE, read_chunks
from ds_roberta.inputs.columns import read_batches, string_bytes
from ds_roberta.inputs.pieces import Damage, Piece, Reject
from ds_roberta.inputs.rows import Row, csv_rows, json_rows, not_utf8
from ds_roberta.inputs.streams import CSV, JSON_LINES, TABLES, known_format
from preprocessing.reading.documents import Document, ReadOptions

_BLANK_LINES = re.compile(NEWLINE + rb"(?:[ \t\v\f]*" + NEWLINE + rb")+")
_BLANK_LINES_WITHOUT_RETURNS = re.compile(rb"\n[ \t\v\f]*\n(?:[ \t\v\f]*\n)*")
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\v\f]*" + NEWLINE + rb")+")


def read_documents(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    """Yield every document of a piece in order, or the reason why it cannot be one.

    Raises:
        UserError: the file cannot be read or has become shorter.
    """
    kind = known_format(piece.path).kind
    if kind in TABLES:
        found = _read_table(piece, options)
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


def check_columns(path: str, options: ReadOptions, names: Sequence[str]) -> None:
    """Raise `UserError` if a column that an option names occurs twice."""
    for column in named_columns(options):
        if names.count(column) > 1:
            raise UserError(
                f"{path!r} has {names.count(column)} columns named {column!r}: rename all but one, "
                "or leave the file out"
            )


def named_columns(options: ReadOptions) -> list[str]:
    """The columns that options name, that of the text first."""
    columns = (options.text_column, options.id_column, options.source_column)
    return [column for column in columns if column is not None]


def _read_json_lines(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    for row in json_rows(piece, options.longest_raw):
        yield _json_document(row, options) if isinstance(row, Row) else row


def _read_csv(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    for row in csv_rows(piece, options.longest_raw, partial(check_columns, piece.path, options)):
        yield _csv_document(row, options) if isinstance(row, Row) else row


def _read_table(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    for row, batch in read_batches(piece, named_columns(options)):
        if isinstance(batch, pa.RecordBatch):
            yield from _batch_documents(batch, row, options)
        else:
            yield batch


def _read_text(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    kind = options.documents
    for offset, chunk in read_chunks(piece, kind, options.longest_raw):
        if not isinstance(chunk, bytes):
            yield chunk
            continue
        begin = len(BOM) if offset == 0 and chunk.startswith(BOM) else 0
        for place, raw in _spans(chunk, begin, _separator(kind, chunk)):
            if kind == "blank-line" and not raw.strip():
                continue
            if kind == "blank-line" and (leading := _LEADING_BLANK_LINES.match(raw)):
                # They belong to the border before, which may be cut after any of its blank lines.
                place, raw = place + leading.end(), raw[leading.end() :]
            try:
                yield Document(raw.decode("utf-8"), offset + place)
            except UnicodeDecodeError as error:
                yield not_utf8(offset + place, error)


def _separator(kind: str, chunk: bytes) -> re.Pattern[bytes] | None:
    if kind == "blank-line":
        return _BLANK_LINES if b"\r" in chunk else _BLANK_LINES_WITHOUT_RETURNS
    return LINE_END if kind == "line" else None


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


def _json_document(row: Row, options: ReadOptions) -> Document | Reject:
    values, offset = row.values, row.offset
    text = values.get(options.text_column)
    if text is None and options.text_column in values:
        return Document("", offset)
    if not isinstance(text, str):
        has = f"the line has {', '.join(map(repr, values)) or 'none'}"
        what = "is not a string" if options.text_column in values else f"is missing ({has})"
        return Reject("missing_column", offset, f"column {options.text_column!r} {what}")
    document = Document(text, offset, _name(values, options.id_column), _name(values, options.source_column))
    if not _is_unicode(document):
        return Reject("bad_json", offset, "a \\u escape is half of a surrogate pair")
    return document


def _csv_document(row: Row, options: ReadOptions) -> Document | Reject:
    values, offset = row.values, row.offset
    if options.text_column not in values:
        detail = f"column {options.text_column!r} is missing (the header has {', '.join(map(repr, values))})"
        return Reject("missing_column", offset, detail)
    document = Document(
        values[options.text_column], offset, _name(values, options.id_column), _name(values, options.source_column)
    )
    return document if _is_unicode(document) else Reject("not_utf8", offset, "a byte of the row is not UTF-8")


def _is_unicode(document: Document) -> bool:
    """Whether no part of a document has a lone surrogate."""
    try:
        for value in (document.text, document.id, document.source):
            (value or "").encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _name(row: dict[str, Any], column: str | None) -> str | None:
    value = None if column is None else row.get(column)
    return None if value is None else str(value)


def _batch_documents(batch: pa.RecordBatch, row: int, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    name = options.text_column
    if name not in batch.schema.names:
        detail = f"column {name!r} is missing (the file has {', '.join(batch.schema.names)})"
        yield Reject("missing_column", row, detail, batch.num_rows)
        return
    try:
        texts = string_bytes(batch.column(name))
        ids, sources = (_names(batch, column) for column in (options.id_column, options.source_column))
    except pa.ArrowException as error:
        detail = f"{' '.join(str(error).split())[:200]}, {batch.num_rows} rows are lost"
        yield Damage("corrupt", row, detail, batch.num_rows)
        return
    if texts is None:
        detail = f"column {name!r} holds {batch.column(name).type}, not strings"
        yield Reject("missing_column", row, detail, batch.num_rows)
        return
    for number, row_bytes in enumerate(zip(texts, ids, sources, strict=True), row):
        try:
            text, identity, source = (None if value is None else value.decode("utf-8") for value in row_bytes)
            yield Document(text or "", number, identity, source)
        except UnicodeDecodeError as error:
            yield Reject("not_utf8", number, f"byte 0x{error.object[error.start]:02x} is not UTF-8")


def _names(batch: pa.RecordBatch, column: str | None) -> list[bytes | None]:
    """Return a column other than the text column as UTF-8; values that are not text, as Python prints them.

    Raises:
        pyarrow.ArrowException: the column is damaged.
        UserError: Python has no such values.
    """
    if column is None or column not in batch.schema.names:
        return [None] * batch.num_rows
    values = batch.column(column)
    names = string_bytes(values)
    if names is not None:
        return names
    values.validate(full=True)  # as in `string_bytes`
    try:
        return [None if value is None else str(value).encode("utf-8") for value in values.to_pylist()]
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"column {column!r} cannot be read as names ({values.type}: {error}): choose another column"
        ) from error
