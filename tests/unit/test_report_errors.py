"""Errors of fine-tunings as HTML."""

import json
from html.parser import HTMLParser

import pytest

from ds_roberta.errors import UserError
from ds_roberta.report.error_analysis import LARGEST_MATRIX, SHOWN_ROWS, as_html, read_error_analysis

HOSTILE = "<script>alert('x')</script><b>&\""


class Page(HTMLParser):
    """The rows of a page's tables as lists of texts, its tags, and its text."""

    def __init__(self, parts):
        super().__init__()
        self.rows, self.tags, self.text = [], set(), ""
        self.feed("".join(parts))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


@pytest.fixture
def show(tmp_path):
    """A function that writes an analysis, reads it and returns its page."""

    def written(content):
        path = tmp_path / "error_analysis.json"
        path.write_text(json.dumps(content))
        return Page(as_html(read_error_analysis(path)))

    return written


def test_few_labels_are_a_matrix_with_a_row_for_each_gold_label(show):
    page = show(
        {"unit": "words", "labels": ["O", "PER"], "confusion": {"O": {"O": 1234}, "PER": {"O": 2}}, "worst": []}
    )
    assert page.rows == [["", "O", "PER", "all"], ["O", "1,234", "0", "1,234"], ["PER", "2", "0", "2"]]
    assert "Confusion of words" in page.text


def test_many_labels_are_the_pairs_that_are_confused_most(show):
    labels = [f"intent {number}" for number in range(77)]
    counts = {label: {label: 100, labels[(number + 1) % 77]: 1 + number} for number, label in enumerate(labels)}
    page = show({"unit": "examples", "labels": labels, "confusion": counts, "worst": []})
    assert len(page.rows) == 1 + SHOWN_ROWS
    assert page.rows[1] == ["intent 76", "intent 0", "77", f"{77 / 177:.1%}"]
    assert page.rows[-1][:3] == [f"intent {77 - SHOWN_ROWS}", f"intent {78 - SHOWN_ROWS}", str(78 - SHOWN_ROWS)]
    assert f"of 77 labels: {sum(range(48, 78)):,} of {sum(range(78)):,} errors" in page.text
    assert len(show({"labels": labels[:LARGEST_MATRIX], "confusion": counts, "worst": []}).rows) == 1 + LARGEST_MATRIX


def test_several_labels_are_counts_and_those_with_the_most_errors_come_first(show):
    kinds = ("true_positives", "false_positives", "false_negatives")
    counts = {"joy": dict(zip(kinds, (5, 1, 0), strict=True)), "anger": dict(zip(kinds, (2, 3, 4), strict=True))}
    page = show({"unit": "examples", "labels": ["joy", "anger"], "label_counts": counts, "worst": []})
    assert page.rows == [["label", "TP", "FP", "FN"], ["anger", "2", "3", "4"], ["joy", "5", "1", "0"]]


def test_the_worst_examples_have_the_columns_that_the_task_gives(show):
    regression = {"place": "dev, row 1", "text": "a", "gold": "2", "predicted": "5", "loss": 9.0}
    page = show({"worst": [regression]})
    assert page.rows == [["loss", "gold", "predicted", "text", "place"], ["9.0000", "2", "5", "a", "dev, row 1"]]
    page = show({"worst": [regression | {"gold_probability": 0.125, "predicted_probability": 0.5}]})
    assert page.rows[1] == ["9.0000", "2", "0.1250", "5", "0.5000", "a", "dev, row 1"]


def test_texts_and_labels_are_never_markup(show):
    example = dict.fromkeys(("place", "text", "gold", "predicted"), HOSTILE) | {"loss": 1.0}
    long_label = HOSTILE * 3
    confusion = {HOSTILE: {HOSTILE: 1, long_label: 2}, long_label: {HOSTILE: 3}}
    content = {"unit": HOSTILE, "labels": [HOSTILE, long_label], "confusion": confusion, "worst": [example]}
    kinds = {"true_positives": 1, "false_positives": 1, "false_negatives": 1}
    for each in (content, content | {"labels": [HOSTILE] * 30}, {"label_counts": {HOSTILE: kinds}, "worst": [example]}):
        page = show(each)
        assert not {"script", "b"} & page.tags
        assert page.rows[-1] == ["1.0000", *[HOSTILE] * 4]


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"worst": [1]},
        {"worst": [], "confusion": {"a": 3}},
        {"worst": [], "confusion": {"a": {"a": float("inf")}}},
        {"worst": [], "confusion": {"a": {"a": 10**400}}},
        {"worst": [], "confusion": {"a": {"a": -1}}},
        {"worst": [], "label_counts": {"a": {"TP": 1}}},
    ],
)
def test_a_file_of_another_form_is_named(show, content):
    with pytest.raises(UserError, match=r"error_analysis\.json' is not as launch/finetune\.py writes it"):
        show(content)
