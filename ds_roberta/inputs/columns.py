"""Rows of `.parquet` and `.arrow` files as record batches, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ds_roberta.inputs.pieces import Damage, Piece, Reject
from ds_roberta.inputs.streams import PARQUET, Damaged, is_url, known_format, open_binary, readable, share_read

_ROWS = 128
"""Number of rows read at a time: a megabyte or two of web pages."""
_READ_BYTES = 1 << 20
_ARROW_FILE_MAGIC = b"ARROW1"


def measure_table(path: str, column: str, check_header: Callable[[list[str]], None]) -> tuple[list[int], bool]:
    """Return the size of every row group or record batch, between which a file may be cut, and whether the file is
    damaged after them.

    An Arrow stream at a URL is one part: it can only be read from the start.

    Args:
        column: the one whose size counts where the file knows it.
        check_header: called with the names of the columns; may raise.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        if known_format(path).kind == PARQUET:
            with _parquet(path) as file:
                check_header(file.schema_arrow.names)
                groups = map(file.metadata.row_group, range(file.num_row_groups))
                return [_group_bytes(group, column) for group in groups], False
        with _arrow_source(path) as (source, is_file):
            opened, names = _opened(source, is_file)
            check_header(names)
            if is_file:
                batches = opened.num_record_batches
                return [source.size() // batches] * batches if batches else [], False
            return ([source.size()], False) if is_url(path) else _stream_batches(source)
    except Damaged:
        return [], True


def read_batches(
    piece: Piece, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.RecordBatch | Reject | Damage]]:
    """Yield the rows of a piece in record batches, each with the number of its first row, counted from 0 in the file.

    What cannot be read is damage, with the number of rows known to be lost.

    Args:
        columns: those that a `.parquet` file is read for, as far as it has them; without the first, its rows are
            rejected. None: all.

    Raises:
        UserError: the file cannot be opened.
    """
    if known_format(piece.path).kind == PARQUET:
        return _parquet_batches(piece, columns)
    return _arrow_batches(piece)


class _Source:
    """An open file that raises `UserError` where the disk or the network fails: pyarrow's errors about the content have
    the same types."""

    def __init__(self, path: str, file: BinaryIO):
        self._path, self._file = path, file

    def read(self, size: int = -1) -> bytes:
        with readable(self._path):
            return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _errors_of_the_content() -> Iterator[None]:
    """Turn pyarrow's errors about bytes into `Damaged`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of columns' names
        raise Damaged("corrupt", " ".join(str(error).split())[:200]) from error


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    with readable(path), open_binary(path) as file:
        with _errors_of_the_content():
            # Without these pyarrow would fetch a whole row group at once.
            opened = pq.ParquetFile(
                _Source(path, file), pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
            )
        yield opened


def _group_bytes(group: Any, column: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema == column]
    return sizes[0] if sizes else group.total_byte_size


def _parquet_batches(
    piece: Piece, columns: Sequence[str] | None
) -> Iterator[tuple[int, pa.RecordBatch | Reject | Damage]]:
    try:
        with _parquet(piece.path) as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [column for column in columns if column in names]
            rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            for group in range(piece.start, min(piece.end, len(rows))):
                first, done = sum(rows[:group]), 0
                if columns and columns[0] not in names:
                    detail = f"column {columns[0]!r} is missing (the file has {', '.join(names)})"
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
                    if done < rows[group]:
                        raise Damaged("corrupt", "fewer rows than its index says")
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
            source = pa.PythonFile(_Source(path, stack.enter_context(open_binary(path))), "r")
        else:
            with open_binary(path) as file:
                if not file.read(1):  # an empty file cannot be mapped
                    raise Damaged("truncated", "the file is empty")
            source = stack.enter_context(pa.memory_map(path))
        magic = source.read(len(_ARROW_FILE_MAGIC))
        source.seek(0)
        with _errors_of_the_content():
            yield source, magic == _ARROW_FILE_MAGIC


def _opened(source: Any, is_file: bool) -> tuple[Any, list[str]]:
    """The batches of an Arrow file or stream, and the names of its columns, which may be damaged where it opens."""
    opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    return opened, opened.schema.names


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


def _arrow_batches(piece: Piece) -> Iterator[tuple[int, pa.RecordBatch | Damage]]:
    row, read, size = 0, 0, 1
    try:
        with _arrow_source(piece.path) as (source, is_file):
            size = source.size()
            if is_file:
                file, _ = _opened(source, is_file)
                for index in range(min(piece.end, file.num_record_batches)):
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
            opened, _ = _opened(source, is_file)
            stream = islice(opened, None if is_url(piece.path) else piece.end)
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


def string_bytes(column: pa.Array) -> list[bytes | None] | None:
    """The strings of a column as bytes, which may not be UTF-8; None for a column of another type.

    Raises:
        pyarrow.ArrowException: the column is damaged.
    """
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
