"""The splits that `--data` names: files and their parts, data sets, and a share of the training examples."""

from collections import Counter

import datasets
import pandas
import pytest

from ds_roberta.errors import UserError
from ds_roberta.finetuning.classification import Classification, ClassificationOptions, Regression
from ds_roberta.finetuning.labelled_tables import read_splits, validation_examples
from ds_roberta.finetuning.labels import Labels
from ds_roberta.finetuning.multi_label import MultiLabelClassification, MultiLabelOptions
from ds_roberta.finetuning.question_answering import QuestionAnswering, SpanOptions
from ds_roberta.finetuning.token_classification import TokenClassification

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
ROWS = [{"text": f"word {number}", "label": label} for number, label in enumerate(LABELS)]


def write(path, rows=ROWS):
    frame = pandas.DataFrame(rows)
    frame.to_csv(path, index=False) if ".csv" in path.name else frame.to_json(path, orient="records", lines=True)
    return str(path)


def texts(examples):
    return [example.text for example in examples]


def test_the_parts_of_a_split_are_one(tmp_path):
    for part in range(2):
        write(tmp_path / f"train-0000{part}-of-00002.csv.gz", ROWS[part::2])
    write(tmp_path / "dev.jsonl", ROWS[:1])
    splits = read_splits([str(tmp_path)])
    assert splits["train"].rows == ROWS[::2] + ROWS[1::2]
    assert splits["train"].place(50).endswith("and others, row 2 of train-00001-of-00002.csv.gz")
    (tmp_path / "train-00000-of-00002.csv.gz").rename(tmp_path / "spare")
    with pytest.raises(UserError, match=r"train-00001-of-00002.csv.gz' is one of 2 parts of train, of which number 0"):
        read_splits([str(tmp_path)])
    (tmp_path / "spare").rename(tmp_path / "train-00000-of-00003.csv.gz")
    with pytest.raises(UserError, match=r"of-00003.csv.gz' and .*train-00001-of-00002.csv.gz' are both train"):
        read_splits([str(tmp_path)])
    for part in range(3):
        write(tmp_path / f"train-0000{part}-of-00003.csv.gz", ROWS)
    write(tmp_path / "train-00001-of-00003.jsonl", ROWS)
    (tmp_path / "train-00001-of-00002.csv.gz").unlink()
    with pytest.raises(UserError, match=r"part .*00001-of-00003.csv.gz' of train is there twice"):
        read_splits([str(tmp_path)])


def test_what_lies_beside_a_file_named_after_its_split_is_left_out_aloud(tmp_path, caplog):
    for name in ("train.csv", "train_metadata.jsonl", "dev.csv"):
        write(tmp_path / name)
    with caplog.at_level("INFO"):
        assert read_splits([str(tmp_path)])["train"].name == f"{tmp_path}/train.csv"
    assert "train_metadata.jsonl is left out: another file is named train and nothing else" in caplog.text
    for another in ("train.jsonl", "train-00000-of-00001.csv", "train2.csv", "Train_02.csv", "train (1).csv"):
        write(tmp_path / another)
        with pytest.raises(UserError, match="are both train"):
            read_splits([str(tmp_path)])
        (tmp_path / another).unlink()


def test_files_are_named_after_their_split_in_many_ways(tmp_path):
    for name in ("Train.csv", "val.csv", "testimonials.csv", "values.csv", "test_2.csv"):
        write(tmp_path / name, ROWS)
    splits = read_splits([str(tmp_path)])
    assert {split: table.name for split, table in splits.items()} == {
        "train": f"{tmp_path}/Train.csv", "validation": f"{tmp_path}/val.csv", "test": f"{tmp_path}/test_2.csv"
    }  # fmt: skip


def test_the_parts_of_sentences_are_one(tmp_path):
    for part in range(2):
        (tmp_path / f"train-0000{part}-of-00002.conll").write_text(f"word{part} O\nX B-X\n")
    (tmp_path / "dev.conll").write_text("X B-X\n")
    _task, splits = TokenClassification.from_data((str(tmp_path),), TokenClassification.options_class())
    assert [sentence.words[0] for sentence in splits["train"]] == ["word0", "word1"]


def test_validation_examples_have_the_shares_of_labels_and_are_always_the_same(tmp_path):
    options = ClassificationOptions(validation_fraction=0.2)
    _task, splits = Classification.from_data((write(tmp_path / "train.csv"),), options)
    assert Counter(text.label for text in splits["validation"]) == {0: 12, 1: 6, 2: 2}
    assert sorted(texts(splits["train"]) + texts(splits["validation"])) == sorted(row["text"] for row in ROWS)
    assert texts(splits["validation"])[:12] != [row["text"] for row in ROWS[:12]]
    _task, again = Classification.from_data((write(tmp_path / "train.jsonl"),), options)
    assert texts(again["validation"]) == texts(splits["validation"])


def test_rare_labels_stay_near_their_share_and_are_learned(tmp_path):
    labels = [(str(number // 2),) for number in range(100)]  # 50 classes of two
    chosen = validation_examples(labels, range(100), 0.1)
    assert len(chosen) == len({labels[index] for index in chosen}) == 10
    rows = [*ROWS, {"text": "only one", "label": "rare"}]
    for fraction in (0.3, 0.9):
        data = (write(tmp_path / "train.csv", rows),)
        _task, splits = Classification.from_data(data, ClassificationOptions(validation_fraction=fraction))
        assert "only one" in texts(splits["train"])
        assert len(splits["validation"]) == pytest.approx(fraction * 101, abs=1)
    sentences = "\n".join(f"word{number} {'B-RARE' if number == 1 else 'O'}\n" for number in range(4))
    (tmp_path / "train.conll").write_text(sentences)
    options = TokenClassification.options_class(validation_fraction=0.75)
    _task, splits = TokenClassification.from_data((str(tmp_path / "train.conll"),), options)
    assert "B-RARE" in {tag for sentence in splits["train"] for tag in sentence.tags}


def test_questions_about_a_context_stay_together(tmp_path):
    answers = {"text": ["one"], "answer_start": [0]}
    rows = [
        {"id": str(number), "question": "how many?", "context": f"one {number // 4}", "answers": answers}
        for number in range(40)
    ]
    data = (write(tmp_path / "train.jsonl", rows),)
    _task, splits = QuestionAnswering.from_data(data, SpanOptions(validation_fraction=0.2))
    contexts = [{question.context for question in splits[split]} for split in ("train", "validation")]
    assert len(splits["validation"]) == 8
    assert not contexts[0] & contexts[1]


@pytest.mark.parametrize(
    ("task", "options", "column"),
    [
        (Regression, Labels(validation_fraction=0.5), list(map(float, range(100)))),
        (MultiLabelClassification, MultiLabelOptions(validation_fraction=0.5), ["x,y", "z"] * 50),
        (MultiLabelClassification, MultiLabelOptions(validation_fraction=0.5), [["x", "y"], ["z"]] * 50),
        (MultiLabelClassification, MultiLabelOptions(validation_fraction=0.5, label_columns="label"), [0, 1] * 50),
    ],
)
def test_every_task_takes_its_validation_examples_from_training(tmp_path, task, options, column):
    rows = [{"text": str(number), "label": label} for number, label in enumerate(column)]
    _task, splits = task.from_data((write(tmp_path / "train.jsonl", rows),), options)
    assert (len(splits["train"]), len(splits["validation"])) == (50, 50)


def test_validation_examples_are_never_taken_silently(tmp_path):
    train = write(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"no validation file.*--validation_fraction"):
        read_splits([train])
    with pytest.raises(UserError, match=r"no validation file in --data .*, only test and train: name a file dev"):
        read_splits([train, f"test={train}"])
    with pytest.raises(UserError, match="--data has a validation split: leave one of them out"):
        read_splits([train, f"validation={write(tmp_path / 'x.csv')}"], validation_fraction=0.1)
    with pytest.raises(UserError, match=r"--validation_fraction 0.9 of 1 examples leaves one split without any"):
        read_splits([write(tmp_path / "train.jsonl", ROWS[:1])], validation_fraction=0.9)
    with pytest.raises(UserError, match="--validation_fraction"):
        ClassificationOptions(validation_fraction=1.0)


def test_a_saved_data_set_with_two_splits_of_one_kind_is_refused(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "train_other": one}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="has two splits for train, one of them 'train_other'"):
        read_splits([str(tmp_path / "saved")])
