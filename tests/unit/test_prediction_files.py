"""Predictions as programs and GLUE's board read them."""

import csv
import json
import logging

import numpy as np
import pandas
import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.classification import Classification, Regression
from ds_roberta.finetuning.labelled_tables import Columns
from ds_roberta.finetuning.prediction_files import BOARDS, check_output, with_other_columns, write_predictions
from ds_roberta.finetuning.task import Encoded

LOGITS = np.array([[2.0, 1.0], [0.0, 3.0]])


def predicted(tmp_path, names=("no", "yes")):
    path = tmp_path / "input.csv"
    path.write_text('index,id,sentence,label\n7,x-1,"a, b",no\n3,x-2,c,no\n')
    task = Classification(list(names), Columns())
    inputs = task.read_inputs(str(path))
    answers = task.answer(Encoded(inputs, []), LOGITS)
    return [
        with_other_columns(task.other_columns(given), each.row) for given, each in zip(inputs, answers, strict=True)
    ]


def test_other_columns_stay_and_the_gold_label_is_not_the_prediction(tmp_path):
    rows = predicted(tmp_path)
    assert [list(row) for row in rows] == [["index", "id", "input_label", "text", "label", "score", "scores"]] * 2
    assert [(row["id"], row["input_label"], row["label"]) for row in rows] == [
        ("x-1", "no", "no"),
        ("x-2", "no", "yes"),
    ]


def test_csv_holds_what_json_lines_hold(tmp_path):
    rows = predicted(tmp_path)
    for name in ("out.jsonl", "out.csv"):
        write_predictions(tmp_path / name, rows)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    found = pandas.read_csv(tmp_path / "out.csv", dtype={"index": str}, converters={"scores": json.loads})
    assert found.to_dict("records") == rows


@pytest.mark.parametrize(
    ("glue_task", "names", "expected"),
    [
        ("CoLA", ("unacceptable", "acceptable"), ["0", "1"]),
        ("CoLA", ("0", "1"), ["0", "1"]),
        ("RTE", ("0", "1"), ["entailment", "not_entailment"]),
        ("QNLI", ("entailment", "not_entailment"), ["entailment", "not_entailment"]),
        ("WNLI", ("not_entailment", "entailment"), ["0", "1"]),
        ("MNLI-mm", ("contradiction", "neutral"), ["contradiction", "neutral"]),
    ],
)
def test_the_board_gets_its_own_names(tmp_path, caplog, glue_task, names, expected):
    caplog.set_level(logging.WARNING)
    path = tmp_path / f"{glue_task}.tsv"
    write_predictions(path, predicted(tmp_path, names), glue_task)
    with path.open(newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == [
            ["index", "prediction"],
            ["7", expected[0]],
            ["3", expected[1]],
        ]
    assert f"expects {BOARDS[glue_task].examples:,} predictions for {glue_task}, not 2" in caplog.text


def test_the_board_gets_numbers_within_its_range(tmp_path):
    (tmp_path / "input.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n' * 3)
    task = Regression(Columns())
    inputs = task.read_inputs(str(tmp_path / "input.jsonl"))
    rows = [answer.row for answer in task.answer(Encoded(inputs, []), [[-0.5], [2.34567], [5.5]])]
    write_predictions(tmp_path / "STS-B.tsv", rows, "STS-B")
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"


def test_what_the_board_does_not_know_is_refused(tmp_path):
    for names, glue_task, message in [
        (("good", "bad"), "SST-2", "does not know the label 'good': its labels are negative, positive"),
        (("0", "1"), "STS-B", "needs numbers: predict with a model of --task regression"),
    ]:
        with pytest.raises(UserError, match=message):
            write_predictions(tmp_path / "out.tsv", predicted(tmp_path, names), glue_task)
    assert not (tmp_path / "out.tsv").exists()


@pytest.mark.parametrize(
    ("name", "glue_task", "message"),
    [
        ("out.txt", None, "does not end in .jsonl, .csv, .tsv"),
        ("out.tsv", None, "needs --glue_task"),
        ("out.csv", "RTE", "which needs .tsv"),
    ],
)
def test_the_format_is_checked_before_any_work(tmp_path, name, glue_task, message):
    with pytest.raises(UserError, match=message):
        check_output(tmp_path / name, None, glue_task)
