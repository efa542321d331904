"""What a fine-tuning's `error_analysis.json` says, as HTML: confusions or counts of labels, and the worst examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import read_json

ERROR_ANALYSIS = "error_analysis.json"
LARGEST_MATRIX = 20
"""The most labels whose confusion matrix is shown; of more labels, the pairs that are confused most."""
SHOWN_ROWS = 30
LONGEST_LABEL = 24
LARGEST_LEVEL = 8
"""The most labels whose names are horizontal above the columns of a matrix; with more they are vertical."""
MOST_COUNTED = 1 << 60
KINDS = {"true_positives": "TP", "false_positives": "FP", "false_negatives": "FN"}
COLUMNS = {
    "loss": "loss",
    "gold": "gold",
    "gold_probability": "its probability",
    "predicted": "predicted",
    "predicted_probability": "its probability",
    "text": "text",
    "place": "place",
}
"""The columns of the worst examples, by their keys."""

STYLE = """
table.matrix th, table.matrix td { min-width: 1.8rem; padding: .3rem .4rem; text-align: right; }
table.matrix th { white-space: nowrap; } table.matrix thead th { vertical-align: bottom; }
table.upright thead th { writing-mode: vertical-rl; text-align: left; }
table.matrix .right { outline: 1px solid var(--faint); outline-offset: -2px; }
table.worst th, table.worst td { min-width: 3.5rem; } table.worst td.text { min-width: 18rem; max-width: 30rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
summary { cursor: pointer; margin: 1rem 0 .3rem; }
"""


@dataclass(frozen=True)
class ErrorAnalysis:
    """The errors of one fine-tuned model on the validation examples.

    Attributes:
        unit: what is counted, such as words.
        labels: in order; empty for a regression.
        confusion: by gold label, how often each label is predicted; zeros may be left out.
        label_counts: the `KINDS` of each label, if several may apply.
        worst: the examples with the highest loss, the highest first, each with some of the keys of `COLUMNS`.
    """

    unit: str
    labels: tuple[str, ...]
    confusion: dict[str, dict[str, int]]
    label_counts: dict[str, dict[str, int]]
    worst: tuple[dict[str, str | float], ...]


def read_error_analysis(path: Path) -> ErrorAnalysis:
    """Read the file that fine-tuning wrote.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    content = read_json(path)
    try:
        confusion = {
            label: {name: _count(count) for name, count in counts.items()}
            for label, counts in content.get("confusion", {}).items()
        }
        label_counts = {
            label: {kind: _count(counts[kind]) for kind in KINDS}
            for label, counts in content.get("label_counts", {}).items()
        }
        worst = [
            {key: each[key] if isinstance(each[key], float) else str(each[key]) for key in COLUMNS if key in each}
            for each in content["worst"]
        ]
        unit, labels = str(content.get("unit", "")), tuple(map(str, content.get("labels", ())))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is not as launch/finetune.py writes it ({error!r}): remove it or fine-tune again"
        ) from error
    return ErrorAnalysis(unit, labels, confusion, label_counts, tuple(worst))


def _count(value: Any) -> int:
    if not 0 <= (count := int(value)) <= MOST_COUNTED:
        raise ValueError(f"a count is {value!r}")
    return count


def as_html(analysis: ErrorAnalysis) -> list[str]:
    """The parts of the page, without a heading."""
    parts = []
    if analysis.confusion:
        is_large = len(analysis.labels) > LARGEST_MATRIX
        parts.append(_most_confused(analysis) if is_large else _matrix(analysis))
    if analysis.label_counts:
        parts.append(_label_counts(analysis))
    if analysis.worst:
        parts.append(_worst(analysis.worst))
    return parts


def _matrix(analysis: ErrorAnalysis) -> str:
    head = "".join(f'<th scope="col">{_label(label)}</th>' for label in analysis.labels)
    rows = []
    for gold in analysis.labels:
        counts = analysis.confusion.get(gold, {})
        total = sum(counts.values())
        cells = [
            f'<td class="{"right" if gold == label else "wrong"}" '
            f'style="background: rgb(0 114 178 / {0.6 * count / max(total, 1):.2f})">{count:,}</td>'
            for label in analysis.labels
            for count in [counts.get(label, 0)]
        ]
        rows.append(f'<tr><th scope="row">{_label(gold)}</th>{"".join(cells)}<td>{total:,}</td></tr>')
    caption = f"Confusion of {escape(analysis.unit)}: a row for each gold label, a column for each predicted one."
    kind = "matrix" if len(analysis.labels) <= LARGEST_LEVEL else "matrix upright"
    return _table(kind, caption, f'<td></td>{head}<th scope="col">all</th>', rows)


def _most_confused(analysis: ErrorAnalysis) -> str:
    totals = {gold: sum(counts.values()) for gold, counts in analysis.confusion.items()}
    wrong = [
        (count, gold, predicted)
        for gold, counts in analysis.confusion.items()
        for predicted, count in counts.items()
        if gold != predicted and count
    ]
    shown = sorted(wrong, key=lambda pair: -pair[0])[:SHOWN_ROWS]
    rows = [
        _row([(gold, "label"), (predicted, "label"), (f"{count:,}", ""), (f"{count / totals[gold]:.1%}", "")])
        for count, gold, predicted in shown
    ]
    errors, of_shown = (sum(count for count, _, _ in pairs) for pairs in (wrong, shown))
    caption = (
        f"The most confused of {len(analysis.labels)} labels: {of_shown:,} of {errors:,} errors among "
        f"{sum(totals.values()):,} {escape(analysis.unit)}."
    )
    return _table("pairs", caption, _head(("gold", "predicted", analysis.unit, "share of the gold label")), rows)


def _label_counts(analysis: ErrorAnalysis) -> str:
    def errors(counts: dict[str, int]) -> int:
        return counts["false_positives"] + counts["false_negatives"]

    ordered = sorted(analysis.label_counts.items(), key=lambda item: -errors(item[1]))
    rows = [
        _row([(label, "label"), *((f"{counts[kind]:,}", "") for kind in KINDS)])
        for label, counts in ordered[: max(SHOWN_ROWS, LARGEST_MATRIX)]
    ]
    left_out = f"; the {len(rows)} of {len(ordered)} labels with the most errors" if len(rows) < len(ordered) else ""
    caption = f"True positives, false positives and false negatives of each label{left_out}."
    return _table("counts", caption, _head(("label", *KINDS.values())), rows)


def _worst(worst: Sequence[dict[str, Any]]) -> str:
    keys = [key for key in COLUMNS if any(key in each for each in worst)]
    rows = [_row([(_number(each.get(key, "")), key) for key in keys]) for each in worst]
    table = _table("worst", "", _head(COLUMNS[key] for key in keys), rows)
    return f"<details><summary>The {len(worst)} examples with the highest loss</summary>{table}</details>"


def _table(kind: str, caption: str, head: str, rows: Iterable[str]) -> str:
    described = f"<caption>{caption}</caption>" if caption else ""
    body = "\n".join(rows)
    return (
        f'<div class="table"><table class="{kind}">{described}<thead><tr>{head}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div>"
    )


def _head(names: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)


def _row(cells: Iterable[tuple[str, str]]) -> str:
    """A table row of texts with their classes; a text may be in a script that is written from right to left."""
    data = "".join(f'<td class="{kind}" dir="auto">{escape(text)}</td>' for text, kind in cells)
    return f"<tr>{data}</tr>"


def _label(label: str) -> str:
    if len(label) <= LONGEST_LABEL:
        return escape(label)
    return f'<span title="{escape(label)}">{escape(label[: LONGEST_LABEL - 1])}…</span>'


def _number(value: str | float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else value
