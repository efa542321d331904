"""The labels of a table's rows: which rows have one, and which values are the same one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from ds_roberta.errors import UserError
from ds_roberta.finetuning.labelled_tables import Columns, check_column, listed
from ds_roberta.inputs.tables import Table
from ds_roberta.options import option
from ds_roberta.process import logger

LABEL_COLUMNS = ("label", "labels", "gold_label", "score", "is_duplicate", "Quality")  # in GLUE's and other data sets
LEAVE_OUT, ERROR = "leave_out", "error"
NO_GOLD_LABEL = "-"  # SNLI's and MNLI's, where the annotators did not agree
RARE = 0.1
"""The share of rows below which the label -1 beside 0, 1, 2, … probably means none."""
SCALARS = (str, int, float, Decimal)
_WHOLE = re.compile(r"(-?\d+)\.0+")
_NUMBER, _FRACTION = re.compile(r"-?\d+(\.\d+)?"), re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Labels(Columns):
    """Rows without a label."""

    column_options: ClassVar[str] = "give the one with the label as --label_column"
    """What names the column of labels, for messages."""
    unlabelled: str = option(
        "rows whose label is empty or '-': counted and left out, or an error", LEAVE_OUT, choices=(LEAVE_OUT, ERROR)
    )
    ignore_label: str | None = option("a value of the label's column that means no label, such as -1", None)


def same_label(value: Any) -> str:
    """A label's name, which is the same for 1, 1.0 and "1", and without white space around it."""
    whole = _WHOLE.fullmatch(text := str(value).strip())
    return whole[1] if whole else text


def label_column(table: Table, options: Labels) -> str:
    """The name of the column that holds the labels.

    Raises:
        UserError: no column is named, and the table has none of the usual ones; or its rows are Label Studio's tasks.
    """
    if any(isinstance(row.get("data"), dict) and "annotations" in row for row in table.rows):
        raise UserError(
            f"{table.name} has Label Studio's tasks: export them as JSON-MIN or CSV, and give the name of the choices "
            "as --label_column"
        )
    label = _own_column(table, options)
    if label is None:
        raise UserError(
            f"{table.name} has the columns {listed(table)}: {options.column_options}, or leave out a file without "
            "labels"
        )
    return label


def _own_column(table: Table, options: Labels) -> str | None:
    return options.label_column or next((name for name in LABEL_COLUMNS if name in table.columns), None)


def without_unlabelled_tests(tables: dict[str, Table], options: Labels) -> dict[str, Table]:
    """All splits except test splits without labels (-1, `-`, no value, the ignored one), which most of GLUE's are."""
    ignored, of_train = ("-1", options.ignore_label), label_column(tables["train"], options)
    return {
        split: table
        for split, table in tables.items()
        if not _is_unlabelled_test(split, table, [_own_column(table, options) or of_train], ignored)
    }


def without_unmarked_tests(tables: dict[str, Table], columns: Sequence[str], options: Labels) -> dict[str, Table]:
    """All splits except test splits with no value in any of the labels' own columns."""
    return {
        split: table
        for split, table in tables.items()
        if not _is_unlabelled_test(split, table, columns, (options.ignore_label,))
    }


def _is_unlabelled_test(split: str, table: Table, columns: Sequence[str], ignored: Sequence[str | None]) -> bool:
    if not split.startswith("test"):
        return False
    values = (row.get(column) for row in table.rows for column in columns)
    if not all(any(is_none(value, each) for each in ignored) for value in values):
        return False
    logger.info(f"{table.name} has no labels and is left out")
    return True


def label_of_rows(options: Labels) -> Callable[[Table], list[tuple[str, ...]]]:
    """Gives the one label of each of a table's rows, of those without one too; see `read_splits`."""

    def of_rows(table: Table) -> list[tuple[str, ...]]:
        column = label_column(table, options)
        return [(same_label(_alone(row.get(column))),) for row in table.rows]

    return of_rows


def labelled_rows(table: Table, options: Labels, *, are_lists: bool = False) -> tuple[Table, list[Any]]:
    """The rows that have a label, and the labels as they are in the file; the number of other rows is logged.

    Args:
        are_lists: whether values may be lists, and empty text is an empty list; if not, a list of one label is the
            label, and an empty one is none.

    Raises:
        UserError: the column is missing, a value is no label, no row has one, or, by option, one has none.
    """
    column = label_column(table, options)
    check_column(table, column, "--label_column")
    kept, labels, missing = [], [], Counter[str]()
    for index, row in enumerate(table.rows):
        value = row.get(column) if are_lists else _alone(row.get(column))
        if not is_none(value, options.ignore_label) or (are_lists and value == ""):
            if not isinstance(value, (*SCALARS, list) if are_lists else SCALARS):
                several = ", or use --task multi-label-classification" if isinstance(value, list) else ""
                raise UserError(
                    f"{table.place(index)}: {column!r} is {value!r}, not a label: label or remove the row{several}"
                )
            kept.append(index)
            labels.append(value)
            continue
        if options.unlabelled == ERROR:
            raise UserError(
                f"{table.place(index)} has no {column!r} ({value!r}): label or remove the row, or give --unlabelled "
                f"{LEAVE_OUT}"
            )
        missing["none" if value is None or value != value or not str(value).strip() else repr(value)] += 1
    if NO_GOLD_LABEL in map(_alone, (row.get(column) for row in table.rows)) and "+" in labels:
        raise UserError(
            f"{table.name} has the labels '+' and '-' as {column!r}, but a '-' means no label: rename them, such as "
            "positive and negative"
        )
    if missing:
        values = ", ".join(f"{value} {count:,}" for value, count in missing.most_common())
        counts = f"{missing.total():,} of {len(table.rows):,} rows"
        logger.info(f"{table.name}: {counts} have no {column!r} and are left out ({values})")
    if not kept:
        raise UserError(f"no row of {table.name!r} has a {column!r}: choose a file with labels")
    return table.select(kept), labels


def class_names(labels: Iterable[Any], name: str) -> list[str]:
    """The classes, in order.

    Args:
        labels: of the training rows.
        name: their file, for messages.

    Raises:
        UserError: there are fewer than two.
    """
    counts = Counter(map(same_label, labels))
    if len(counts) < 2:
        raise UserError(f"{name} has only the label {min(counts)!r}: classification needs at least two")
    others = counts.keys() - {"-1"}
    if counts.keys() != others == set(map(str, range(len(others)))) and counts["-1"] < RARE * counts.total():
        logger.warning(
            f"{name}: {counts['-1']:,} of {counts.total():,} rows have the label -1, which is a class like the others; "
            "if it means that they have none, give --ignore_label -1"
        )
    names = in_order(counts)
    if all(map(_NUMBER.fullmatch, names)) and (fraction := next(filter(_FRACTION.fullmatch, names), None)):
        logger.warning(
            f"{name}: each of the {len(names)} numbers, such as {fraction}, is a class of its own; --task regression "
            "learns numbers"
        )
    return names


def in_order(names: Iterable[str]) -> list[str]:
    """Names in numerical order if all are numbers, else in alphabetical order."""
    names = list(names)
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        numbers = {}
    if not all(map(math.isfinite, numbers.values())):
        numbers = {}  # a class may be called "nan"
    return sorted(names, key=lambda name: (numbers.get(name, 0.0), name))


def _alone(value: Any) -> Any:
    """The item of a list of one, as doccano writes one label, and None of an empty list; else the value itself."""
    return next(iter(value), None) if isinstance(value, list) and len(value) < 2 else value


def is_none(value: Any, ignored: str | None) -> bool:
    """Whether a value stands for no label; NaN is what pandas writes for an empty cell."""
    if value is None or value != value or (isinstance(value, str) and value.strip() in ("", NO_GOLD_LABEL)):
        return True
    return ignored is not None and same_label(value) == same_label(ignored)
