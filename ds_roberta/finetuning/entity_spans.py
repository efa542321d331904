"""Entities as spans of characters, as annotation tools export them: texts become words with tags.

A row has a text and a list of its spans, as in doccano's JSON lines and Label Studio's JSON-MIN. The tasks of Label
Studio's JSON are made such rows first, one for each annotation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.finetuning.labelled_tables import Columns, find_texts
from ds_roberta.finetuning.tagged_sentences import Sentence, check_tags, split_text
from ds_roberta.inputs.tables import Table
from ds_roberta.process import logger

SPAN_COLUMNS = ("label", "labels", "entities")  # where no row has a span, by which to find their column
STARTS, ENDS, TYPES = ("start", "start_offset"), ("end", "end_offset"), ("label", "labels")
TEXT, RELATIONS = "text", "relations"
TASK = "data"  # Label Studio's key for what is labelled
ANNOTATION_ID = "annotation_id"  # in every row of JSON-MIN; None: the task is not annotated
LABELS = "labels"  # Label Studio's type of results that are spans of a text
LAST_OF_UTF_16 = "\uffff"  # later characters have two units


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text.

    Attributes:
        text: the characters as the file repeats them; None if it does not.
    """

    start: int
    end: int
    type: str
    text: str | None = None

    def __str__(self) -> str:
        return f"the span {self.start} to {self.end} ({self.type})"


def is_unannotated(table: Table, columns: Columns) -> bool:
    """Whether no row has a list of spans, not even an empty one, or nobody annotated a task of Label Studio."""
    if any(isinstance(row.get(TASK), dict) for row in table.rows):
        return not any(row.get("annotations") for row in table.rows)
    if ANNOTATION_ID in table.columns:
        return all(row.get(ANNOTATION_ID) is None for row in table.rows)
    usual = SPAN_COLUMNS if columns.label_column is None else (columns.label_column,)
    return not has_spans(table, columns) and all(row.get(name) is None for row in table.rows for name in usual)


def has_spans(table: Table, columns: Columns) -> bool:
    """Whether a column has lists of spans.

    Raises:
        UserError: several have, and none is chosen.
    """
    return _span_column(table, columns) is not None


def span_sentences(table: Table, columns: Columns) -> list[Sentence]:
    """The words of each row's text, with tags that mark its spans; see `split_text`. White space at the ends of a span
    is cut off. What is changed or left out is logged.

    Raises:
        UserError: a row has no text or no spans; a span is empty, leaves the text, overlaps another, has not exactly
            one label, or has another text than the file repeats; or as `check_tags`.
    """
    column = _span_column(table, columns)
    assert column is not None
    if columns.text_column is None and TEXT in table.columns:
        columns = replace(columns, text_column=TEXT)
    counts = Counter[str]()
    sentences = []
    for text, row in zip(find_texts(table, columns), table.rows, strict=True):
        value = row.get(column)
        if ANNOTATION_ID in table.columns and row.get(ANNOTATION_ID) is None:
            counts["rows that nobody annotated are left out"] += 1
            continue
        if value is None and ANNOTATION_ID in table.columns:
            value = []  # JSON-MIN leaves out the key
        if not isinstance(value, list):
            raise UserError(f"{text.place}: {column!r} is {value!r}, not a list of spans: write [] if there are none")
        relations = row.get(RELATIONS)
        counts["relations are left out"] += len(relations) if isinstance(relations, list) else 0
        sentences.append(_sentence(text.place, text.text, [_span(text.place, item) for item in value], counts))
    _report(table, counts)
    if not sentences:
        raise UserError(f"no row of {table.name!r} is annotated: annotate some, or choose another file")
    check_tags((sentence.place, tag) for sentence in sentences for tag in sentence.tags)
    return sentences


def _sentence(place: str, text: str, spans: list[Span], counts: Counter[str]) -> Sentence:
    trimmed = [_trimmed(place, text, span) for span in spans]
    words = split_text(place, text).offsets
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    counts["spans began or ended with white space, which is cut off"] += sum(map(Span.__ne__, spans, trimmed))
    counts["spans begin or end inside a word, which is split there"] += sum(
        span.start not in starts or span.end not in ends for span in trimmed
    )
    trimmed.sort(key=lambda span: span.start)
    for span, following in pairwise(trimmed):
        if following.start < span.end:
            raise UserError(f"{place}: {span} overlaps {following}, but a word has one tag: remove one of them")
    return split_text(place, text, [(span.start, span.end, span.type) for span in trimmed])


def without_tasks(table: Table, columns: Columns, *, labelled: bool = True) -> tuple[Table, Columns]:
    """Label Studio's JSON as rows like those of its JSON-MIN: the task's data, and the spans of each group of labels in
    a column of its name. There is a row for each annotation that was not skipped; where some are marked as ground
    truth, only for them. Another table, and its columns, stay as they are.

    Args:
        labelled: if not, there is a row for each task, without spans.

    Returns:
        the rows, and the columns with the text that is labelled.

    Raises:
        UserError: a task is broken; it is not clear which of its texts is labelled; or no task is annotated.
    """
    if not any(isinstance(row.get(TASK), dict) for row in table.rows):
        return table, columns
    annotations = [_annotations(table.place(index), row) for index, row in enumerate(table.rows)]
    spans = [span for of_task in annotations for annotation in of_task for span in _results(annotation)]
    groups = list(dict.fromkeys(str(span.get("from_name")) for span in spans)) or [columns.label_column or LABELS]
    if columns.label_column is not None and columns.label_column not in groups:
        raise UserError(
            f"{table.name} has no labels {columns.label_column!r}: give one of {', '.join(map(repr, groups))} as "
            "--label_column"
        )
    chosen = [span for span in spans if columns.label_column in (None, span.get("from_name"))]
    shown = list(dict.fromkeys(str(span.get("to_name")) for span in chosen))
    text = _labelled_text(table, shown, columns.text_column)
    part = text if len(shown) > 1 else None
    columns = replace(columns, text_column=text)
    counts = Counter[str]()
    rows, numbers = list[dict[str, Any]](), []
    for number, row, of_task in zip(table.numbers, table.rows, annotations, strict=True):
        task = {"id": row.get("id"), **row[TASK]}
        of_rows = [task]
        if labelled:
            of_rows = [task | _grouped(each, groups, part, counts) for each in _chosen(of_task, counts)]
        rows += of_rows
        numbers += [number] * len(of_rows)
    _report(table, counts)
    if not rows:
        raise UserError(f"no task of {table.name!r} is annotated: annotate some, or choose another file")
    names = dict.fromkeys(name for row in rows for name in row)
    return replace(table, columns=tuple(names), rows=rows, numbers=numbers), columns


def _span_column(table: Table, columns: Columns) -> str | None:
    candidates = table.columns if columns.label_column is None else (columns.label_column,)
    usual = SPAN_COLUMNS if columns.label_column is None else candidates
    found = [name for name in candidates if any(_are_spans(row.get(name)) for row in table.rows)]
    if len(found) > 1:
        raise UserError(
            f"{table.name} has spans in the columns {', '.join(map(repr, found))}: give one of them as --label_column"
        )
    unlabelled = [name for name in usual if any(_lack_labels(row.get(name)) for row in table.rows)]
    empty = [name for name in usual if all(row.get(name) == [] for row in table.rows)]
    return next(iter(found + unlabelled + empty), None)


def _are_spans(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    return _first(first, STARTS) is not None if isinstance(first, dict) else isinstance(first, list) and len(first) == 3


def _lack_labels(value: Any) -> bool:
    """Whether the first of a list of spans has a start and an end, but no label."""
    return isinstance(value, list) and bool(value) and _is_pair(value[0])


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(type(number) is int for number in item)


def _first(values: dict[str, Any], keys: Iterable[str]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _span(place: str, item: Any) -> Span:
    """A span from [start, end, type], or from an object with the keys of Label Studio or doccano."""
    if isinstance(item, dict):
        start, end, type_ = (_first(item, keys) for keys in (STARTS, ENDS, TYPES))
        text = item.get(TEXT)
    else:
        start, end, type_ = item if isinstance(item, list) and len(item) == 3 else (None, None, None)
        text = None
    if isinstance(type_, list):
        if len(type_) != 1:
            raise UserError(f"{place}: the span {start} to {end} has {len(type_)} labels: give it one")
        (type_,) = type_
    if _is_pair(item):
        raise UserError(f"{place}: the span {item!r} has no label: write it as [{item[0]}, {item[1]}, label]")
    if type(start) is not int or type(end) is not int or not isinstance(type_, str) or not type_.strip():
        raise UserError(
            f"{place}: the span {item!r} is neither [start, end, label] nor an object with these: fix or remove it"
        )
    return Span(start, end, type_, text if isinstance(text, str) else None)


def _trimmed(place: str, text: str, span: Span) -> Span:
    """The span without white space at its ends, checked against the text."""
    if not 0 <= span.start <= len(text) or span.end > len(text):
        raise UserError(f"{place}: {span} leaves the text of {len(text)} characters: fix or remove it")
    covered = text[span.start : span.end]
    if not covered.strip():
        raise UserError(f"{place}: {span} is empty: fix or remove it")
    if span.text is not None and _as_shown(span.text) != _as_shown(covered):
        units = (
            ", perhaps because some characters, such as emoji, were counted twice"
            if any(character > LAST_OF_UTF_16 for character in text)
            else ""
        )
        raise UserError(f"{place}: {span} is {covered!r} in the text but {span.text!r} in the file{units}: fix it")
    start = span.end - len(covered.lstrip())
    return replace(span, start=start, end=start + len(covered.strip()))


def _as_shown(text: str) -> str:
    r"""Label Studio repeats a span as the browser shows it: white space may be collapsed, and line breaks are \n."""
    return " ".join(text.replace("\\n", " ").split())


def _annotations(place: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    annotations = row.get("annotations") or []
    if not isinstance(row.get(TASK), dict) or not isinstance(annotations, list):
        raise UserError(f"{place} is not a task with {TASK!r} and 'annotations': fix or remove it")
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) else None
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise UserError(f"{place} has the annotation {annotation!r} without 'result': export it again as JSON")
    return annotations


def _chosen(annotations: list[dict[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
    """The annotations of a task that are examples."""
    finished = [annotation for annotation in annotations if not annotation.get("was_cancelled")]
    true = [annotation for annotation in finished if annotation.get("ground_truth")]
    chosen = true or finished
    counts["annotations were skipped and are left out"] += len(annotations) - len(finished)
    counts["annotations are left out because another is the ground truth"] += len(finished) - len(chosen)
    counts["tasks have no annotation, or only skipped ones, and are left out"] += not chosen
    counts["tasks have several annotations, each of which is an example"] += len(chosen) > 1
    return chosen


def _results(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in annotation["result"] if result.get("type") == LABELS]


def _grouped(
    annotation: dict[str, Any], groups: list[str], part: str | None, counts: Counter[str]
) -> dict[str, list[Any]]:
    """The spans of each group of labels in an annotation, or only those in one part of the labelling page."""
    for result in annotation["result"]:
        counts[f"results of the type {result.get('type')!r} are left out"] += result.get("type") != LABELS
    results = [each for each in _results(annotation) if part in (None, each.get("to_name"))]
    counts["spans of another text are left out"] += len(_results(annotation)) - len(results)
    return {group: [each.get("value") for each in results if str(each.get("from_name")) == group] for group in groups}


def _labelled_text(table: Table, shown: list[str], given: str | None) -> str:
    """The key of the text that spans are of.

    Args:
        shown: the parts of the labelling page in which the spans are; a part often has the key's name.
        given: the key, if it was chosen.
    """
    keys = [key for key, value in table.rows[0][TASK].items() if isinstance(value, str)]
    if not keys:
        raise UserError(f"{table.place(0)} has no text in {TASK!r}: add the one that is labelled, or remove the task")
    likely = [given] if given is not None else [key for key in (*shown, TEXT) if key in keys] or keys
    is_clear = given is not None or likely[:1] == keys or likely[:1] in ([TEXT], shown)
    if not is_clear or (len(shown) > 1 and given not in shown):
        raise UserError(
            f"{table.name} has the texts {', '.join(map(repr, keys))}: give the one that is labelled as --text_column"
        )
    return likely[0]


def _report(table: Table, counts: Counter[str]) -> None:
    for what, count in counts.items():
        if count:
            logger.info(f"{table.name}: {what}: {count:,}")
