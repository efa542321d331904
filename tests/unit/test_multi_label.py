"""Several labels for a text: three ways to write them, the metrics, the threshold, and the loss."""

import json
import re

import numpy as np
import pandas
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score

from ds_roberta.errors import UserError
from ds_roberta.finetuning.labelled_tables import Text
from ds_roberta.finetuning.multi_label import (
    MultiLabelClassification,
    MultiLabelOptions,
    best_threshold,
    multi_label_metrics,
    probabilities,
)
from ds_roberta.finetuning.task import Encoded

SETS = [["joy"], [], ["anger", "joy"], ["fear"]]
EXPECTED = [(0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0)]
NAMES = ["anger", "fear", "joy"]


def write(folder, rows, suffix=".jsonl"):
    for split in ("train", "dev"):
        if suffix == ".jsonl":
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            lines = ["\t".join(map(str, row.values())) for row in rows]
            (folder / f"{split}.tsv").write_text("\n".join(["\t".join(rows[0]), *lines]) + "\n")
    return (str(folder),)


def rows(**columns):
    return [{"text": f"text {n}", **{name: values[n] for name, values in columns.items()}} for n in range(len(SETS))]


LISTS = rows(label=SETS)
TEXTS = rows(label=[", ".join(labels) for labels in SETS])
COLUMNS = rows(**{name: [int(name in labels) for labels in SETS] for name in NAMES})


@pytest.mark.parametrize(
    ("content", "suffix", "options"),
    [
        (LISTS, ".jsonl", {}),
        (rows(labels=SETS), ".jsonl", {}),
        (rows(x=[{"choices": labels} for labels in SETS]), ".jsonl", {"label_column": "x"}),
        (rows(x=[json.dumps({"choices": labels}) for labels in SETS]), ".tsv", {"label_column": "x"}),
        (TEXTS, ".jsonl", {}),
        (TEXTS, ".tsv", {}),
        (COLUMNS, ".jsonl", {"label_columns": "anger,fear,joy"}),
        (COLUMNS, ".tsv", {"label_columns": "anger,fear,joy"}),
    ],
)
def test_labels_are_lists_or_texts_or_columns(tmp_path, content, suffix, options):
    task, splits = MultiLabelClassification.from_data(write(tmp_path, content, suffix), MultiLabelOptions(**options))
    assert task.names == NAMES
    assert splits["train"] == [Text("", f"text {n}", None, labels) for n, labels in enumerate(EXPECTED)]
    assert task.head["problem_type"] == "multi_label_classification"


def test_rows_without_labels_are_left_out_and_numbers_are_labels(tmp_path):
    data = write(tmp_path, rows(label=[[1, 2.0], None, "-", ["2"]]))
    task, splits = MultiLabelClassification.from_data(data, MultiLabelOptions())
    assert (task.names, [text.label for text in splits["train"]]) == (["1", "2"], [(1.0, 1.0), (0.0, 1.0)])
    data = write(tmp_path, rows(a=[1, -1, 0, 1], b=[0, -1, 1, ""]))
    hidden = MultiLabelOptions(label_columns="a,b", ignore_label="-1")
    assert [text.label for text in MultiLabelClassification.from_data(data, hidden)[1]["train"]] == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (rows(label=[["a", "a"], [], [], []]), {}, r".jsonl, row 1: 'label' has the label 'a' twice: fix the row$"),
        (
            rows(label=[[], [0, 1.0, 0], [], []]),
            {},
            "row 2: 'label' has the label '0' twice.*0 or 1.*as --label_columns",
        ),
        (rows(label=[["a"], [["b"]], [], []]), {}, r"row 2: 'label' is \[\['b'\]\], not a list of labels"),
        (rows(label=[{}, [], [], []]), {}, r"row 1: 'label' is \{\}, not a label"),
        (rows(label=[[], [], [], []]), {}, "no row of .*train.jsonl' has a label that applies"),
        (rows(a=[1, 0, 1, 0]), {}, "columns 'text', 'a': give .* as --label_column, or those .* as --label_columns"),
        (rows(a=[1, 2, 0, 0]), {"label_columns": "a"}, "row 2: 'a' is 2, not 0 or 1"),
        (rows(a=[1, 0, 0, 0]), {"label_columns": "a,b"}, "no column 'b': give one of 'text', 'a' as --label_columns"),
    ],
)
def test_what_is_wrong_is_reported_with_its_row(tmp_path, content, options, message):
    with pytest.raises(UserError, match=message):
        MultiLabelClassification.from_data(write(tmp_path, content), MultiLabelOptions(**options))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["a; b", "a", "b", ""], "'a; b' is taken"),
        (["a|b", "a", "b", ""], "'a[|]b' is taken"),
        (["a#z", "a", "", "c"], "'a#z' is taken"),
        (["a;b", "c", "", "d"], ""),
    ],
)
def test_a_label_of_labels_is_named(tmp_path, caplog, labels, named):
    MultiLabelClassification.from_data(write(tmp_path, rows(label=labels)), MultiLabelOptions())
    assert bool(re.search(named, caplog.text)) if named else not caplog.text


def test_a_label_without_training_is_refused(tmp_path):
    data = write(tmp_path, LISTS)
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": ["angr"]}\n')
    with pytest.raises(UserError, match=r"dev.jsonl, row 1: unknown label 'angr'; did you mean 'anger'\?; no training"):
        MultiLabelClassification.from_data(data, MultiLabelOptions())
    for options in (
        {"label_threshold": 0.3, "choose_label_threshold": True},
        {"label_column": "a", "label_columns": "b"},
    ):
        with pytest.raises(UserError, match="are both given: choose one"):
            MultiLabelOptions(**options)


def test_the_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    scores, applies = rng.random((60, 4)), rng.random((60, 4)) < 0.3
    applies[:, 3] = False  # a label that never applies
    for threshold in (0.2, 0.5, 0.9):
        predicted = scores > threshold
        assert multi_label_metrics(scores, applies, threshold) == {
            "micro_f1": f1_score(applies, predicted, average="micro", zero_division=0),
            "macro_f1": f1_score(applies, predicted, average="macro", zero_division=0),
            "accuracy": accuracy_score(applies, predicted),
        }


@pytest.mark.parametrize("levels", [5, 10**9])  # with and without equal probabilities
def test_no_threshold_is_better_than_the_best(levels):
    rng = np.random.default_rng(1)
    scores, applies = rng.integers(1, levels, (15, 3)) / levels, rng.random((15, 3)) < 0.4
    highest, threshold = best_threshold(scores, applies)
    reached = [multi_label_metrics(scores, applies, each)["micro_f1"] for each in (threshold, *np.unique(scores), 0.0)]
    assert reached[0] == pytest.approx(highest, abs=1e-12)
    assert max(reached) <= highest + 1e-12


def test_a_chosen_threshold_is_kept_and_decides_the_answers(tmp_path):
    task, splits = MultiLabelClassification.from_data(
        write(tmp_path, LISTS), MultiLabelOptions(choose_label_threshold=True)
    )
    logits = np.where(np.array(EXPECTED) == 1, -1.0, -3.0)  # all below 0.5
    encoded = Encoded(splits["train"], [])
    metrics = task.metrics(encoded, logits)
    assert (metrics["micro_f1"], metrics["best_micro_f1"]) == (0.0, 1.0)
    task.conclude(metrics)
    assert task.results["multi_label"] == {"threshold": metrics["best_threshold"]}
    assert task.metrics(encoded, logits)["micro_f1"] == 1.0
    config = transformers.RobertaConfig(**task.head)
    again = MultiLabelClassification.from_model(config, task.results, {})
    answers = again.answer(encoded, logits)
    assert [sorted(answer.row["labels"]) for answer in answers] == SETS
    assert answers[1].lines == ["text 1", "  none; the nearest is anger 0.0474"]
    assert answers[2].lines[1] == "  anger 0.2689, joy 0.2689"
    strict = MultiLabelClassification.from_model(config, task.results, {"label_threshold": 0.9})
    assert [answer.row["labels"] for answer in strict.answer(encoded, logits)] == [[]] * 4


def test_a_model_without_any_right_label_is_warned_of(tmp_path):
    data = write(tmp_path, LISTS)
    task, splits = MultiLabelClassification.from_data(data, MultiLabelOptions())
    encoded = Encoded(splits["validation"], [])
    (remark,) = task.remarks(task.metrics(encoded, np.full((4, 3), -0.1)))
    assert "has a probability above 0.5: the model has learned little; try --choose_label_threshold" in remark
    assert not task.remarks(task.metrics(encoded, np.full((4, 3), 0.1)))
    chosen, _ = MultiLabelClassification.from_data(data, MultiLabelOptions(choose_label_threshold=True))
    assert not chosen.remarks(chosen.metrics(encoded, np.full((4, 3), -0.1)))


def test_the_loss_is_that_of_transformers_over_all_micro_batches():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    loss = MultiLabelClassification(NAMES, MultiLabelOptions(), 0.5).loss
    expected = torch.nn.BCEWithLogitsLoss()(logits, labels)
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    parts = [loss({"logits": logits[rows]}, labels[rows], labels.numel()) for rows in (slice(4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), expected)
    np.testing.assert_allclose(probabilities(logits.numpy()), torch.sigmoid(logits.double()).numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (['["joy"]', '["anger, mild", "joy"]', "[]"], [["joy"], ["anger, mild", "joy"], []]),
        (["['joy']", "['it\\'s', 'joy']", "[1, 2]"], [["joy"], ["it's", "joy"], ["1", "2"]]),
    ],
)
def test_a_csv_may_hold_lists_as_json_and_python_write_them(tmp_path, cells, expected):
    pandas.DataFrame({"text": ["a", "b", "c"], "labels": cells}).to_csv(tmp_path / "train.csv", index=False)
    data = tuple(f"{split}={tmp_path / 'train.csv'}" for split in ("train", "validation"))
    task, splits = MultiLabelClassification.from_data(data, MultiLabelOptions(label_column="labels"))
    found = [[name for name, value in zip(task.names, text.label, strict=True) if value] for text in splits["train"]]
    assert found == [sorted(labels) for labels in expected]


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
def test_a_single_choice_of_label_studio_is_whole(tmp_path, suffix):
    several = {"choices": ["Food, drinks", "Staff"]}
    values = ["Food, drinks", several if suffix == ".jsonl" else json.dumps(several), "", "-"]
    task, splits = MultiLabelClassification.from_data(write(tmp_path, rows(label=values), suffix), MultiLabelOptions())
    assert task.names == ["Food, drinks", "Staff"]
    assert [text.label for text in splits["train"]] == [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize("cell", ["['joy' 'anger']", "[joy]", "[joy"])
def test_a_list_that_cannot_be_read_is_no_label(tmp_path, cell):
    pandas.DataFrame({"text": ["a", "b"], "label": [cell, "joy"]}).to_csv(tmp_path / "train.csv", index=False)
    data = tuple(f"{split}={tmp_path / 'train.csv'}" for split in ("train", "validation"))
    if cell == "[joy":
        assert MultiLabelClassification.from_data(data, MultiLabelOptions())[0].names == ["[joy", "joy"]
        return
    with pytest.raises(UserError, match=r"train.csv, row 2: 'label' is .*, not a list of labels"):
        MultiLabelClassification.from_data(data, MultiLabelOptions())


def test_columns_may_be_true_and_false_and_a_test_split_may_have_none(tmp_path):
    pandas.DataFrame({"text": ["a", "b"], "joy": ["TRUE", "FALSE"]}).to_csv(tmp_path / "train.csv", index=False)
    (tmp_path / "dev.csv").write_text("text,joy\na,true\n")
    for unlabelled in ("text\na\n", "text,joy\na,\n"):
        (tmp_path / "test.csv").write_text(unlabelled)
        _task, splits = MultiLabelClassification.from_data((str(tmp_path),), MultiLabelOptions(label_columns="joy"))
        assert {split: [text.label for text in texts] for split, texts in splits.items()} == {
            "train": [(1.0,), (0.0,)],
            "validation": [(1.0,)],
        }
    with pytest.raises(UserError, match="--label_columns joy,joy has 'joy' twice"):
        MultiLabelClassification.from_data((str(tmp_path),), MultiLabelOptions(label_columns="joy,joy"))
