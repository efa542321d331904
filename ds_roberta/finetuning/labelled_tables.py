"""Labelled texts as tables: TSV as GLUE has it, JSON lines, Parquet, and folders saved by `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ds_roberta.errors import UserError

SPLIT_PREFIXES = {  # of the names of files; the first that fits counts
    "train": ("train",),
    "validation_mismatched": ("validation_mismatched", "valid_mismatched", "dev_mismatched"),  # MNLI's second
    "test_mismatched": ("test_mismatched",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
SUFFIXES = (".tsv", ".jsonl", ".parquet")
COLA_COLUMNS = ("source", "label", "mark", "sentence")  # CoLA's files have no header


@dataclass(frozen=True)
class Table:
    """Rows by column name.

    Attributes:
        name: the file, for messages.
        columns: the names of the columns.
        rows: each row's values; a row of JSON lines may lack some.
        numbers: each row's number for messages: the line, from 1, in text files, else the row, from 1.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    numbers: list[int]

    def place(self, index: int) -> str:
        return f"{self.name}, row {self.numbers[index]}"


def read_splits(
    data: Iterable[str],
    suffixes: Sequence[str] = SUFFIXES,
    read: Callable[[Path], Any] | None = None,
    of_table: Callable[[Table], Any] | None = None,
) -> dict[str, Any]:
    """What `train` and `validation` hold, and the others of `SPLIT_PREFIXES` that are there.

    Args:
        data: one folder with a file of each split, or saved by `datasets`; or files, each named like its split
            (`dev.tsv`) or given as `validation=FILE`.
        suffixes: of the files in a folder that are read.
        read: of a file; None stands for `read_table`.
        of_table: what stands for a table that `datasets` saved; None for the table itself.

    Raises:
        UserError: a split is missing or there twice, or a file cannot be read.
    """
    entries = list(data)
    for entry in entries:
        if not (path := split_entry(entry)[1]).exists():
            raise UserError(f"--data {str(path)!r} does not exist: give a folder or files that do")
    if len(entries) == 1 and Path(entries[0]).is_dir():
        folder = Path(entries[0])
        try:
            found = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"cannot read --data {str(folder)!r} ({error.strerror}): give another folder") from error
        if folder / "dataset_dict.json" in found:
            tables = _read_dataset_dict(folder)
            _check_splits(tables, entries, suffixes)
            return {split: of_table(table) if of_table else table for split, table in tables.items()}
        entries = [str(file) for file in found if file.suffix in suffixes and _split_of(file.stem)]
    files = _by_split(entries)
    _check_splits(files, data, suffixes)
    return {split: (read or read_table)(file) for split, file in files.items()}


def _check_splits(found: Iterable[str], data: Iterable[str], suffixes: Sequence[str]) -> None:
    for split in ("train", "validation"):
        if split not in found:
            raise UserError(
                f"no {split} file in --data {' '.join(data)}: name a file {SPLIT_PREFIXES[split][-1]} with the ending "
                f"{', '.join(suffixes)}, or give {split}=FILE"
            )


def read_table(path: Path) -> Table:
    """Read one file by its ending.

    Raises:
        UserError: it is missing, empty, broken, or of another format.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot read {str(path)!r} as a table: give a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return parse_table(str(path), read_text(path), path.suffix)


def read_text(path: Path) -> str:
    """
    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}): give another file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 at byte {error.start}: convert it") from error
    return text


def parse_table(name: str, text: str, suffix: str) -> Table:
    """A table from the text of a file that ends in `.jsonl` or `.tsv`.

    Raises:
        UserError: it has no rows, or a row is broken.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    table = _parse_jsonl(name, lines) if suffix == ".jsonl" else _parse_tsv(name, lines)
    return _not_empty(table)


def _split_of(stem: str) -> str | None:
    return next((split for split, prefixes in SPLIT_PREFIXES.items() if stem.startswith(prefixes)), None)


def split_entry(entry: str) -> tuple[str | None, Path]:
    """The split that an entry of `--data` names, as `validation=FILE` does, and the path."""
    name, equals, rest = entry.partition("=")
    return (name, Path(rest)) if equals and name in SPLIT_PREFIXES else (None, Path(entry))


def _by_split(entries: Iterable[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for entry in entries:
        split, file = split_entry(entry)
        split = split or _split_of(file.stem)
        if split is None:
            raise UserError(f"{entry!r} does not say its split: give it as train=, validation= or test={entry}")
        if split in files:
            raise UserError(f"{str(files[split])!r} and {str(file)!r} are both {split}: give one of them as --data")
        files[split] = file
    return files


def _not_empty(table: Table) -> Table:
    if not table.rows:
        raise UserError(f"{table.name!r} has no rows: give a file with examples")
    return table


def _parse_jsonl(name: str, lines: list[tuple[int, str]]) -> Table:
    rows, columns = [], dict[str, None]()
    for number, line in lines:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{name}, row {number} is not JSON ({error.msg}): mend or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number} is not a JSON object: write it as {{column: value}}")
        rows.append(row)
        columns.update(dict.fromkeys(row))
    return Table(name, tuple(columns), rows, [number for number, _ in lines])


def _parse_tsv(name: str, lines: list[tuple[int, str]]) -> Table:
    """Tabs part the columns and nothing is quoted, as in GLUE's files."""
    cells = [(number, line.rstrip("\r").split("\t")) for number, line in lines]
    columns: tuple[str, ...] = tuple(cells[0][1]) if cells else ()
    if len(columns) == len(COLA_COLUMNS) and columns[1] in ("0", "1") and columns[2] in ("", "*"):
        columns = COLA_COLUMNS
    else:
        cells = cells[1:]
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise UserError(f"{name} has the column {twice!r} twice: rename one in its header")
    for number, values in cells:
        if len(values) != len(columns):
            raise UserError(
                f"{name}, row {number} has {len(values)} columns, its header {len(columns)}: mend or remove the row"
            )
    rows = [dict(zip(columns, values, strict=True)) for _, values in cells]
    return Table(name, columns, rows, [number for number, _ in cells])


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        columns = pyarrow.parquet.read_schema(path).names
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {str(path)!r} ({error}): give another file") from error
    return _not_empty(Table(str(path), tuple(columns), rows, list(range(1, len(rows) + 1))))


def _read_dataset_dict(folder: Path) -> dict[str, Table]:
    """The splits of a folder saved by `datasets`; labels that it keeps as numbers with names become the names."""
    import datasets

    try:
        splits = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {str(folder)!r} as datasets saved it ({error}): save it again") from error
    tables: dict[str, Table] = {}
    for found, dataset in splits.items():
        split = _split_of(found)
        if split is None:
            continue
        if split in tables:
            raise UserError(f"{str(folder)!r} has two splits for {split}, one is {found!r}: save it with one of them")
        rows = dataset.to_list()
        for column, feature in dataset.features.items():
            of_list = getattr(feature, "feature", None)
            if isinstance(feature, datasets.ClassLabel):
                for row in rows:
                    row[column] = _class_name(feature.names, row[column])
            elif isinstance(of_list, datasets.ClassLabel):
                for row in rows:
                    row[column] = row[column] and [_class_name(of_list.names, label) for label in row[column]]
        numbers = list(range(1, len(rows) + 1))
        tables[split] = _not_empty(Table(f"{folder}/{found}", tuple(dataset.column_names), rows, numbers))
    return tables


def _class_name(names: list[str], label: int | None) -> str | None:
    """A class's name; None where there is no label, which `datasets` marks with -1 and Trainer with -100."""
    return names[label] if label is not None and 0 <= label < len(names) else None
