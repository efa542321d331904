"""Token classification: words as windows of token ids, tags as labels, entities and metrics as seqeval's."""

import numpy as np
import pytest
import seqeval.metrics
import torch
import transformers
from seqeval.scheme import BILOU, Tokens

from ds_roberta.errors import UserError
from ds_roberta.finetuning.tagged_sentences import Sentence
from ds_roberta.finetuning.token_classification import (
    TagColumns,
    TokenClassification,
    entity_metrics,
    find_entities,
    make_word_windows,
    token_labels,
    word_logits,
    word_spans,
)

TRAIN = "karen B-X\nsulto I-X\nminka O\n\n" + "karen O\nsulto B-Y\nZyxwvut O\n" * 20
DEV = "karen B-X\nsulto I-Y\n\nsulto B-Y\n"


@pytest.fixture
def task_and_splits(tmp_path):
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "dev.txt").write_text(DEV)
    return TokenClassification.from_data((str(tmp_path),), TagColumns())


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return transformers.RobertaTokenizer.from_pretrained(tokenizer_folder)


def perfect_logits(encoded, tags):
    longest = max(len(feature["labels"]) for feature in encoded.features)
    logits = np.zeros((len(encoded.features), longest + 3, tags), dtype=np.float32)
    for row, feature in enumerate(encoded.features):
        for position, label in enumerate(feature["labels"]):
            logits[row, position, max(label, 0)] = 1
    return logits


def test_the_labels_as_logits_measure_as_perfect(task_and_splits, tokenizer):
    task, splits = task_and_splits
    encoded = task.encode(tokenizer, splits["train"], 32)
    assert len(encoded.inputs) == 2 < len(encoded.features)
    metrics = task.metrics(encoded, perfect_logits(encoded, 4))
    assert {name: metrics[name] for name in task.metric_names} == dict.fromkeys(task.metric_names, 1)
    assert metrics["by_type"]["Y"]["support"] == 20


def test_a_tag_without_training_is_missed_and_reported(task_and_splits, tokenizer, tmp_path, caplog):
    task, splits = task_and_splits
    assert task.results["label_names"] == ["O", "B-X", "I-X", "B-Y"]
    encoded = task.encode(tokenizer, splits["validation"], 32)
    metrics = task.metrics(encoded, perfect_logits(encoded, 4))
    assert metrics["by_type"]["Y"] == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    TokenClassification.from_data((str(tmp_path),), TagColumns())
    assert f"validation has tags that no training sentence has: I-Y ({tmp_path}/dev.txt, row 1)" in caplog.text


def test_tags_that_mark_no_entities_are_measured_by_word(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("karen NOUN\nsulto VERB\n\nminka ADV\n")
    (tmp_path / "dev.txt").write_text("karen NOUN\nsulto NOUN\nminka VERB\n")
    task, splits = TokenClassification.from_data((str(tmp_path),), TagColumns())
    assert task.results["label_names"] == ["ADV", "NOUN", "VERB"]
    encoded = task.encode(tokenizer, splits["validation"], 32)
    logits = perfect_logits(encoded, 3)
    logits[..., 1] += 2  # everything is a noun
    metrics = task.metrics(encoded, logits)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["macro_f1"] == pytest.approx((0.8 + 0) / 2)
    assert metrics["by_tag"]["VERB"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    (tmp_path / "dev.txt").write_text("karen NOUN\n\nsulto NOWN\n")
    with pytest.raises(UserError, match=r"dev.txt, row 3: unknown tag 'NOWN'; did you mean 'NOUN'\?; no training"):
        TokenClassification.from_data((str(tmp_path),), TagColumns())
    (tmp_path / "train.txt").write_text("karen NOUN\n")
    with pytest.raises(UserError, match="only the tag 'NOUN'"):
        TokenClassification.from_data((str(tmp_path),), TagColumns())


def test_an_entity_type_without_training_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "dev.txt").write_text("karen B-X\n\nminka O\nsulto B-YY\n")
    with pytest.raises(UserError, match=r"dev.txt, row 3: unknown entity type 'YY'; did you mean 'Y'\?; no training"):
        TokenClassification.from_data((str(tmp_path),), TagColumns())


def test_splits_whose_letters_differ_are_refused(tmp_path):
    (tmp_path / "train.txt").write_text("karen B-X\nsulto L-X\nminka O\n")
    (tmp_path / "dev.txt").write_text("karen O\n\nkaren B-X\nsulto E-X\n")
    with pytest.raises(UserError, match=r"dev.txt, row 3: the tag 'E-X' belongs to IOBES, but 'L-X' .*train.txt, "):
        TokenClassification.from_data((str(tmp_path),), TagColumns())


def test_options_that_do_nothing_for_a_file_are_refused(tmp_path):
    (tmp_path / "train.conll").write_text(TRAIN)
    (tmp_path / "dev.conll").write_text(DEV)
    with pytest.raises(UserError, match=r"dev.conll' is not CoNLL-U, so --conllu_column does nothing"):
        TokenClassification.from_data((str(tmp_path),), TagColumns(conllu_column="NER"))
    with pytest.raises(UserError, match=r"has no names of columns, so --label_column does nothing"):
        TokenClassification.from_data((str(tmp_path),), TagColumns(label_column="ner"))


def test_the_loss_is_that_of_transformers_over_all_micro_batches():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 3)
    labels = torch.randint(0, 3, (4, 9)).where(torch.rand(4, 9) < 0.5, torch.tensor(-100))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = TokenClassification(["O", "B-X", "I-X"], TagColumns()).loss
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    count = (labels != -100).sum()
    parts = [loss({"logits": logits[rows]}, labels[rows], count) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), expected)
    without_labels = torch.full_like(labels, -100)  # a batch of unknown tags
    assert loss({"logits": logits}, without_labels) == loss({"logits": logits}, without_labels, 0) == 0


def test_a_column_of_pairs_is_refused():
    with pytest.raises(UserError, match="--text_pair_column b does nothing with --task token-classification"):
        TagColumns(text_pair_column="b")


def test_files_that_are_missing_are_named(tmp_path):
    (tmp_path / "train.conll").write_text(TRAIN)
    with pytest.raises(UserError, match=r"no validation file in --data .* name a file dev with the ending .conll, "):
        TokenClassification.from_data((str(tmp_path),), TagColumns())


def test_a_folder_saved_by_datasets_gives_tags_their_names(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    rows = datasets.Dataset.from_dict({"tokens": [["karen", "sulto"]], "ner_tags": [[1, 2]]}, features=features)
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(tmp_path / "saved"))
    _task, splits = TokenClassification.from_data((str(tmp_path / "saved"),), TagColumns())
    assert splits["validation"][0].tags == ("B-X", "I-X")


NAMES = ["O", "B-X", "I-X"]


def sentence(words, tags=()):
    return Sentence("x", tuple(words), tuple(tags))


def test_words_are_encoded_as_with_add_prefix_space(tokenizer, tokenizer_folder):
    words = ["karen", "sulto", "Zyx", ",", "dush"]
    (window,) = make_word_windows(tokenizer, [sentence(words)], 100)
    reference = transformers.RobertaTokenizer.from_pretrained(tokenizer_folder, add_prefix_space=True)(
        words, is_split_into_words=True
    )
    assert window.input_ids == reference["input_ids"]
    assert window.positions == [reference.word_ids().index(word) for word in range(5)]


def test_only_first_subwords_are_labelled(tokenizer):
    tagged = sentence(["Zyxwv", "karen", "Qq"], ["B-X", "I-X", "B-UNSEEN"])
    (window,) = make_word_windows(tokenizer, [tagged], 100)
    labels = token_labels(window, tagged, NAMES)
    assert len(labels) == len(window.input_ids)
    assert labels[0] == labels[-1] == -100
    assert [labels[position] for position in window.positions] == [1, 2, -100]
    assert sum(label != -100 for label in labels) == 2


@pytest.mark.parametrize("room", [5, 6, 17, 40])
def test_every_word_is_labelled_in_one_window(room):
    lengths = np.random.default_rng(room).integers(1, 6, size=100).tolist()
    spans = list(word_spans(lengths, room))
    assert [word for _, _, first, last in spans for word in range(first, last)] == list(range(100))
    for start, end, first, last in spans:
        assert start <= first < last <= end
        assert sum(lengths[start:end]) <= room
    if room == 40:
        inner = [(start, end, first, last) for start, end, first, last in spans if start > 0 and end < 100]
        assert all(start < first and last < end for start, end, first, last in inner)


def test_windows_are_merged_again(tokenizer):
    sentences = [sentence(["karen", "Zyxwvut"] * 30), sentence(["sulto"])]
    windows = make_word_windows(tokenizer, sentences, 32)
    assert len(windows) > 3
    assert all(len(window.input_ids) <= 32 for window in windows)
    logits = [np.array(window.input_ids + [9] * 7)[:, None] * np.ones(3) for window in windows]  # with padding
    found = word_logits(windows, logits, 2)
    firsts = [tokenizer(f" {word}")["input_ids"][1] for word in sentences[0].words]
    assert found[0][:, 0].tolist() == firsts
    assert found[1].shape == (1, 3)


def test_a_word_longer_than_a_window_is_cut(tokenizer):
    (window,) = make_word_windows(tokenizer, [sentence(["Q" * 500])], 32)
    assert len(window.input_ids) == 32


def test_measures_are_of_whole_entities():
    gold = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"]]
    predicted = [["B-X", "O", "O", "B-Y"], ["B-Z", "B-X"]]
    metrics = entity_metrics(gold, predicted)
    assert metrics["precision"] == 2 / 4
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["by_type"] == {
        "X": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        "Y": {"precision": 1, "recall": 1, "f1": 1, "support": 1},
        "Z": {"precision": 0, "recall": 0, "f1": 0, "support": 0},
    }


def test_measures_are_seqevals_to_the_last_digit():
    random = np.random.default_rng(0)
    for letters in ("BI", "BIES", "BILU"):
        tags = ["O", *(f"{letter}-{type_}" for letter in letters for type_ in "XY")]
        gold, predicted = ([random.choice(tags, size=9).tolist() for _ in range(40)] for _ in range(2))
        predicted = [new if random.random() < 0.5 else old for new, old in zip(predicted, gold, strict=True)]
        # seqeval's default mode knows E and S, but not L and U
        as_iobes = [[["S" + tag[1:] if tag[0] == "U" else "E" + tag[1:] if tag[0] == "L" else tag for tag in row]
                     for row in rows] for rows in (gold, predicted)]  # fmt: skip
        report = seqeval.metrics.classification_report(*as_iobes, output_dict=True, zero_division=0)
        metrics = entity_metrics(gold, predicted)
        for name, measures in {"micro avg": metrics, **metrics["by_type"]}.items():
            assert measures["precision"] == report[name]["precision"]
            assert measures["recall"] == report[name]["recall"]
            assert measures["f1"] == report[name]["f1-score"]
        assert metrics["accuracy"] == seqeval.metrics.accuracy_score(gold, predicted)


def bilou(random, words):
    """Tags in which every entity is complete."""
    tags = []
    while len(tags) < words:
        type_, length = random.choice(["X", "Y"]), random.integers(0, min(4, words - len(tags)) + 1)
        tags += {0: ["O"], 1: [f"U-{type_}"]}.get(length, [f"B-{type_}", *[f"I-{type_}"] * (length - 2), f"L-{type_}"])
    return tags


def test_complete_entities_in_biluo_measure_as_in_seqevals_scheme():
    random = np.random.default_rng(1)
    gold, predicted = ([bilou(random, 12) for _ in range(60)] for _ in range(2))
    predicted = [new if random.random() < 0.5 else old for new, old in zip(predicted, gold, strict=True)]
    strict = {"mode": "strict", "scheme": BILOU, "zero_division": 0}
    report = seqeval.metrics.classification_report(gold, predicted, output_dict=True, **strict)
    metrics = entity_metrics(gold, predicted)
    assert 0 < metrics["f1"] == report["micro avg"]["f1-score"] < 1
    for type_, measures in metrics["by_type"].items():
        assert measures == {
            "precision": report[type_]["precision"],
            "recall": report[type_]["recall"],
            "f1": report[type_]["f1-score"],
            "support": report[type_]["support"],
        }
    for tags in predicted:
        found = [(each.type, each.start, each.end) for each in find_entities(tags, np.ones(len(tags)))]
        assert found == [(each.tag, each.start, each.end) for each in Tokens(tags, BILOU).entities]


def test_measures_without_any_entity():
    metrics = entity_metrics([["O"]], [["O"]])
    assert metrics == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1, "by_type": {}}


def test_entities_are_found_with_their_scores():
    found = find_entities(["B-X", "I-X", "O", "I-Y"], np.array([0.9, 0.7, 0.1, 0.5]))
    assert [(entity.type, entity.start, entity.end, round(entity.score, 6)) for entity in found] == [
        ("X", 0, 2, 0.8),
        ("Y", 3, 4, 0.5),
    ]


def asked(tmp_path, name, content, **options):
    (tmp_path / name).write_text(content)
    return TokenClassification(["O", "B-X", "I-X"], TagColumns(**options)).read_inputs(str(tmp_path / name))


def test_a_tsv_with_a_header_is_a_table_of_texts_to_predict(tmp_path):
    content = "id\ttext\n1\tAnn lives here\n2\tBob, too\n"
    found = asked(tmp_path, "x.tsv", content)
    assert [(each.words, each.others) for each in found] == [
        (("Ann", "lives", "here"), {"id": "1"}),
        (("Bob", ",", "too"), {"id": "2"}),
    ]
    assert [each.text for each in asked(tmp_path, "x.tsv", "id\ttext\tlabel\n1\tAnn lives\tx\n")] == ["Ann lives"]
    assert asked(tmp_path, "x.tsv", "text\tlabel\nAnn\tx\n", text_column="text")[0].text == "Ann"
    found = asked(tmp_path, "x.tsv", content.replace("text", "body"), text_column="body")
    assert found[0].text == "Ann lives here"
    assert [each.text for each in asked(tmp_path, "x.tsv", "text\nAnn lives\nBob\n")] == ["Ann lives", "Bob"]
    assert [each.words for each in asked(tmp_path, "x.tsv", "text\nmining\n\nBob\n")] == [("text", "mining"), ("Bob",)]
    assert asked(tmp_path, "x.tsv", "text\tO\nmining\tO\n")[0].words == ("text", "mining")
    for header in ("tokens\tner_tags", "text\tlabel"):
        assert [each.words for each in asked(tmp_path, "x.tsv", f"{header}\nAnn\tB-X\n")] == [("Ann",)]
    assert [each.text for each in asked(tmp_path, "x.tsv", "text\ttag\nAnn lives\tx\n")] == ["Ann lives"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "Ann lives here\nBob lives there\n", "row 1 has 3 columns, but 'here' in the last one is no tag"),
        ("x.txt", "So do I\nSo do you\nSo do they\n", "row 2 has 3 columns, but 'you' .* give texts as a table with a"),
        ("x.txt", "Ann lives here\nBob lives\n", "x.txt, row 2 has 2 columns, .* or give texts as a table"),
        ("x.txt", "id\ttext\n1\tAnn lives here\n", "row 1 has 2 columns, but 'text' in the last one is no tag"),
        ("x.tsv", "1\tAnn lives here\n", "row 1 has 2 columns, but 'Ann lives here' in the last one is no tag"),
        ("x.tsv", "id\tbody\n1\tAnn lives here\n", "but 'body' in the last one is no tag"),
    ],
)
def test_texts_to_predict_are_not_taken_for_columns_of_words(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        asked(tmp_path, name, content)


def test_marks_at_the_ends_of_sentences_are_not_tags(tmp_path):
    (tmp_path / "x.txt").write_text("Ann lives .\nBob works .\n")
    task = TokenClassification([".", "NNP", "VBZ"], TagColumns())
    with pytest.raises(UserError, match=r"row 1 has 3 columns, but '\.' in the last one"):
        task.read_inputs(str(tmp_path / "x.txt"))
    (tmp_path / "x.txt").write_text("Ann NNP\nworks VBZ\n. .\n\nBob NNP\n")
    assert [task.other_columns(each) for each in task.read_inputs(str(tmp_path / "x.txt"))] == [
        {"tags": ["NNP", "VBZ", "."]},
        {"tags": ["NNP"]},
    ]


def test_a_tag_that_marks_no_entity_is_refused_beside_entities(tmp_path):
    (tmp_path / "train.txt").write_text(TRAIN)
    for content, tag in (("karen O\n\nminka NOUN\n", "NOUN"), ("karen O\n\nminka B\n", "B")):
        (tmp_path / "dev.txt").write_text(content)
        with pytest.raises(UserError, match=rf"dev.txt, row \d: the tag '{tag}' is neither O nor like B-Y in training"):
            TokenClassification.from_data((str(tmp_path),), TagColumns())
    (tmp_path / "train.txt").write_text("karen B\nsulto O\n")
    (tmp_path / "dev.txt").write_text("karen B\nsulto I\n")
    assert TokenClassification.from_data((str(tmp_path),), TagColumns())[0].names == ["O", "B"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.txt", "-DOCSTART-\n\nkaren\nsulto\n\nminka\n"),
        ("test.conllu", "# id = a\n" + "1\tkaren" + "\t_" * 8 + "\n"),
        ("test.jsonl", '{"tokens": ["karen"]}\n{"tokens": ["minka"], "ner_tags": [null]}\n'),
        ("test.jsonl", '{"text": "karen"}\n'),
        ("test.json", '[{"data": {"text": "karen"}, "annotations": []}]'),
        ("test.json", '[{"text": "karen", "annotation_id": null}]'),
    ],
)
def test_a_test_split_without_tags_is_left_out(tmp_path, caplog, name, content):
    caplog.set_level("INFO")
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "dev.txt").write_text(DEV)
    (tmp_path / name).write_text(content)
    _task, splits = TokenClassification.from_data((str(tmp_path),), TagColumns())
    assert set(splits) == {"train", "validation"}
    assert f"{tmp_path / name} has no labels and is left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.txt", "karen O\n\nminka\n", "test.txt, row 3 has the word 'minka' but no tag"),
        ("test.jsonl", '{"tokens": ["karen"]}\n{"tokens": ["minka"], "tags": ["O"]}\n', "row 1: 'tags' is None, not a"),
        ("test.jsonl", '{"text": "karen", "label": [[0, 5]]}\n', r"row 1: the span \[0, 5\] has no label"),
    ],
)
def test_a_test_split_in_which_tags_are_missing_is_refused(tmp_path, name, content, message):
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "dev.txt").write_text(DEV)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        TokenClassification.from_data((str(tmp_path),), TagColumns())


def test_a_test_split_of_texts_without_entities_is_kept(tmp_path):
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "dev.txt").write_text(DEV)
    (tmp_path / "test.jsonl").write_text('{"text": "karen", "label": []}\n')
    assert TokenClassification.from_data((str(tmp_path),), TagColumns())[1]["test"][0].tags == ("O",)
