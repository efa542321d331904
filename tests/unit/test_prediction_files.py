"""Predictions as programs and GLUE's board read them."""

import csv
import datetime
import json
import logging
import math

import numpy as np
import orjson
import pandas
import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.classification import Classification, Regression
from ds_roberta.finetuning.labelled_tables import Columns
from ds_roberta.finetuning.multi_label import MultiLabelClassification, MultiLabelOptions
from ds_roberta.finetuning.prediction_files import (
    BOARDS,
    check_board,
    check_output,
    with_other_columns,
    write_predictions,
)
from ds_roberta.finetuning.task import Encoded
from ds_roberta.inputs.tables import read_table

LOGITS = np.array([[2.0, 1.0], [0.0, 3.0]])


def predicted(tmp_path, names=("no", "yes")):
    path = tmp_path / "input.csv"
    path.write_text('index,id,sentence,label\n7,x-1,"a, b",no\n3,x-2,c,no\n')
    task = Classification(list(names), Columns())
    inputs = task.read_inputs(str(path))
    answers = task.answer(Encoded(inputs, []), LOGITS)
    return with_other_columns([task.other_columns(given) for given in inputs], [answer.row for answer in answers])


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


def test_no_column_of_the_input_is_lost(tmp_path):
    others = [{"label": "gold", "input_label": "b"}, {"label": "gold", "text": "c"}]
    rows = with_other_columns(others, [{"label": "x"}, {"label": "y", "text": "z"}])
    assert rows == [
        {"input_input_label": "gold", "input_label": "b", "label": "x"},
        {"input_input_label": "gold", "input_text": "c", "label": "y", "text": "z"},
    ]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv"])
def test_line_ends_within_cells_stay_there(tmp_path, name):
    texts = ["a\rb", "\r", "a\r\nb", "a\nb", 'a "b"', "a\tb, c", "\rb", "b\r"]
    write_predictions(tmp_path / name, [{"text": text, "label": "x"} for text in texts])
    expected = [{"text": text, "label": "x"} for text in texts]
    delimiter = "\t" if name.endswith(".tsv") else ","
    assert pandas.read_csv(tmp_path / name, sep=delimiter).to_dict("records") == expected
    assert read_table(tmp_path / name).rows == expected
    assert (tmp_path / name).read_bytes().startswith(f"text{delimiter}label\n".encode())


def test_json_is_valid_whatever_the_other_columns_hold(tmp_path):
    day = datetime.date(2020, 1, 2)
    row = {
        "a": math.nan,
        "b": [1.5, {"c": -math.inf}],
        "text": "é".encode(),
        "raw": b"\xff\x00",
        "in": [b"x"],
        "d": day,
    }
    write_predictions(tmp_path / "out.jsonl", [row])
    found = orjson.loads((tmp_path / "out.jsonl").read_bytes())
    assert found == {"a": None, "b": [1.5, {"c": None}], "text": "é", "raw": "/wA=", "in": ["x"], "d": "2020-01-02"}
    write_predictions(tmp_path / "out.csv", [row])
    (cells,) = read_table(tmp_path / "out.csv").rows
    assert (cells["text"], cells["raw"], cells["in"]) == ("é", "/wA=", '["x"]')
    assert orjson.loads(cells["b"]) == [1.5, {"c": None}]


@pytest.mark.parametrize(
    ("glue_task", "task", "message"),
    [
        ("SST-2", Classification(["bad", "good"], Columns()), "SST-2 does not know the label 'bad'"),
        ("CoLA", Classification(["0", "1", "2"], Columns()), "CoLA does not know the label '2'"),
        ("STS-B", Classification(["0", "1"], Columns()), "STS-B needs a model of --task regression"),
        ("RTE", Regression(Columns()), "RTE needs a model of --task classification"),
        ("RTE", MultiLabelClassification(["0", "1"], MultiLabelOptions(), 0.5), "RTE needs a model of --task class"),
    ],
)
def test_a_model_that_does_not_fit_the_board_is_refused(glue_task, task, message):
    with pytest.raises(UserError, match=message):
        check_board(glue_task, task.head)


def test_a_model_that_fits_the_board_is_not_refused():
    check_board("STS-B", Regression(Columns()).head)
    for names in (("0", "1"), ("not_entailment", "entailment")):
        check_board("RTE", Classification(list(names), Columns()).head)


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
