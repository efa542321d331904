"""Questions with their contexts and answers: SQuAD's JSON, versions 1.1 and 2.0, and rows of tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.finetuning.labelled_tables import listed, without
from ds_roberta.inputs.rows import parse_cell, parse_json
from ds_roberta.inputs.streams import suffix_of
from ds_roberta.inputs.tables import Table, read_table, read_text

COLUMNS = ("question", "context", "answers")
_FLAGS = {"": None, "0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True)
class Question:
    """A question about a context, with its gold answers.

    Attributes:
        place: the question's place in its file, for messages.
        id: as in the file, else the row's number; unique within the file.
        answers: the gold answers' texts; none if the context does not answer it, or if the file does not say.
        start: where the first answer begins in `context`, in characters; None if there is none.
        may_be_unanswerable: whether its file is like SQuAD 2.0's, in which a context need not answer its question.
        others: the other values of the question's row or JSON object, its answers as they are in the file among them.
    """

    place: str = field(repr=False)
    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    start: int | None = None
    may_be_unanswerable: bool = False
    others: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_questions(source: str | Path | Table, *, labelled: bool = True) -> list[Question]:
    """SQuAD's JSON from `.json`, rows from other files and tables.

    Raises:
        UserError: as `read_squad`, `read_table` and `table_questions`.
    """
    if not isinstance(source, Table) and suffix_of(str(source)) == ".json":
        return read_squad(source, labelled=labelled)
    return table_questions(read_table(source), labelled=labelled)


def read_squad(path: str | Path, *, labelled: bool = True) -> list[Question]:
    """Read SQuAD's JSON; a `.json` file may also have the rows of a table: see `read_table`.

    Args:
        labelled: whether each question must have an answer or be marked as having none. If not, answers are
            ignored.

    Raises:
        UserError: the file cannot be read, is in neither format, has no question or an id twice, or an answer is
            not at its `answer_start`.
    """
    content = _read_json(path)
    if isinstance(content, Table):
        return table_questions(content, labelled=labelled)
    return parse_squad(str(path), content, labelled=labelled)


def is_unanswered(source: str | Path | Table) -> bool:
    """Whether no question of SQuAD's JSON says what its answers are, or no row of a table has `answers` or
    `is_impossible`.

    Raises:
        UserError: the file cannot be read, or is in neither format.
    """
    if isinstance(source, Table) or suffix_of(str(source)) != ".json":
        content = read_table(source)
    else:
        content = _read_json(source)
    if isinstance(content, Table):
        rows = map(_of_text, content.rows)
        return not any(row.get("is_impossible") is not None or _has_answers(row.get("answers")) for row in rows)
    return not any({"answers", "is_impossible"} & entry.keys() for _, _, entry in _entries(str(source), content))


def _has_answers(given: Any) -> bool:
    return bool(given.get("text")) if isinstance(given, dict) else bool(given)


def _read_json(path: str | Path) -> Any:
    """The parsed content of a file in SQuAD's format, or a table."""
    try:
        content = parse_json(read_text(path).encode("utf-8"))
    except ValueError:
        return read_table(path)  # JSON lines, or it says what is wrong
    if isinstance(content, dict) and "context" in content:
        return Table(str(path), tuple(content), [content], [1])
    rows = content.get("data") if isinstance(content, dict) else content
    if not rows or not isinstance(rows, list) or any(isinstance(row, dict) and "paragraphs" in row for row in rows):
        return content
    return read_table(path)


def parse_squad(name: str, content: Any, *, labelled: bool = True) -> list[Question]:
    """The questions of a SQuAD file's parsed content; `name` is the file's, for messages. See `read_squad`."""
    entries = list(_entries(name, content))
    is_second = re.match(r"v?2(\.|$)", str(content.get("version", "")))  # not a date such as 2023-05-01
    second = is_second is not None or any("is_impossible" in entry for _, _, entry in entries)
    questions = []
    for place, context, entry in entries:
        answers = _answers(place, context, entry, _list(place, entry, "answers"), second) if labelled else []
        questions.append(_question(place, _identifier(place, entry.get("id")), context, entry, answers))
    return _checked(name, questions, second)


def table_questions(table: Table, *, labelled: bool = True) -> list[Question]:
    """The questions of rows with `question`, `context` and, optionally, `id`. A row's `answers` are as
    `datasets` has SQuAD's, `{"text": [...], "answer_start": [...]}`, or as SQuAD's file, in a `.csv` as text; a row
    without any is a question that its context does not answer.

    Raises:
        UserError: as `read_squad`, or a column is missing.
    """
    for column in COLUMNS if labelled else COLUMNS[:2]:
        if column not in table.columns:
            raise UserError(f"{table.name} has no column {column!r}, but {listed(table)}: rename the one that has it")
    questions = []
    for index, row in enumerate(map(_of_text, table.rows)):
        place = table.place(index)
        answers: list[tuple[str, int]] = []
        if labelled:
            given = row.get("answers")
            if isinstance(given, dict):
                texts, starts = _list(place, given, "text"), _list(place, given, "answer_start")
                if len(texts) != len(starts):
                    raise UserError(f"{place}: {len(texts)} texts but {len(starts)} answer_start: fix the row")
                given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
            answers = _answers(place, _text(place, row, "context"), row, given, True)
        identifier = _identifier(place, row.get("id", table.numbers[index]))
        question = _question(place, identifier, _text(place, row, "context"), row, answers)
        questions.append(question)
    return _checked(table.name, questions, labelled and any(not question.answers for question in questions))


def _of_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the values of `answers` and `is_impossible`, of which a `.csv` has the text."""
    answers, flag = row.get("answers"), row.get("is_impossible")
    if isinstance(answers, str) and (found := parse_cell(answers)) is not None:
        row = {**row, "answers": found}
    if isinstance(flag, str):
        row = {**row, "is_impossible": _FLAGS.get(flag.strip().lower(), flag)}
    return row


def _entries(name: str, content: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each question's place for messages, context and JSON object."""
    for article_number, article in enumerate(_list(name, content, "data"), 1):
        title = article.get("title") if isinstance(article, dict) else None
        at_article = f"{name}, article {article_number}" + (f" ({title!r})" if title else "")
        for number, paragraph in enumerate(_list(at_article, article, "paragraphs"), 1):
            place = f"{at_article}, paragraph {number}"
            entries = _list(place, paragraph, "qas")
            context = _text(place, paragraph, "context")
            for entry in entries:
                if not isinstance(entry, dict):
                    raise UserError(f"{place}: the question {entry!r} is not a JSON object: give a SQuAD file")
                yield f"{place}, question {entry.get('id')!r}", context, entry


def _question(
    place: str, identifier: str, context: str, entry: dict[str, Any], answers: list[tuple[str, int]]
) -> Question:
    texts = tuple(text for text, _ in answers)
    start = answers[0][1] if answers else None
    others = without(entry, "id", "question", "context")
    return Question(place, identifier, _text(place, entry, "question"), context, texts, start, others=others)


def _answers(place: str, context: str, entry: dict[str, Any], given: Any, may_be_none: bool) -> list[tuple[str, int]]:
    """The answers' texts and starts; empty if the context does not answer the question."""
    if not isinstance(given, list):
        raise UserError(f"{place}: 'answers' is {given!r}, not a list: give a file in SQuAD's format")
    if given and entry.get("is_impossible"):
        raise UserError(f"{place} has answers and is_impossible: remove one of them")
    if not given and not (entry.get("is_impossible") or may_be_none):
        raise UserError(f'{place} has no answers: give one, or set "is_impossible": true')
    answers = []
    for answer in given:
        text, start = _text(place, answer, "text"), answer.get("answer_start")
        if not isinstance(start, int) or isinstance(start, bool):
            raise UserError(f"{place}: an answer_start is {start!r}, not a whole number: fix it")
        if start < 0 or start + len(text) > len(context):
            raise UserError(
                f"{place}: the answer {text!r} at answer_start {start} reaches beyond its context of {len(context)} "
                "characters: fix or remove it"
            )
        if context[start : start + len(text)] != text:
            raise UserError(
                f"{place}: the answer {text!r} is not at answer_start {start}, which has "
                f"{context[start : start + len(text)]!r}: fix or remove it"
            )
        answers.append((text, start))
    return answers


def _checked(name: str, questions: list[Question], may_be_unanswerable: bool) -> list[Question]:
    """The questions, marked with their file's kind.

    Raises:
        UserError: there are none, or two have the same id.
    """
    if not questions:
        raise UserError(f"{name!r} has no questions: choose a file that has some")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{question.place}: the id {question.id!r} occurs twice in the file: give each its own")
        seen.add(question.id)
    return [replace(question, may_be_unanswerable=may_be_unanswerable) for question in questions]


def _identifier(place: str, value: Any) -> str:
    if not isinstance(value, str | int):
        raise UserError(f"{place}: the 'id' is {value!r}, not a text: give each question its own")
    return str(value)


def _list(place: str, parent: Any, key: str) -> list[Any]:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, list):
        raise UserError(f"{place} has no list {key!r}: give a file in SQuAD's format (data, paragraphs, qas, answers)")
    return value


def _text(place: str, parent: Any, key: str) -> str:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key!r} is {value!r}, not a text: fix or remove it")
    return value
