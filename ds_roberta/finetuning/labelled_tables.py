"""Labelled texts as tables: TSV like GLUE's, JSON lines, Parquet, and folders saved by `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ds_roberta.errors import UserError
from ds_roberta.options import Settings, option

SPLIT_PREFIXES = {  # of file names; the first that matches counts
    "train": ("train",),
    "validation_mismatched": ("validation_mismatched", "valid_mismatched", "dev_mismatched"),  # MNLI has two
    "test_mismatched": ("test_mismatched",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
SUFFIXES = (".tsv", ".jsonl", ".parquet")
COLA_COLUMNS = ("source", "label", "mark", "sentence")  # CoLA's files have no header
TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (  # of GLUE's files and of its data sets on the web
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence", None),
    ("text", None),
)


@dataclass(frozen=True)
class Columns(Settings):
    """Names of table columns."""

    text_column: str | None = option("default: sentence, text, tokens, or the first of a pair such as sentence1", None)
    text_pair_column: str | None = option("default: the second of such a pair, if there is one", None)
    label_column: str | None = option("default: label, tags, or GLUE's names for it", None)


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts.

    Attributes:
        place: the row in its file, for messages.
        pair: the second text of a pair.
        label: the index of a class, a number in regression, or a 1 or 0 for each of several labels; None: there is
            none.
    """

    place: str = field(compare=False)
    text: str
    pair: str | None = None
    label: float | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Table:
    """Rows by column name.

    Attributes:
        name: the file, for messages.
        columns: the names of the columns.
        rows: each row's values; a row of JSON lines may lack some.
        numbers: each row's number for messages: in text files the line, else the row, counted from 1.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    numbers: list[int]

    def place(self, index: int) -> str:
        return f"{self.name}, row {self.numbers[index]}"


def read_splits(
    data: Iterable[str], suffixes: Sequence[str] = SUFFIXES, read: Callable[[Path | Table], Any] | None = None
) -> dict[str, Any]:
    """The content of `train`, `validation` and any other splits of `SPLIT_PREFIXES`.

    Args:
        data: one folder with a file for each split, or saved by `datasets`; or files, each named after its split
            (`dev.tsv`) or given as `validation=FILE`.
        suffixes: the endings of the files to read in a folder.
        read: reads a file, or converts a table that `datasets` saved; None: `read_table`.

    Raises:
        UserError: a split is missing or given twice, or a file cannot be read.
    """
    given, read = list(data), read or read_table
    for entry in given:
        if not (path := split_entry(entry)[1]).exists():
            raise UserError(f"--data {str(path)!r} does not exist: choose a folder or files that do")
    found: Mapping[str, Path | Table]
    if len(given) == 1 and (folder := Path(given[0])).is_dir():
        try:
            files = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"cannot read --data {str(folder)!r} ({error.strerror}): choose another folder") from error
        if folder / "dataset_dict.json" in files:
            found = _read_dataset_dict(folder)
        else:
            found = _by_split(str(file) for file in files if file.suffix in suffixes and _split_of(file.stem))
    else:
        found = _by_split(given)
    for split in ("train", "validation"):
        if split not in found:
            raise UserError(
                f"no {split} file in --data {' '.join(given)}: name a file {SPLIT_PREFIXES[split][-1]} with the ending "
                f"{', '.join(suffixes)}, or give {split}=FILE"
            )
    return {split: read(source) for split, source in found.items()}


def read_table(source: Path | Table) -> Table:
    """Read one file by its ending; a table stays as it is.

    Raises:
        UserError: it is missing, empty, damaged, or of another format.
    """
    if isinstance(source, Table):
        return source
    if source.suffix not in SUFFIXES:
        raise UserError(f"cannot read {str(source)!r} as a table: choose a file that ends in {', '.join(SUFFIXES)}")
    if source.suffix == ".parquet":
        return _read_parquet(source)
    return parse_table(str(source), read_text(source), source.suffix)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}): choose another file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 at byte {error.start}: convert it") from error


def parse_table(name: str, text: str, suffix: str) -> Table:
    """A table from the text of a file that ends in `.jsonl` or `.tsv`.

    Raises:
        UserError: it has no rows, or a row is broken.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _not_empty(_parse_jsonl(name, lines) if suffix == ".jsonl" else _parse_tsv(name, lines))


def find_texts(table: Table, columns: Columns) -> list[Text]:
    """The table's texts, or its pairs of texts, without labels.

    Raises:
        UserError: a column is missing, or a row has no text.
    """
    text: str | None
    if columns.text_column is not None:
        text, pair = columns.text_column, columns.text_pair_column
    else:
        usual = (names for names in TEXT_COLUMNS if all(name in table.columns for name in names if name))
        text, pair = next(usual, (None, None))
        pair = columns.text_pair_column or pair
    if text is None:
        raise UserError(f"{table.name} has the columns {listed(table)}: give the one with the text as --text_column")
    firsts = _texts(table, text)
    seconds = [None] * len(firsts) if pair is None else _texts(table, pair)
    return [Text(table.place(index), *texts) for index, texts in enumerate(zip(firsts, seconds, strict=True))]


def check_column(table: Table, column: str, option: str) -> None:
    """Raise `UserError` unless the table has the column."""
    if column not in table.columns:
        raise UserError(f"{table.name} has no column {column!r}: give one of {listed(table)} as {option}")


def listed(table: Table) -> str:
    """The columns of a table, for messages."""
    return ", ".join(map(repr, table.columns))


def _texts(table: Table, column: str) -> list[str]:
    check_column(table, column, "--text_column or --text_pair_column")
    texts = [row.get(column) for row in table.rows]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{table.place(index)}: {column!r} is {text!r}, not a text: fix or remove the row")
    return texts  # type: ignore[return-value]


def _split_of(stem: str) -> str | None:
    return next((split for split, prefixes in SPLIT_PREFIXES.items() if stem.startswith(prefixes)), None)


def split_entry(entry: str) -> tuple[str | None, Path]:
    """The split that an entry of `--data` names, as in `validation=FILE`, and the path."""
    name, equals, rest = entry.partition("=")
    return (name, Path(rest)) if equals and name in SPLIT_PREFIXES else (None, Path(entry))


def _by_split(entries: Iterable[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for entry in entries:
        split, file = split_entry(entry)
        split = split or _split_of(file.stem)
        if split is None:
            raise UserError(f"{entry!r} does not name its split: give it as train=, validation= or test={entry}")
        if split in files:
            raise UserError(
                f"{str(files[split])!r} and {str(file)!r} are both {split}: leave one of them out of --data"
            )
        files[split] = file
    return files


def _not_empty(table: Table) -> Table:
    if not table.rows:
        raise UserError(f"{table.name!r} has no rows: choose a file with examples")
    return table


def _parse_jsonl(name: str, lines: list[tuple[int, str]]) -> Table:
    rows, columns = [], dict[str, None]()
    for number, line in lines:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{name}, row {number} is not JSON ({error.msg}): fix or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number} is not a JSON object: write it as {{column: value}}")
        rows.append(row)
        columns.update(dict.fromkeys(row))
    return Table(name, tuple(columns), rows, [number for number, _ in lines])


def _parse_tsv(name: str, lines: list[tuple[int, str]]) -> Table:
    """Columns are separated by tabs and nothing is quoted, as in GLUE's files."""
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
                f"{name}, row {number} has {len(values)} columns, its header has {len(columns)}: fix or remove the row"
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
        raise UserError(f"cannot read {str(path)!r} ({error}): choose another file") from error
    return _not_empty(Table(str(path), tuple(columns), rows, list(range(1, len(rows) + 1))))


def _read_dataset_dict(folder: Path) -> dict[str, Table]:
    """The splits of a folder saved by `datasets`; labels that it stores as numbers with names become the names."""
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
            raise UserError(f"{str(folder)!r} has two splits for {split}, one of them {found!r}: save it with only one")
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
    """A class's name; None if there is no label, which `datasets` marks with -1 and Trainer with -100."""
    return names[label] if label is not None and 0 <= label < len(names) else None
