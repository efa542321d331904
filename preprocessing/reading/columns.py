"""Documents from Parquet row groups and Arrow record batches, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ds_roberta.errors import UserError
from preprocessing.reading.documents import Damage, Document, Piece, ReadOptions, Reject
from preprocessing.reading.streams import PARQUET, Damaged, is_url, known_format, open_binary, readable, share_read

_ROWS = 128
"""Number of rows read at a time: a megabyte or two of web pages."""
_READ_BYTES = 1 << 20
_ARROW_FILE_MAGIC = b"ARROW1"


def measure_table(path: str, options: ReadOptions) -> tuple[list[int], bool]:
    """Return the size of every row group or record batch, between which the plan may cut, and whether the file is
    damaged after them.

    An Arrow stream at a URL is one part: it can only be read from the start.

    Raises:
        UserError: the file cannot be opened, or a column that an option names occurs twice.
    """
    try:
        if known_format(path).kind == PARQUET:
            with _parquet(path) as file:
                check_columns(path, file.schema_arrow.names, options)
                groups = map(file.metadata.row_group, range(file.num_row_groups))
                return [_group_bytes(group, options.text_column) for group in groups], False
        with _arrow_source(path) as (source, is_file):
            opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            check_columns(path, opened.schema.names, options)
            if is_file:
                batches = opened.num_record_batches
                return [source.size() // batches] * batches if batches else [], False
            return ([source.size()], False) if is_url(path) else _stream_batches(source)
    except Damaged:
        return [], True


def check_columns(path: str, names: list[str], options: ReadOptions) -> None:
    """Raise `UserError` if a column that an option names occurs twice."""
    for column in (options.text_column, options.id_column, options.source_column):
        if column is not None and names.count(column) > 1:
            raise UserError(
                f"{path!r} has {names.count(column)} columns named {column!r}: rename all but one, "
                "or leave the file out"
            )


def read_table(piece: Piece, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    """Yield the rows of a piece; what cannot be read is damage, with the number of documents known to be lost."""
    batches = _parquet_batches if known_format(piece.path).kind == PARQUET else _arrow_batches
    for row, batch in batches(piece, options):
        if isinstance(batch, pa.RecordBatch):
            yield from _rows(batch, row, options)
        else:
            yield batch


@contextmanager
def _errors_of_the_content() -> Iterator[None]:
    """Turn pyarrow's errors about bytes into `Damaged`; those of the disk, which have a number, pass through."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Damaged("corrupt", " ".join(str(error).split())[:200]) from error


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    with readable(path), open_binary(path) as file:
        with _errors_of_the_content():
            # Without these pyarrow would fetch a whole row group at once.
            opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)
        yield opened


def _group_bytes(group: Any, column: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema == column]
    return sizes[0] if sizes else group.total_byte_size


def _parquet_batches(piece: Piece, options: ReadOptions) -> Iterator[tuple[int, pa.RecordBatch | Reject | Damage]]:
    try:
        with _parquet(piece.path) as file:
            names = file.schema_arrow.names
            wanted = [c for c in (options.text_column, options.id_column, options.source_column) if c in names]
            rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            for group in range(piece.start, piece.end):
                first, done = sum(rows[:group]), 0
                if options.text_column not in wanted:
                    detail = f"column {options.text_column!r} is missing (the file has {', '.join(names)})"
                    yield first, Reject("missing_column", first, detail, rows[group])
                    continue
                try:
                    batches = file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False)
                    while True:
                        with _errors_of_the_content():
                            batch = next(batches, None)
                        if batch is None:
                            break
                        yield first + done, batch
                        done += batch.num_rows
                except Damaged as damage:
                    place, lost = first + done, rows[group] - done
                    detail = f"row group {group} of {len(rows)} ({damage.detail}), {lost} of {sum(rows)} rows are lost"
                    yield place, Damage(damage.reason, place, detail, lost)
    except Damaged as damage:
        yield 0, Damage(damage.reason, 0, f"{damage.detail}, {share_read(0, 1)}")


@contextmanager
def _arrow_source(path: str) -> Iterator[tuple[Any, bool]]:
    """An Arrow file opened for reading, without a copy if it is local, and whether it has the file format."""
    with readable(path), ExitStack() as stack:
        if is_url(path):
            source = pa.PythonFile(stack.enter_context(open_binary(path)), "r")
        else:
            with open_binary(path) as file:
                if not file.read(1):  # an empty file cannot be mapped
                    raise Damaged("truncated", "the file is empty")
            source = stack.enter_context(pa.memory_map(path))
        magic = source.read(len(_ARROW_FILE_MAGIC))
        source.seek(0)
        with _errors_of_the_content():
            yield source, magic == _ARROW_FILE_MAGIC


def _stream_batches(source: Any) -> tuple[list[int], bool]:
    sizes: list[int] = []
    source.seek(0)
    try:
        with _errors_of_the_content():
            for message in pa.ipc.MessageReader.open_stream(source):
                if message.type == "record batch":
                    sizes.append(message.body.size if message.body is not None else 0)
    except (Damaged, EOFError):
        return [*sizes, 0], True  # the rest is read as a damaged batch
    return sizes, False


def _arrow_batches(piece: Piece, options: ReadOptions) -> Iterator[tuple[int, pa.RecordBatch | Damage]]:
    row, read, size = 0, 0, 1
    try:
        with _arrow_source(piece.path) as (source, is_file):
            size = source.size()
            if is_file:
                file = pa.ipc.open_file(source)
                for index in range(piece.end):
                    try:
                        with _errors_of_the_content():
                            batch = file.get_batch(index)
                    except Damaged as damage:
                        if index >= piece.start:
                            detail = f"record batch {index} of {file.num_record_batches} is lost ({damage.detail})"
                            yield row, Damage(damage.reason, row, detail)
                        continue
                    if index >= piece.start:
                        yield from _slices(batch, row)
                    row += batch.num_rows
                return
            # The batch after the piece may be damaged and is not read.
            stream = islice(pa.ipc.open_stream(source), None if is_url(piece.path) else piece.end)
            for index, batch in enumerate(stream):
                read = source.tell()
                if index >= piece.start:
                    yield from _slices(batch, row)
                row += batch.num_rows
    except Damaged as damage:
        yield row, Damage(damage.reason, row, f"{damage.detail}, {share_read(read, size)}")


def _slices(batch: pa.RecordBatch, row: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    for begin in range(0, batch.num_rows, _ROWS):
        yield row + begin, batch.slice(begin, _ROWS)


def _rows(batch: pa.RecordBatch, row: int, options: ReadOptions) -> Iterator[Document | Reject | Damage]:
    name = options.text_column
    if name not in batch.schema.names:
        detail = f"column {name!r} is missing (the file has {', '.join(batch.schema.names)})"
        yield Reject("missing_column", row, detail, batch.num_rows)
        return
    try:
        texts = _bytes_of(batch.column(name))
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


def _bytes_of(column: pa.Array) -> list[bytes | None] | None:
    """Return a column of strings as bytes, to be checked one by one; None for a column of another type."""
    if pa.types.is_null(column.type):
        return [None] * len(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type)
    ):
        return None
    values = column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    values.validate(full=True)  # offsets outside the values would be read as memory
    return values.to_pylist()


def _names(batch: pa.RecordBatch, column: str | None) -> list[bytes | None]:
    """Return a column other than the text column as UTF-8; values that are not text, as Python prints them."""
    if column is None or column not in batch.schema.names:
        return [None] * batch.num_rows
    values = batch.column(column)
    names = _bytes_of(values)
    if names is not None:
        return names
    try:
        return [None if value is None else str(value).encode("utf-8") for value in values.to_pylist()]
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"column {column!r} cannot be read as names ({values.type}: {error}): choose another column"
        ) from error
