"""Labelled texts from GLUE's formats: the same examples from each, and errors that name the row."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from ds_roberta.data.tokenizer_files import training_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.finetuning.classification import Classification, ClassificationOptions, Regression
from ds_roberta.finetuning.labelled_tables import Text
from ds_roberta.finetuning.labels import Labels
from ds_roberta.finetuning.multi_label import MultiLabelClassification
from ds_roberta.finetuning.text_task import encode_texts
from ds_roberta.finetuning.token_classification import TagColumns, TokenClassification, read_sentences
from ds_roberta.transformers_folder import open_tokenizer

ROWS = [
    {"sentence1": "kato mira", "sentence2": "vorli shendu", "label": "yes"},
    {"sentence1": 'a "quoted" word', "sentence2": "sulpa", "label": "no"},
    {"sentence1": "tolimi", "sentence2": "karen", "label": "yes"},
]
NUMBERS = [{**row, "label": number} for number, row in enumerate(ROWS)]


def examples(*labels):
    return [Text("", row["sentence1"], row["sentence2"], label) for row, label in zip(ROWS, labels, strict=True)]


EXPECTED = examples(1, 0, 1)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_splits(folder, rows, suffix=".jsonl", **others):
    for split, of_split in {"train": rows, "dev": rows, **others}.items():
        write(folder / f"{split}{suffix}", of_split)
    return (str(folder),)


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    task, splits = Classification.from_data(write_splits(tmp_path, ROWS, suffix), ClassificationOptions())
    assert splits == {"train": EXPECTED, "validation": EXPECTED}
    assert task.head["id2label"] == {0: "no", 1: "yes"}


def test_a_saved_data_set_with_named_classes_and_an_unlabelled_test(tmp_path):
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string")})
    features["label"] = names
    numbered = [{**row, "label": names.str2int(row["label"])} for row in ROWS]
    hidden = [{**row, "label": -1} for row in numbered]
    splits = {"train": numbered, "validation": numbered, "test": hidden}
    datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=features) for split, rows in splits.items()}
    ).save_to_disk(tmp_path / "saved")
    _task, splits = Classification.from_data((str(tmp_path / "saved"),), ClassificationOptions())
    assert splits == {"train": EXPECTED, "validation": EXPECTED}


def test_a_list_of_classes_with_a_gap_is_reported_with_its_row(tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "tags": tags})
    rows = {"train": [{"tokens": ["a", "b"], "tags": [0, 1]}], "dev": [{"tokens": ["a", "b"], "tags": [0, -100]}]}
    datasets.DatasetDict(
        {split: datasets.Dataset.from_list(of_split, features=features) for split, of_split in rows.items()}
    ).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="dev, row 1: item 2 of 'tags' is None"):
        TokenClassification.from_data((str(tmp_path / "saved"),), TagColumns())


def test_colas_files_have_no_header(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("gj04\t1\t\tKato mira.\ngj04\t0\t*\tMira kato vor.\n")
    _, splits = Classification.from_data((str(tmp_path),), ClassificationOptions())
    assert splits["train"] == [Text("", "Kato mira.", None, 1), Text("", "Mira kato vor.", None, 0)]


def test_mnlis_two_kinds_of_validation_and_its_unlabelled_tests(tmp_path):
    other = [{**row, "label": "no"} for row in ROWS]
    unlabelled = [{name: row[name] for name in ("sentence1", "sentence2")} for row in ROWS]
    names = {"train": ROWS, "dev_matched": ROWS, "dev_mismatched": other}
    for name, rows in names.items():
        write(tmp_path / f"{name}.tsv", rows)
    for kind in ("matched", "mismatched"):
        write(tmp_path / f"test_{kind}.tsv", unlabelled)
    _task, splits = Classification.from_data((str(tmp_path),), ClassificationOptions())
    assert splits == {
        "train": EXPECTED,
        "validation": EXPECTED,
        "validation_mismatched": examples(0, 0, 0),
    }


def test_columns_can_be_named_and_numbers_stay_in_order(tmp_path):
    rows = [{"says": f"kato {number}", "stars": number} for number in (10, 9, 2)]
    task, splits = Classification.from_data(
        write_splits(tmp_path, rows), ClassificationOptions(text_column="says", label_column="stars")
    )
    assert task.results["label_names"] == ["2", "9", "10"]
    assert [text.label for text in splits["train"]] == [2, 1, 0]
    _, numbers = Regression.from_data(write_splits(tmp_path, rows), Labels(text_column="says", label_column="stars"))
    assert [text.label for text in numbers["train"]] == [10.0, 9.0, 2.0]


def changed(row, **values):
    rows = [dict(entry) for entry in ROWS]
    rows[row] |= values
    return rows


@pytest.mark.parametrize(
    ("task", "train", "dev", "options", "message"),
    [
        (Classification, ROWS, changed(1, label="maybe"), {}, "dev.jsonl, row 2: .*'maybe'.*no training row"),
        (
            Classification,
            ROWS,
            changed(1, label=None),
            {"unlabelled": "error"},
            r"dev.jsonl, row 2 has no 'label' \(None\)",
        ),
        (Classification, ROWS, [{**row, "label": "-"} for row in ROWS], {}, "no row of .*dev.jsonl' has a 'label'"),
        (Classification, ROWS, changed(2, sentence1=None), {}, "dev.jsonl, row 3: 'sentence1' is None"),
        (Classification, ROWS[:1], ROWS, {}, "only the label 'yes'"),
        (Classification, changed(1, label=["a", "b"]), ROWS, {}, r"train.jsonl, row 2: 'label' is \['a', 'b'\], not"),
        (Classification, ROWS, ROWS, {"text_column": "said"}, "no column 'said'.*'sentence1'"),
        (Classification, ROWS, ROWS, {"label_column": "class"}, "no column 'class'"),
        (Classification, [{"a": 1}], ROWS, {}, "--label_column"),
        (Classification, ROWS, [], {}, "dev.jsonl' has no rows"),
        (Regression, NUMBERS, ROWS, {}, "dev.jsonl, row 1: the label 'yes' is not a number: fix it or use"),
        (Regression, NUMBERS, changed(0, label=10**400), {}, "row 1: the label 1000.* is not a number: fix it or use"),
        (Regression, NUMBERS, changed(0, label="2,5"), {}, "row 1: the label '2,5' .*: write it with a decimal point"),
        (
            Regression,
            NUMBERS,
            [*NUMBERS, {**ROWS[0], "label": -100}],
            {},
            "row 4: the label -100 means no label",
        ),
    ],
)
def test_what_is_wrong_is_reported_with_its_row(tmp_path, task, train, dev, options, message):
    write_splits(tmp_path, train, dev=dev)
    with pytest.raises(UserError, match=message):
        task.from_data((str(tmp_path),), task.options_class(**options))


PAIRS = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "c", "text_pair": "d", "label": 1}]
SINGLE = [{"text": "a", "label": 0}, {"text": "c", "label": 1}]
TEXT_TASKS = [Classification, Regression, MultiLabelClassification]


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_splits_agree_whether_texts_are_pairs(tmp_path, task):
    message = "dev.jsonl has single texts .'text'.: name the columns of all splits by --text_column"
    for train, dev, expected in ((PAIRS, SINGLE, message), (SINGLE, PAIRS, "train.jsonl has single texts .*dev.jsonl")):
        data = write_splits(tmp_path, train, dev=dev)
        with pytest.raises(UserError, match=expected):
            task.from_data(data, task.options_class())
        assert task.from_data(data, task.options_class(text_column="text"))[0].results["text_columns"] == ["text", None]


def tuned(folder, task, rows, **options):
    """A task as predictions have it after fine-tuning on these rows."""
    folder.mkdir()
    trained, _ = task.from_data(write_splits(folder, rows), task.options_class(**options))
    kept = json.loads(json.dumps(trained.results))
    config = transformers.RobertaConfig(**trained.head)
    return lambda **given: task.from_model(config, kept, given)


def found(task, path, rows):
    return [(text.text, text.pair, text.others) for text in task.read_inputs(str(write(path, rows)))]


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_predictions_read_the_columns_of_fine_tuning(tmp_path, task):
    rows = [{"text": "x", "a": f"a{label}", "b": f"b{label}", "c": "c", "label": label} for label in (0, 1)]
    asked = [{name: rows[0][name] for name in ("text", "a", "b", "c")}]
    path = tmp_path / "asked.jsonl"
    pairs = tuned(tmp_path / "pairs", task, rows, text_column="a", text_pair_column="b")
    assert found(pairs(), path, asked) == [("a0", "b0", {"text": "x", "c": "c"})]
    assert found(pairs(text_pair_column="c"), path, asked) == [("a0", "c", {"text": "x", "b": "b0"})]
    assert found(pairs(text_column="text", text_pair_column="c"), path, asked)[0][:2] == ("x", "c")
    usual = [{"sentence1": "s", "sentence2": "t", "a": "alone"}]
    assert found(pairs(), path, usual) == [("s", "t", {"a": "alone"})]
    single = tuned(tmp_path / "single", task, rows)
    assert found(single(), path, PAIRS[:1]) == [("a", None, {"text_pair": "b", "label": 0})]


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_what_is_no_pair_for_a_model_of_pairs_is_refused_and_the_reverse(tmp_path, task):
    path = tmp_path / "asked.jsonl"
    pairs, single = (tuned(tmp_path / name, task, rows) for name, rows in (("pairs", PAIRS), ("single", SINGLE)))
    with pytest.raises(UserError, match=r"takes pairs of texts, but .*row 1 has a single text: name their columns"):
        found(pairs(), path, SINGLE)
    with pytest.raises(UserError, match="takes pairs of texts, but the command line has a single text: give --text_p"):
        pairs().make_input("a", None)
    with pytest.raises(UserError, match=r"takes single texts, but .*row 1 has a pair: give the text by --text_column"):
        found(single(), path, [{"premise": "a", "hypothesis": "b"}])
    with pytest.raises(UserError, match="takes single texts, but the command line has a pair"):
        single().make_input("a", "b")
    assert found(single(text_column="premise"), path, [{"premise": "a", "hypothesis": "b"}])[0][:2] == ("a", None)
    assert (pairs().make_input("a", "b").pair, single().make_input("a", None).pair) == ("b", None)


def test_a_model_of_another_origin_takes_both(tmp_path):
    task = Regression.from_model(transformers.RobertaConfig(num_labels=1), {}, {})
    assert found(task, tmp_path / "pairs.jsonl", PAIRS)[0][:2] == ("a", "b")
    assert found(task, tmp_path / "single.jsonl", SINGLE)[0][:2] == ("a", None)
    assert task.make_input("a", "b").pair == "b"
    with pytest.raises(UserError, match="has text_columns in an unknown form"):
        Regression.from_model(transformers.RobertaConfig(num_labels=1), {"text_columns": ["a", 1]}, {})


def test_token_classification_keeps_the_second_text_as_another_column(tmp_path):
    path = str(write(tmp_path / "asked.jsonl", [{"text": "a b", "text_pair": "c"}]))
    (sentence,) = read_sentences(path, TagColumns(), labelled=False)
    assert (sentence.words, sentence.others) == (("a", "b"), {"text_pair": "c"})


def test_damaged_files_are_reported(tmp_path):
    write_splits(tmp_path, ROWS)
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a"}\n{"sentence1"\n')
    with pytest.raises(UserError, match=r"dev.jsonl, row 2: not valid JSON"):
        Classification.from_data((str(tmp_path),), ClassificationOptions())
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(UserError, match="no validation file"):
        Classification.from_data((str(tmp_path),), ClassificationOptions())
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\n")
    with pytest.raises(UserError, match=r"dev.tsv, row 2: the row has 2 fields, the header 3"):
        Classification.from_data((str(tmp_path),), ClassificationOptions())
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence1\tlabel\na\tb\tno\n")
    with pytest.raises(UserError, match=r"dev.tsv has the column 'sentence1' twice"):
        Classification.from_data((str(tmp_path),), ClassificationOptions())
    with pytest.raises(UserError, match=r"--data .*absent' does not exist"):
        Classification.from_data((str(tmp_path / "absent"),), ClassificationOptions())
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(UserError, match="as datasets saved it"):
        Classification.from_data((str(tmp_path),), ClassificationOptions())


LETTERS = ["kato </s> miren<mask>", "<s>", " <pad> <unk>", "<pad>" * 40]


@pytest.mark.parametrize("kind", [Classification, Regression])
def test_the_letters_of_special_tokens_stay_text(tmp_path, tokenizer_folder, kind):
    """As in pretraining, and in predictions, which are encoded by the same function."""
    rows = [{"sentence1": text, "sentence2": text, "label": number % 2} for number, text in enumerate(LETTERS)]
    task, splits = kind.from_data(write_splits(tmp_path, rows), kind.options_class())
    tokenizer = open_tokenizer(tokenizer_folder)
    features = task.encode(tokenizer, splits["train"], 512).features
    expected = [training_tokenizer(tokenizer_folder).encode(text, add_special_tokens=False).ids for text in LETTERS]
    assert [feature["input_ids"] for feature in features] == [[0, *ids, 2, 2, *ids, 2] for ids in expected]
    assert not {0, 1, 2, 3, 399} & {token for ids in expected for token in ids}
    assert tokenizer("kato <mask>")["input_ids"][-2:] == [399, 2]  # for others the tokenizer opens as usual


def test_texts_that_are_cut_are_counted_with_their_letters(tokenizer_folder, caplog):
    texts = [Text(str(number), text) for number, text in enumerate(["<mask>" * 3, "kato"])]
    encode_texts(open_tokenizer(tokenizer_folder), texts, 8)
    assert "1 of 2 texts are longer than 8 tokens and were cut, first 0" in caplog.text


def test_empty_texts_are_counted(tmp_path, caplog):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text('sentence1,sentence2,label\na,b,0\nc," ",1\nd,,1\n')
    Classification.from_data((str(tmp_path),), ClassificationOptions())
    assert f"2 of 3 texts in 'sentence2' are empty, first {tmp_path / 'train.csv'}, row 3" in caplog.text
    assert "'sentence1'" not in caplog.text
