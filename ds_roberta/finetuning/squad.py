"""Questions with their contexts and answers, from SQuAD's JSON, versions 1.1 and 2.0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        id: as in the file; unique in it.
        answers: the gold answers' texts; empty where the context has no answer, or where the file says none.
        start: where the first answer begins in `context`, in characters; None where there is none.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    start: int | None = None


def read_squad(path: Path, *, labelled: bool = True) -> list[Question]:
    """
    Args:
        labelled: whether each question must have an answer or be marked as impossible. If not, answers are passed over.

    Raises:
        UserError: the file cannot be read, is not of SQuAD's form, has no question or one id twice, or answers do not
            stand at their `answer_start`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}): give another file") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}): give a file in SQuAD's format") from error
    return parse_squad(str(path), content, labelled=labelled)


def parse_squad(name: str, content: Any, *, labelled: bool = True) -> list[Question]:
    """The questions of a SQuAD file's parsed content; `name` is the file's, for messages. See `read_squad`."""
    questions: dict[str, Question] = {}
    misplaced: list[str] = []
    for place, context, entry in _entries(name, content):
        place = f"{place}, question {entry.get('id')!r}"
        question = _question(place, context, entry)
        if question.id in questions:
            raise UserError(f"{place}: the id stands in the file twice: give each question its own")
        if labelled:
            answers = _answers(place, entry)
            misplaced += [
                f"{place}: {text!r} does not stand at answer_start {start}, but "
                f"{context[max(start, 0) : max(start, 0) + len(text)]!r}"
                for text, start in answers
                if start < 0 or context[start : start + len(text)] != text
            ]
            if answers:
                question = Question(
                    question.id, question.question, context, tuple(text for text, _ in answers), answers[0][1]
                )
        questions[question.id] = question
    if misplaced:
        more = f" ({len(misplaced)} answers are so, this is the first)" if len(misplaced) > 1 else ""
        raise UserError(f"{misplaced[0]}: mend or remove it{more}")
    if not questions:
        raise UserError(f"{name!r} has no questions: give a file in SQuAD's format")
    return list(questions.values())


def _entries(name: str, content: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each question's place in words, context and JSON object."""
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
                yield place, context, entry


def _question(place: str, context: str, entry: dict[str, Any]) -> Question:
    identifier = entry.get("id")
    if not isinstance(identifier, str | int):
        raise UserError(f"{place}: the 'id' is {identifier!r}, not a text: give each question its own")
    return Question(str(identifier), _text(place, entry, "question"), context)


def _answers(place: str, entry: dict[str, Any]) -> list[tuple[str, int]]:
    """Texts and starts; empty where the question is marked as impossible."""
    if entry.get("is_impossible"):
        return []
    answers = [(_text(place, answer, "text"), answer.get("answer_start")) for answer in _list(place, entry, "answers")]
    if not answers:
        raise UserError(f'{place} has no answers: give one, or say "is_impossible": true')
    for _, start in answers:
        if not isinstance(start, int):
            raise UserError(f"{place}: an answer_start is {start!r}, not a whole number: mend it")
    return answers


def _list(place: str, parent: Any, key: str) -> list[Any]:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, list):
        raise UserError(f"{place} has no list {key!r}: give a file in SQuAD's format (data, paragraphs, qas, answers)")
    return value


def _text(place: str, parent: Any, key: str) -> str:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key!r} is {value!r}, not a text: mend or remove it")
    return value
