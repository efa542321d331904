"""From a table's columns to texts and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.finetuning.labelled_tables import Table
from ds_roberta.finetuning.task import NO_LABEL

TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (  # of GLUE's files and those of its sets on the web
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence", None),
    ("text", None),
)
LABEL_COLUMNS = ("label", "gold_label", "score", "is_duplicate", "Quality")


@dataclass(frozen=True)
class Columns:
    """Names of columns as the user gave them; None stands for the usual ones."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts.

    Attributes:
        firsts: the texts, or the first ones of the pairs.
        seconds: of the pairs; None where there are none.
        place: where the text of an index stands, for messages.
    """

    firsts: list[str]
    seconds: list[str] | None
    place: Callable[[int], str] = field(compare=False)


@dataclass(frozen=True)
class Examples:
    """Texts with their labels: indices into the label names, or numbers in regression."""

    texts: Texts
    labels: list[float]


def find_texts(table: Table, columns: Columns) -> Texts:
    """The table's texts, or its pairs of texts.

    Raises:
        UserError: a column is missing, or a row has no text.
    """
    text: str | None
    if columns.text is not None:
        text, pair = columns.text, columns.text_pair
    else:
        usual = (names for names in TEXT_COLUMNS if all(name in table.columns for name in names if name))
        text, pair = next(usual, (None, None))
        pair = columns.text_pair or pair
    if text is None:
        raise UserError(f"{table.name} has the columns {_listed(table)}: say with --text_column where the text is")
    return Texts(_texts(table, text), None if pair is None else _texts(table, pair), table.place)


def label_column(table: Table, columns: Columns) -> str:
    """
    Raises:
        UserError: none is named and none of the usual ones is there.
    """
    label = columns.label or next((name for name in LABEL_COLUMNS if name in table.columns), None)
    if label is None:
        raise UserError(
            f"{table.name} has the columns {_listed(table)}: say with --label_column where the label is, or leave out "
            "a file without labels"
        )
    return label


def labelled(tables: dict[str, Table], columns: Columns) -> dict[str, Table]:
    """The splits without those of test that have no labels, as most of GLUE's: -1, or nothing."""
    label = label_column(tables["train"], columns)
    kept = {}
    for split, table in tables.items():
        if split.startswith("test") and all(row.get(label) in (None, "", -1, "-1") for row in table.rows):
            logger.info(f"{table.name} has no labels and is left out")
        else:
            kept[split] = table
    return kept


def label_values(table: Table, columns: Columns) -> list[Any]:
    """The table's labels as they stand.

    Raises:
        UserError: the column is missing, or a row has no label.
    """
    label = label_column(table, columns)
    _check_column(table, label, "--label_column")
    values = [row.get(label) for row in table.rows]
    for index, value in enumerate(values):
        if value is None or value == "":
            raise UserError(f"{table.place(index)} has no {label!r}: label or remove it")
        if not isinstance(value, str | int | float) or value != value:  # NaN, which a table without a label may have
            raise UserError(f"{table.place(index)}: {label!r} is {value!r}, not a label: label or remove the row")
    return values


def label_names(train: Table, columns: Columns) -> list[str]:
    """The classes of the training rows: in the order of numbers where all are, else of the alphabet.

    Raises:
        UserError: there are fewer than two.
    """
    names = {str(value) for value in label_values(train, columns)}
    if len(names) < 2:
        raise UserError(f"{train.name} has only the label {min(names)!r}: classification needs two at least")
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        numbers = {}
    if not all(map(math.isfinite, numbers.values())):
        numbers = {}  # a class may be called "nan"
    return sorted(names, key=lambda name: (numbers.get(name, 0.0), name))


def class_examples(table: Table, columns: Columns, names: list[str]) -> Examples:
    """
    Raises:
        UserError: as above, or a label is not among `names`.
    """
    texts = find_texts(table, columns)
    indices = {name: index for index, name in enumerate(names)}
    labels = [str(value) for value in label_values(table, columns)]
    for index, label in enumerate(labels):
        if label not in indices:
            problem = unknown_key_message("label", label, names)
            raise UserError(f"{table.place(index)}: {problem}; no training row has it: mend or remove the row")
    return Examples(texts, [indices[label] for label in labels])


def number_examples(table: Table, columns: Columns) -> Examples:
    """
    Raises:
        UserError: as above, or a label is not a finite number.
    """
    texts = find_texts(table, columns)
    labels = []
    for index, value in enumerate(label_values(table, columns)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{table.place(index)}: the label {value!r} is not a number: mend it or use --task classification"
            )
        if number == NO_LABEL:
            raise UserError(
                f"{table.place(index)}: the label {value!r} means none to Trainer: shift or scale all labels"
            )
        labels.append(number)
    return Examples(texts, labels)


def _texts(table: Table, column: str) -> list[str]:
    _check_column(table, column, "--text_column or --text_pair_column")
    texts = [row.get(column) for row in table.rows]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{table.place(index)}: {column!r} is {text!r}, not a text: mend or remove the row")
    return texts  # type: ignore[return-value]


def _check_column(table: Table, column: str, option: str) -> None:
    if column not in table.columns:
        raise UserError(f"{table.name} has no column {column!r}: give one of {_listed(table)} as {option}")


def _listed(table: Table) -> str:
    return ", ".join(map(repr, table.columns))
