"""Predictions as files: JSON lines, CSV, and what GLUE's board takes."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, check_output_file, errors_of_the_disk
from ds_roberta.process import logger

SUFFIXES = (".jsonl", ".csv", ".tsv")
INPUT_PREFIX = "input_"


@dataclass(frozen=True)
class Board:
    """What GLUE's board (gluebenchmark.com) takes for a task.

    Attributes:
        classes: the names of the classes in the data set on the hub, by index; empty: the predictions are numbers.
        values: what the board calls them.
        examples: the number of test examples.
    """

    classes: tuple[str, ...]
    values: tuple[str, ...]
    examples: int


_ENTAILMENT = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")
_BINARY = ("0", "1")
BOARDS = {
    "CoLA": Board(("unacceptable", "acceptable"), _BINARY, 1063),
    "SST-2": Board(("negative", "positive"), _BINARY, 1821),
    "MRPC": Board(("not_equivalent", "equivalent"), _BINARY, 1725),
    "STS-B": Board((), (), 1379),
    "QQP": Board(("not_duplicate", "duplicate"), _BINARY, 390965),
    "MNLI-m": Board(_INFERENCE, _INFERENCE, 9796),
    "MNLI-mm": Board(_INFERENCE, _INFERENCE, 9847),
    "QNLI": Board(_ENTAILMENT, _ENTAILMENT, 5463),
    "RTE": Board(_ENTAILMENT, _ENTAILMENT, 3000),
    "WNLI": Board(("not_entailment", "entailment"), _BINARY, 146),
    "AX": Board(_INFERENCE, _INFERENCE, 1104),
}
"""By the names of the board's files."""


def check_output(output: Path, given: str | None, glue_task: str | None) -> None:
    """Check, before any work, that predictions can be written.

    Args:
        given: the input.

    Raises:
        UserError: the file's folder is missing, its ending is unknown or not that of its format, or it is the input.
    """
    check_output_file("--output", output)
    if given is not None and output.resolve() == Path(given).resolve():
        raise UserError(f"--output {str(output)!r} is the input: choose another file")
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {str(output)!r} does not end in {', '.join(SUFFIXES)}: choose one of these formats")
    if (output.suffix == ".tsv") != (glue_task is not None):
        raise UserError(
            f"--output {str(output)!r}: .tsv is the format of GLUE's board and needs --glue_task, which needs .tsv; "
            "choose .jsonl or .csv for all else"
        )


def check_board(glue_task: str, head: Mapping[str, Any]) -> None:
    """Check, before any work, that a model predicts what GLUE's board takes for a task.

    Args:
        head: as in `Task`.

    Raises:
        UserError: the model is for another kind of task, or has a label that the board does not know.
    """
    board = BOARDS[glue_task]
    if head.get("problem_type") != ("single_label_classification" if board.classes else "regression"):
        task = "classification" if board.classes else "regression"
        raise UserError(f"--glue_task {glue_task} needs a model of --task {task}: predict with one")
    for label in head["id2label"].values() if board.classes else ():
        _on_board(glue_task, board, label)


def with_other_columns(others: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each prediction after the other columns of its input. One with a prediction's name, such as the gold label, gets
    `INPUT_PREFIX`, as often as it takes to differ from all columns."""
    predicted = {name for row in rows for name in row}
    columns = dict.fromkeys(name for row in others for name in row)
    taken, names = predicted | columns.keys(), {}
    for column in columns:
        name = column
        while column in predicted and name in taken:
            name = f"{INPUT_PREFIX}{name}"
        taken.add(name)
        names[column] = name
    return [
        {names[column]: value for column, value in other.items()} | row for other, row in zip(others, rows, strict=True)
    ]


def write_predictions(path: Path, rows: Sequence[dict[str, Any]], glue_task: str | None = None) -> None:
    """Write predictions in the format of the file's ending, whole or not at all.

    In a `.csv`, lists and objects are JSON. In JSON, numbers that are not finite are null. Bytes are text if they are
    UTF-8, else base64.

    Raises:
        UserError: the file cannot be written, or a prediction is not one that the board knows.
    """
    if glue_task is not None:
        rows = board_rows(glue_task, rows)
    with (
        errors_of_the_disk(path),
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        if path.suffix == ".jsonl":
            file.writelines(f"{_json(row)}\n" for row in rows)
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(_Lines(file), columns, delimiter=delimiter, lineterminator=_Lines.terminator)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def board_rows(glue_task: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file for GLUE's board: `index`, as in the input or else from 0, and `prediction`.

    Raises:
        UserError: a prediction is not one that the board knows.
    """
    board = BOARDS[glue_task]
    if len(rows) != board.examples:
        logger.warning(f"GLUE's board expects {board.examples:,} predictions for {glue_task}, not {len(rows):,}")
    found = []
    for number, row in enumerate(rows):
        if board.classes:
            prediction = _on_board(glue_task, board, row.get("label"))
        elif "value" in row:
            prediction = f"{min(max(row['value'], 0.0), 5.0):.3f}"
        else:
            raise UserError(f"--glue_task {glue_task} needs numbers: predict with a model of --task regression")
        found.append({"index": row.get("index", number), "prediction": prediction})
    return found


def _on_board(glue_task: str, board: Board, label: Any) -> str:
    """A class's name on the board; the model may call it by its name, its index, or as the board does."""
    if label in board.values:
        return str(label)
    if label in board.classes:
        return board.values[board.classes.index(label)]
    if isinstance(label, str) and label.isdecimal() and int(label) < len(board.classes):
        return board.values[int(label)]
    raise UserError(
        f"--glue_task {glue_task} does not know the label {label!r}: its labels are {', '.join(board.classes)}, or "
        "their indices"
    )


class _Lines:
    """Gives a file the rows of a CSV writer with `\\n` at their ends. Until Python 3.13, the writer quotes a `\\r` in a
    cell only if the terminator has it, and readers take one without quotes for the end of the row."""

    terminator = "\r\n"

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(f"{row.removesuffix(self.terminator)}\n")


def _cell(value: Any) -> Any:
    return _json(value) if isinstance(value, list | dict | tuple) else _text(value)


def _json(value: Any) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=lambda other: str(_text(other)))


def _finite(value: Any) -> Any:
    """A value of JSON with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> Any:
    """Bytes as text; any other value as it is."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")
