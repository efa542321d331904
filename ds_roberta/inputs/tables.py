"""Whole tables, such as labelled texts: every format that people bring, as rows by column name."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ds_roberta.errors import UserError
from ds_roberta.inputs.borders import BOM
from ds_roberta.inputs.columns import measure_table, read_batches
from ds_roberta.inputs.paths import HUB_DATASET, SAVED_SPLITS, asked_of_hub, is_saved, load_saved
from ds_roberta.inputs.pieces import ALL_PARTS, Damage, Piece, Reject
from ds_roberta.inputs.places import DAMAGE_REMEDIES, REMEDIES, line_number
from ds_roberta.inputs.rows import Row, csv_reader, csv_rows, json_rows, other_width, parse_json
from ds_roberta.inputs.streams import (
    COMPRESSIONS,
    CSV,
    JSON,
    JSON_LINES,
    TABLES,
    TSV,
    Damaged,
    file_size,
    format_of,
    known_format,
    open_binary,
    read_blocks,
    readable,
)
from ds_roberta.process import logger

TABULAR = (JSON_LINES, JSON, CSV, TSV, *TABLES)
TABULAR_NAMES = ".jsonl, .json, .csv or .tsv (plain or ." + ", .".join(COMPRESSIONS) + "), .parquet or .arrow"
COLA_COLUMNS = ("source", "label", "mark", "sentence")  # CoLA's files have no header
LONGEST_ROW = 1 << 28
"""In bytes. A longer one is most likely not a row."""
QUOTED_BY = ('\t"\r\n', '\t"\r\n,')
"""What makes a writer of `.tsv` quote a cell: pandas, spreadsheets."""
_FEATURES = b"huggingface"
"""The key under which `datasets` keeps a table's features in Arrow's and Parquet's metadata."""


@dataclass(frozen=True)
class Table:
    """Rows by column name.

    Attributes:
        name: the file, for messages.
        columns: the names of the columns.
        rows: each row's values; a row of JSON may lack some.
        numbers: each row's number for messages: in text files its line, else the row, counted from 1; with the name of
            its file where there are several.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    numbers: Sequence[int | str]

    def place(self, index: int) -> str:
        return f"{self.name}, row {self.numbers[index]}"

    def select(self, indices: Sequence[int]) -> Table:
        """The table with only these rows."""
        rows, numbers = [self.rows[index] for index in indices], [self.numbers[index] for index in indices]
        return Table(self.name, self.columns, rows, numbers)


def read_table(source: str | Path | Table) -> Table:
    """Read one file by its ending, or what `datasets` saved or has on its hub as one split; a table stays as it is.

    Raises:
        UserError: it is missing, empty, damaged, or of another format, or a row is broken or a column given twice.
    """
    if isinstance(source, Table):
        return source
    path = str(source)
    if is_saved_splits(path):
        splits = read_saved_splits(path)
        if len(splits) > 1:
            one = f", such as {path.partition('?')[0]}?split={min(splits)}" if HUB_DATASET.fullmatch(path) else ""
            raise UserError(f"{path!r} has the splits {', '.join(splits)}: choose one of them{one}")
        return next(iter(splits.values()))
    if is_saved(path):
        return _from_datasets(path, load_saved(path))
    found = format_of(path, TABULAR)
    if found is None:
        raise UserError(f"cannot read {path!r} as a table: choose a file that ends in {TABULAR_NAMES}")
    if found.kind in TABLES:
        return _read_columns(path)
    if found.kind == JSON:
        return _read_json(path)
    if found.kind == TSV and not _is_quoted(path, text := read_text(path)):
        return _parse_tsv(path, text)
    if found.kind == JSON_LINES:
        return _table(path, json_rows(_whole(path), LONGEST_ROW))
    header: list[str] = []
    delimiter = "\t" if found.kind == TSV else ","
    rows = csv_rows(_whole(path), LONGEST_ROW, partial(_check_header, path, header), delimiter)
    return _table(path, rows, header)


def is_saved_splits(path: str | Path) -> bool:
    """Whether `datasets` saved a folder, or has a data set of its hub, with splits: see `read_saved_splits`."""
    return bool(HUB_DATASET.fullmatch(str(path))) or os.path.isfile(os.path.join(path, SAVED_SPLITS))


def read_saved_splits(path: str | Path) -> dict[str, Table]:
    """The splits of a folder that `datasets` saved, or of `hf://datasets/OWNER/NAME` (`@REVISION`, `?config=CONFIG`).

    Labels that are stored as numbers with names become the names.

    Raises:
        UserError: the library cannot read it, or a split is empty.
    """
    path = str(path)
    hub = HUB_DATASET.fullmatch(path)
    splits = load_from_hub(hub[1], hub[2], hub[3] or "") if hub else load_saved(path)
    return {str(split): _from_datasets(f"{path}/{split}", dataset) for split, dataset in splits.items()}


def load_from_hub(name: str, revision: str | None, query: str) -> dict[str, Any]:
    """The splits of a data set as the `datasets` library loads them; it keeps a copy in its cache.

    Args:
        query: `config=CONFIG&split=SPLIT`, either or both; without a split, all of them.

    Raises:
        UserError: the library does not find the data set, its config or the split, or reading it requires running code.
    """
    import datasets

    asked = asked_of_hub(name, query)
    split = asked.get("split")
    try:
        found = datasets.load_dataset(name, asked.get("config"), revision=revision, split=split)
    except Exception as error:  # the library and the network have many
        raise UserError(
            f"cannot load the data set {name!r} ({' '.join(str(error).split())[:300]}): check its name and the network"
        ) from error
    return dict(found) if split is None else {split: found}


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, compressed or not, without a byte-order mark.

    Raises:
        UserError: the file cannot be read, is damaged or is not UTF-8.
    """
    path = str(path)
    piece = _whole(path)
    try:
        content = b"".join(read_blocks(path, 0, piece.end, known_format(path).compression))
    except Damaged as damage:
        raise UserError(f"{path!r} is damaged: {damage.detail}; {DAMAGE_REMEDIES[damage.reason]}") from damage
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path!r} is not UTF-8 at byte {error.start}: {REMEDIES['not_utf8']}") from error


def _whole(path: str) -> Piece:
    with readable(path), open_binary(path) as file:
        return Piece(path, 0, file_size(file))


def _table(path: str, rows: Any, header: Sequence[str] = ()) -> Table:
    """
    Args:
        header: the columns in order, if the rows do not bring them.

    Raises:
        UserError: there is no row, or one is broken.
    """
    values, numbers, columns = [], [], dict.fromkeys(header)
    for row in rows:
        if not isinstance(row, Row):
            raise _broken(path, row)
        _check_unicode(f"{path}, row {row.line}", row.values, known_format(path).kind)
        values.append(row.values)
        numbers.append(row.line)
        columns.update(dict.fromkeys(row.values))
    return _not_empty(Table(path, tuple(columns), values, numbers))


def _check_unicode(place: str, values: Any, kind: str = JSON) -> None:
    """Raise `UserError` if there is a lone surrogate: half of an escape in JSON, or else a byte that is not UTF-8;
    or if JSON is nested too deeply to be written again."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply: fix or remove it") from error
    except UnicodeEncodeError as error:
        if kind in (CSV, TSV):
            raise UserError(f"{place} is not UTF-8: {REMEDIES['not_utf8']}") from error
        raise UserError(f"{place} is not Unicode ({error.reason}): fix or remove it") from error


def _broken(path: str, found: Reject | Damage) -> UserError:
    number = found.offset + 1 if known_format(path).kind in TABLES else line_number(path, found.offset)
    remedy = (REMEDIES | DAMAGE_REMEDIES).get(found.reason, "shorten or remove it")
    return UserError(f"{path}, row {number}: {found.detail}; {remedy}")


def _not_empty(table: Table) -> Table:
    if not table.rows:
        raise UserError(f"{table.name!r} has no rows: choose a file with examples")
    return table


def _check_header(path: str, kept: list[str], names: list[str]) -> None:
    _check_once(path, names)
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path!r} has the one column {names[0]!r}: separate columns by commas, not by semicolons")
    kept += names


def _check_once(path: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has the column {twice!r} twice: rename one in its header")


def _read_json(path: str) -> Table:
    """An array of objects, such an array under the key `data`, or JSON lines, which many tools write to `.json`.

    Raises:
        UserError: it is none of these.
    """
    text = read_text(path)
    try:
        content = parse_json(text.encode("utf-8"))
    except ValueError as error:
        if _begins_with_a_row(text):
            return _table(path, json_rows(_whole(path), LONGEST_ROW))
        raise UserError(f"{path!r} is not JSON ({error}): fix it") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and not any(isinstance(value, dict | list) for value in content.values()):
        content = [content]
    if not isinstance(content, list):
        raise UserError(
            f"{path!r} is not an array of JSON objects, one for each row: convert it (pandas: orient='records')"
        )
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is not a JSON object: write it as {{column: value}}")
        _check_unicode(f"{path}, row {number}", row)
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    return _not_empty(Table(path, tuple(columns), rows, list(range(1, len(rows) + 1))))


def _begins_with_a_row(text: str) -> bool:
    try:
        return isinstance(parse_json(text.lstrip().split("\n", 1)[0].encode("utf-8")), dict)
    except ValueError:
        return False


def _is_quoted(path: str, text: str) -> bool:
    """Whether a `.tsv` file is as CSV writers (pandas, R, spreadsheets) write it, not plain as GLUE's, where quotes are
    part of the text.

    It is if its header is quoted, if a writer would have written exactly this text, quoting cells that need it (or,
    as spreadsheets do, that have a comma), or if rows have the header's number of cells only when quotes are read.
    """
    if text.startswith('"'):
        return True
    if '\t"' not in text and '\n"' not in text:
        return False
    try:
        rows = [row for row in csv_reader(io.StringIO(text, newline=""), "\t") if row]
    except csv.Error:
        return False
    if any(len(row) != len(rows[0]) for row in rows):
        return False
    lines = [line for line in text.split("\n") if line.strip()]
    plain = all(line.count("\t") == lines[0].count("\t") for line in lines)
    given = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    written = ("\n".join("\t".join(_quoted(cell, special) for cell in row) for row in rows) for special in QUOTED_BY)
    quoted = not plain or any(content.split("\n") == given for content in written)
    logger.info(f"{path}: quotes at the start of a cell are {'marks around it' if quoted else 'part of its text'}")
    return quoted


def _quoted(cell: str, special: str) -> str:
    doubled = cell.replace('"', '""')
    return f'"{doubled}"' if any(letter in cell for letter in special) else cell


def _parse_tsv(path: str, text: str) -> Table:
    """Columns are separated by tabs and nothing is quoted, as in GLUE's files."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip(" \r")]
    cells = [(number, line.rstrip("\r").split("\t")) for number, line in lines]
    columns: tuple[str, ...] = tuple(cells[0][1]) if cells else ()
    if len(columns) == len(COLA_COLUMNS) and columns[1] in ("0", "1") and columns[2] in ("", "*"):
        columns = COLA_COLUMNS
    else:
        cells = cells[1:]
    _check_once(path, columns)
    for index, (number, values) in enumerate(cells):
        if len(values) != len(columns):
            detail = other_width(len(values), len(columns), index == 0)
            raise UserError(f"{path}, row {number}: {detail}; {REMEDIES['bad_csv']}")
    rows = [dict(zip(columns, values, strict=True)) for _, values in cells]
    return _not_empty(Table(path, columns, rows, [number for number, _ in cells]))


def _read_columns(path: str) -> Table:
    measure_table(path, "", partial(_check_once, path))
    rows: list[dict[str, Any]] = []
    schema = pa.schema([])
    for first, batch in read_batches(Piece(path, 0, ALL_PARTS)):
        if not isinstance(batch, pa.RecordBatch):
            raise _broken(path, batch)
        try:
            batch.validate(full=True)
            rows += batch.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise UserError(f"{path}, row {first + 1} or soon after cannot be read ({error}): repair it") from error
        schema = batch.schema
    if _FEATURES in (schema.metadata or {}):
        import datasets

        try:
            _name_classes(rows, datasets.Features.from_arrow_schema(schema))
        except Exception as error:  # the library has no narrower type
            raise UserError(f"{path!r} has features that datasets cannot read ({error!r}): save it again") from error
    return _not_empty(Table(path, tuple(schema.names), rows, list(range(1, len(rows) + 1))))


def _from_datasets(name: str, dataset: Any) -> Table:
    try:
        dataset.data.validate(full=True)  # offsets outside of the values would be read as memory
        rows = dataset.to_list()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{name!r} cannot be read ({error}): save it again") from error
    _name_classes(rows, dataset.features)
    return _not_empty(Table(name, tuple(dataset.column_names), rows, list(range(1, len(rows) + 1))))


def _name_classes(rows: list[dict[str, Any]], features: Any) -> None:
    """Replace the numbers of classes by their names; no label, which `datasets` marks with -1 and Trainer with -100, is
    None."""
    import datasets

    for column, feature in features.items():
        of_list = getattr(feature, "feature", None)
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                row[column] = _class_name(feature.names, row[column])
        elif isinstance(of_list, datasets.ClassLabel):
            for row in rows:
                row[column] = row[column] and [_class_name(of_list.names, label) for label in row[column]]


def _class_name(names: list[str], label: int | None) -> str | None:
    return names[label] if label is not None and 0 <= label < len(names) else None
