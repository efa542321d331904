"""Which rows have a label, which labels are the same, and how much each class counts."""

import json
import logging

import numpy as np
import pandas
import pytest
from sklearn.utils.class_weight import compute_class_weight

from ds_roberta.errors import UserError
from ds_roberta.finetuning.classification import Classification, ClassificationOptions, Regression
from ds_roberta.finetuning.labels import Labels
from ds_roberta.finetuning.task import Encoded


def write(folder, train, dev=None, **others):
    for split, labels in {"train": train, "dev": train if dev is None else dev, **others}.items():
        rows = [json.dumps({"text": f"text {number}", "label": label}) for number, label in enumerate(labels)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return (str(folder),)


def labels_of(splits, split="train"):
    return [text.label for text in splits[split]]


def test_whole_numbers_are_one_label_however_they_are_written(tmp_path):
    task, splits = Classification.from_data(write(tmp_path, [1, 1.0, "1", "1.0", 0, "2"]), ClassificationOptions())
    assert task.names == ["0", "1", "2"]
    assert labels_of(splits) == [1, 1, 1, 1, 0, 2]
    task, _ = Classification.from_data(write(tmp_path, ["1.5", 1.5, "v1.0", "-3.0", -3]), ClassificationOptions())
    assert task.names == ["-3", "1.5", "v1.0"]


def test_a_table_in_which_pandas_made_numbers_of_labels_and_nothing_has_the_same_ones(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b", "c"], "label": [0, None, 1]})
    for split in ("train", "dev"):
        frame.to_parquet(tmp_path / f"{split}.parquet")
    task, splits = Classification.from_data((str(tmp_path),), ClassificationOptions())
    assert (task.names, labels_of(splits)) == (["0", "1"], [0, 1])


def test_rows_without_a_label_are_counted_and_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "ds_roberta")
    data = write(tmp_path, ["yes", "-", "no", "", None, " ", "-", "yes"])
    _, splits = Classification.from_data(data, ClassificationOptions())
    assert labels_of(splits) == [1, 0, 1]
    assert [text.place[-5:] for text in splits["train"]] == ["row 1", "row 3", "row 8"]
    (line,) = {record.getMessage() for record in caplog.records if "train" in record.getMessage()}
    assert line.endswith("train.jsonl: 5 of 8 rows have no 'label' and are left out (none 3, '-' 2)")
    with pytest.raises(UserError, match=r".jsonl, row 2 has no 'label' \('-'\)"):
        Classification.from_data(data, ClassificationOptions(unlabelled="error"))
    _, splits = Regression.from_data(write(tmp_path, ["1.5", "-", None, -1, 2]), Labels())
    assert labels_of(splits) == [1.5, -1.0, 2.0]


def test_a_minus_beside_a_plus_is_not_taken_for_no_label(tmp_path):
    for labels in (["+", "-", "0"], ["+", ["-"], "+"]):
        with pytest.raises(UserError, match=r".jsonl has the labels '\+' and '-' as 'label', but .* rename them"):
            Classification.from_data(write(tmp_path, labels), ClassificationOptions())


@pytest.mark.parametrize("ignored", ["-1", "-1.0"])
def test_minus_one_is_a_label_unless_it_is_named(tmp_path, caplog, ignored):
    data = write(tmp_path, [0, 1, 2, -1], [0, "-1", -1.0])
    task, splits = Classification.from_data(data, ClassificationOptions())
    assert task.names == ["-1", "0", "1", "2"]
    assert labels_of(splits, "validation") == [1, 0, 0]
    task, splits = Classification.from_data(data, ClassificationOptions(ignore_label=ignored))
    assert task.names == ["0", "1", "2"]
    assert labels_of(splits, "validation") == [0]
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned  # a quarter of the rows may well be a class


@pytest.mark.parametrize(
    ("labels", "warns"), [([0, 1, 2] * 9 + [-1], True), ([0, 1] * 9 + [-1] * 3, False), (["a", "b"] * 9 + [-1], False)]
)
def test_a_rare_minus_one_beside_0_1_2_is_named(tmp_path, caplog, labels, warns):
    Classification.from_data(write(tmp_path, labels), ClassificationOptions())
    assert ["give --ignore_label -1" in record.getMessage() for record in caplog.records] == [True] * warns


def test_a_test_split_without_labels_is_left_out_whole(tmp_path):
    for hidden, ignored in ((-1, None), ("-", None), (None, None), (9, "9"), (-1, "9")):
        data = write(tmp_path, [0, 1], test=[hidden] * 3)
        _, splits = Classification.from_data(data, ClassificationOptions(ignore_label=ignored))
        assert set(splits) == {"train", "validation"}
    (tmp_path / "test.jsonl").write_text('{"text": "a", "gold_label": 1}')  # another of the usual names than train's
    assert labels_of(Classification.from_data(data, ClassificationOptions())[1], "test") == [1]


def test_balanced_weights_are_scikit_learns_and_are_kept(tmp_path):
    labels = ["a"] * 6 + ["b"] * 3 + ["c"]
    task, _ = Classification.from_data(write(tmp_path, labels), ClassificationOptions(class_weights="balanced"))
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    assert task.weights == list(expected)
    assert task.results["class_weights"] == dict(zip("abc", expected, strict=True))


def test_a_model_that_predicts_one_class_is_warned_of(tmp_path):
    task, splits = Classification.from_data(write(tmp_path, ["a", "b", "c"]), ClassificationOptions())
    one, two = (task.metrics(Encoded(splits["train"], []), np.eye(3)[chosen]) for chosen in ([1, 1, 1], [1, 0, 1]))
    assert (one["predicted_classes"], two["predicted_classes"]) == (1, 2)
    (remark,) = task.remarks(one)
    assert "one class for all validation examples" in remark
    assert task.remarks(two) == []


def test_white_space_around_a_label_is_not_part_of_it(tmp_path):
    task, splits = Classification.from_data(write(tmp_path, [" yes", "no", "yes "], ["no "]), ClassificationOptions())
    assert (task.names, labels_of(splits)) == (["no", "yes"], [1, 0, 1])


def test_a_list_of_one_label_is_the_label(tmp_path, caplog):
    caplog.set_level("INFO", "ds_roberta")
    data = write(tmp_path, [["yes"], ["no"], [], "yes"])
    task, splits = Classification.from_data(data, ClassificationOptions())
    assert (task.names, labels_of(splits)) == (["no", "yes"], [1, 0, 1])
    assert "train.jsonl: 1 of 4 rows have no 'label' and are left out (none 1)" in caplog.text
    write(tmp_path, [["yes"], ["no"]] * 5)
    (tmp_path / "dev.jsonl").unlink()
    _, splits = Classification.from_data(data, ClassificationOptions(validation_fraction=0.2))
    assert sorted(labels_of(splits, "validation")) == [0, 1]
    with pytest.raises(UserError, match="not a label: label or remove the row, or use --task multi-label"):
        Classification.from_data(write(tmp_path, [["yes"], ["no", "yes"]]), ClassificationOptions())


def test_f1_is_that_of_the_positive_label(tmp_path):
    data = write(tmp_path, ["equivalent", "equivalent", "equivalent", "not_equivalent"])
    for given, positive, f1 in ((None, "not_equivalent", 0.0), ("equivalent", "equivalent", 6 / 7)):
        task, splits = Classification.from_data(data, ClassificationOptions(positive_label=given))
        assert task.results["positive_label"] == positive
        always = np.tile([1.0, 0.0], (4, 1))
        assert task.metrics(Encoded(splits["train"], []), always)["f1"] == pytest.approx(f1)
    with pytest.raises(
        UserError, match=r"--positive_label same is none of the training .*: choose equivalent or not_eq"
    ):
        Classification.from_data(data, ClassificationOptions(positive_label="same"))
    with pytest.raises(UserError, match="--positive_label a is for two labels, the training examples have 3"):
        Classification.from_data(write(tmp_path, ["a", "b", "c"]), ClassificationOptions(positive_label="a"))


def test_label_studios_tasks_are_named(tmp_path):
    chosen = {"value": {"choices": ["a"]}, "from_name": "mood", "to_name": "text", "type": "choices"}
    task = {"id": 1, "data": {"text": "x"}, "annotations": [{"result": [chosen]}]}
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text(json.dumps([task]))
    for options in (ClassificationOptions(), ClassificationOptions(label_column="mood")):
        with pytest.raises(UserError, match="has Label Studio's tasks: export them as JSON-MIN or CSV"):
            Classification.from_data((str(tmp_path),), options)


@pytest.mark.parametrize(
    ("labels", "named"),
    [([2.615, 1, 3], "the 3 numbers, such as 2.615, is"), ([1, 2.0, 3], ""), (["2.5 stars", "v1.2"], "")],
)
def test_fractions_as_classes_are_named(tmp_path, caplog, labels, named):
    Classification.from_data(write(tmp_path, labels), ClassificationOptions())
    assert named in caplog.text if named else not caplog.text
