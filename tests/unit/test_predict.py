"""Predictions of folders with each kind of head: what is written, what is shown, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from shared_fixtures import change_json

from ds_roberta.errors import UserError
from ds_roberta.finetuning import predict as predict_module
from ds_roberta.finetuning.predict import PredictConfig, predict
from ds_roberta.progress import progress_bar

CONTEXT = " ".join(f"karen{number} sulto minka" for number in range(60))


@pytest.fixture(scope="module")
def folders(tokenizer_folder, tmp_path_factory):
    """Untrained models by task, of 62 tokens at most."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 1.0,  # so that labels differ
    }
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "num_labels": 3}
    tags = {"id2label": {0: "O", 1: "B-X", 2: "I-X"}, "num_labels": 3}
    heads = {
        "classification": (transformers.RobertaForSequenceClassification, names),
        "regression": (transformers.RobertaForSequenceClassification, {"num_labels": 1}),
        "token-classification": (transformers.RobertaForTokenClassification, tags),
        "question-answering": (transformers.RobertaForQuestionAnswering, {}),
        "masked-lm": (transformers.RobertaForMaskedLM, {}),
    }
    root = tmp_path_factory.mktemp("models")
    for task, (model_class, head) in heads.items():
        model_class(transformers.RobertaConfig(**config, **head)).save_pretrained(root / task)
        transformers.RobertaTokenizer.from_pretrained(tokenizer_folder).save_pretrained(root / task)
    return root


@pytest.fixture
def ask(folders, tmp_path, capsys):
    """A function that predicts with one of the folders; the rows written and the text shown."""

    def predict_with(task, content=None, name="input.jsonl", **asked):
        if content is not None:
            lines = content if isinstance(content, str) else "\n".join(json.dumps(row) for row in content)
            (tmp_path / name).write_text(lines)
            asked["input"] = tmp_path / name
        settings = {
            "input": None,
            "text": None,
            "text_pair": None,
            "output": tmp_path / "output.jsonl",
            "max_seq_length": None,
            "batch_size": 2,
        }
        predict(PredictConfig(model=folders / task, **{**settings, **asked}))
        rows = (tmp_path / "output.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows], capsys.readouterr().out

    return predict_with


def reference(folders, task, model_class):
    return model_class.from_pretrained(folders / task).eval(), transformers.AutoTokenizer.from_pretrained(
        folders / task
    )


def test_labels_and_their_scores(ask, folders):
    texts = ["karen", "sulto minka " * 9, "minka karen sulto"]
    rows, shown = ask("classification", [{"text": text} for text in texts])
    model, tokenizer = reference(folders, "classification", transformers.RobertaForSequenceClassification)
    for row, text in zip(rows, texts, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].numpy()
        np.testing.assert_allclose([row["scores"][name] for name in ("bad", "fair", "good")], expected, atol=1e-5)
        assert row["text"] == text
        assert row["label"] == model.config.id2label[int(expected.argmax())]
        assert row["score"] == max(row["scores"].values())
    assert f"karen\n  {rows[0]['label']} {rows[0]['score']:.4f}, " in shown


@pytest.mark.parametrize("task", ["classification", "token-classification", "question-answering"])
@pytest.mark.parametrize("changes", [{"output_hidden_states": True, "output_attentions": True}, {"return_dict": False}])
def test_a_config_does_not_decide_what_a_model_returns(ask, folders, tmp_path, task, changes):
    asked = {"question": "karen?", "context": CONTEXT} if task == "question-answering" else {"text": "karen sulto"}
    shutil.copytree(folders / task, tmp_path / "other")
    change_json(tmp_path / "other/config.json", **changes)
    assert ask(tmp_path / "other", **asked) == ask(task, **asked)


def test_a_pair_on_the_command_line(ask):
    rows, shown = ask("classification", text="karen", text_pair="sulto\nminka")
    assert (rows[0]["text"], rows[0]["text_pair"]) == ("karen", "sulto\nminka")
    assert shown.startswith("karen | sulto minka\n  ")
    assert rows[0] != ask("classification", text="karen")[0][0]


def test_numbers(ask):
    rows, shown = ask("regression", "sentence\nkaren\nsulto\n", "input.tsv")
    assert [set(row) for row in rows] == [{"text", "value"}] * 2
    assert f"karen\n  {rows[0]['value']:.4f}\n" in shown


def test_long_texts_are_cut_and_reported_with_the_row(ask, caplog):
    ask("classification", [{"text": "sulto"}, {"text": "karen " * 200}, {"text": "karen " * 99}])
    assert "2 of 3 texts are longer than 62 tokens and were cut, first " in caplog.text
    assert ".jsonl, row 2\n" in caplog.text
    rows, _ = ask("classification", text="karen " * 200)
    assert rows[0]["scores"] != ask("classification", text="karen " * 200, max_seq_length=40)[0][0]["scores"]


def test_entities_of_a_text(ask):
    text = "karen Zyx, sulto (minka) dush."
    rows, shown = ask("token-classification", text=text)
    assert len(rows[0]["words"]) == len(rows[0]["tags"]) == 9
    assert rows[0]["entities"]
    for entity in rows[0]["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
        assert f"{entity['type']}: {entity['text']!r} (characters {entity['start']} to {entity['end']})" in shown


def test_a_row_without_a_word_has_no_entities(ask, folders):
    texts = ["karen Zyx", " ", "sulto"]
    rows, _ = ask("token-classification", [{"text": text} for text in texts])
    assert [row["text"] for row in rows] == texts
    assert [rows[1][name] for name in ("words", "start", "end", "tags", "entities")] == [[]] * 5
    assert rows[::2] == ask("token-classification", [{"text": text} for text in texts[::2]])[0]


def test_no_row_may_have_a_word(ask):
    rows, shown = ask("token-classification", [{"text": " "}, {"text": ""}])
    assert [row["tags"] for row in rows] == [[], []]
    assert shown.count("no entities") == 2


def test_tags_of_words_in_windows(ask, folders):
    words = ["karen", "Zyxwv"] * 40
    rows, _ = ask("token-classification", [{"tokens": ["sulto"]}, {"tokens": words}])
    assert rows[1]["words"] == words
    assert rows[1]["text"] == " ".join(words)
    assert len(rows[1]["tags"]) == 80
    assert rows[1]["entities"]
    for entity in rows[1]["entities"]:
        span = slice(entity["start_word"], entity["end_word"])
        assert entity["text"] == " ".join(words[span]) == rows[1]["text"][entity["start"] : entity["end"]]
        assert all(tag != "O" for tag in rows[1]["tags"][span])
    from_columns, _ = ask("token-classification", "sulto\n\n" + "\n".join(words), "input.conll")
    assert [row["tags"] for row in from_columns] == [row["tags"] for row in rows]


def test_a_model_whose_tags_mark_no_entities_tags_each_word(ask, folders, tmp_path):
    model = transformers.RobertaForTokenClassification.from_pretrained(folders / "token-classification")
    model.config.id2label = {0: "O", 1: "NOUN", 2: "VERB"}
    shutil.copytree(folders / "token-classification", tmp_path / "tagger")
    model.save_pretrained(tmp_path / "tagger")
    (row,), shown = ask(tmp_path / "tagger", text="karen, sulto")
    assert row["words"] == ["karen", ",", "sulto"]
    assert len(row["scores"]) == 3
    assert [row["text"][slice(*span)] for span in zip(row["start"], row["end"], strict=True)] == row["words"]
    assert "entities" not in row
    assert shown == f"karen, sulto\n  karen/{row['tags'][0]} ,/{row['tags'][1]} sulto/{row['tags'][2]}\n"


def test_answers_are_spans_of_their_context(ask):
    asked = {"id": "q", "question": "karen?", "context": CONTEXT, "answers": {"text": ["a"], "answer_start": [1]}}
    rows, shown = ask("question-answering", [asked])
    (row,) = rows
    assert asked.items() <= row.items()
    assert row["id"] == "q"
    assert CONTEXT[row["start"] : row["end"]] == row["answer"] != ""
    assert [candidate["score"] for candidate in row["candidates"]] == sorted(
        (candidate["score"] for candidate in row["candidates"]), reverse=True
    )
    assert sum(candidate["score"] for candidate in row["candidates"]) == pytest.approx(1)
    assert shown.startswith(f"q: karen?\n  {row['answer']!r} (characters {row['start']} to {row['end']}) ")
    assert "no_answer_probability" not in row


def test_no_answer_is_an_answer_if_it_is_allowed(ask, folders):
    asked = {"context": CONTEXT, "question": "karen?"}
    (answered,), _ = ask("question-answering", task_options={"no_answer_threshold": 1.0}, **asked)
    assert answered["answer"] == answered["best_answer"] != ""
    (unanswered,), shown = ask("question-answering", task_options={"no_answer_threshold": 0.0}, **asked)
    assert (unanswered["answer"], unanswered["start"]) == ("", None)
    assert unanswered["best_answer"] == answered["answer"]
    assert unanswered["score"] == unanswered["no_answer_probability"] == answered["no_answer_probability"] > 0
    assert "\n  no answer " in shown


def test_questions_of_squads_file_without_answers(ask):
    entries = [{"id": name, "question": "karen?"} for name in "ab"]
    content = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": entries}]}]}
    rows, _ = ask("question-answering", json.dumps(content), "input.json")
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["answer"] == rows[1]["answer"]


@pytest.mark.parametrize(
    ("task", "asked", "message"),
    [
        ("masked-lm", {"text": "x"}, "holds a RobertaForMaskedLM, which has no head for predictions: fine-tune it"),
        ("nowhere", {"text": "x"}, "config.json is missing"),
        ("classification", {"text": "x", "max_seq_length": 63}, "63 is more than the model's 62 positions"),
        ("classification", {"content": ""}, "has no rows"),
        ("classification", {"content": '{"text": 1}'}, "row 1: 'text' is 1, not a text"),
        ("classification", {"content": '{"a": "b"}'}, "give the one with the text as --text_column"),
        ("classification", {"content": "x", "name": "input.ods"}, "cannot read .*input.ods' as a table"),
        ("token-classification", {"content": "", "name": "x.conll"}, "has no sentences"),
        ("token-classification", {"content": "Anna saw\nBob .\nit too .", "name": "x.txt"}, "row 3 has 3 columns"),
        ("classification", {"content": '{"text": "\\ud83d"}'}, "row 1 is not Unicode .surrogates not allowed"),
        ("classification", {"content": "[" * 5000}, "row 1: not valid JSON"),
        (
            "token-classification",
            {"text": "x", "text_pair": "y"},
            "is of --task token-classification, which takes single",
        ),
        ("question-answering", {"text": "x"}, "give --question and --context"),
        ("question-answering", {"text": "karen?", "text_pair": "x"}, "give --question and --context, or --input"),
        ("classification", {"question": "x", "context": "y"}, "answers no questions: give --text and --text_pair$"),
        ("token-classification", {"question": "x", "context": "y"}, "answers no questions: give --text$"),
        ("question-answering", {"content": '{"question": "x"}'}, "no column 'context'"),
        ("question-answering", {"content": "{}", "name": "x.json"}, "has no list 'data'"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask, task, asked, message):
    with pytest.raises(UserError, match=message):
        ask(task, **asked)


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        ("classification", "label_threshold", 0.4),
        ("classification", "no_answer_threshold", 0.4),
        ("regression", "label_threshold", 0.4),
        ("token-classification", "text_pair_column", "b"),
        ("token-classification", "label_threshold", 0.4),
        ("question-answering", "text_column", "a"),
    ],
)
def test_options_that_do_nothing_for_the_models_task_are_refused(ask, task, option, value):
    with pytest.raises(UserError, match=f"--{option} does nothing with a model of --task {task}: leave it out"):
        ask(task, [{"text": "x"}], task_options={option: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of --input, --text and --question"),
        ({"input": "x.csv", "text": "x"}, "one of --input, --text and --question"),
        ({"question": "x"}, "--question and --context go together"),
        ({"text": "x", "context": "x"}, "--question and --context go together"),
        ({"input": "x.csv", "text_pair": "x"}, "--text_pair goes with --text"),
        ({"text": "x", "glue_task": "RTE"}, "--glue_task needs --output"),
        ({"text": "x", "batch_size": 0}, "--batch_size must be a positive"),
        ({"text": "x", "max_seq_length": -1}, "--max_seq_length must be a positive"),
        ({"text": "x", "task_options": {"text_column": "a"}}, "--text_column does nothing without --input: leave it"),
        ({"question": "x", "context": "y", "task_options": {"text_pair_column": "a"}}, "--text_pair_column does"),
        ({"text": ""}, "--text '' is empty"),
        ({"text": "x", "text_pair": " "}, "--text_pair ' ' is empty"),
        ({"question": "", "context": "x"}, "--question '' is empty"),
        ({"question": "x", "context": "\n"}, r"--context '\\n' is empty"),
    ],
)
def test_a_prediction_that_cannot_be_is_refused(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        PredictConfig(tmp_path, **given)


def test_named_columns_of_a_file_reach_the_prediction(ask):
    options = {"text_column": "a", "text_pair_column": "b"}
    (row,), _ = ask("classification", [{"a": "karen", "b": "sulto", "text": "minka"}], task_options=options)
    assert (row["text"], row["text_pair"], row["input_text"]) == ("karen", "sulto", "minka")


def test_the_progress_and_the_file_written_are_shown(ask, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "ds_roberta")
    bars = []

    def kept_bar(**options):
        bars.append(progress_bar(**options))
        return bars[0]

    monkeypatch.setattr(predict_module, "progress_bar", kept_bar)
    ask("classification", [{"text": "karen"}, {"text": "sulto minka"}, {"text": "to"}])
    assert bars[0].n == bars[0].total > 3
    assert f"wrote {tmp_path / 'output.jsonl'}: 3 rows" in caplog.text


def test_an_output_that_cannot_be_written_is_refused_before_the_work(ask, tmp_path):
    with pytest.raises(UserError, match=r"--output .* choose a file in a folder"):
        ask("classification", text="x", output=tmp_path / "absent" / "x.jsonl")


def test_an_output_that_would_replace_something_else_is_refused(ask, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a device or a pipe: choose a file"):
        ask("classification", text="x", output=tmp_path / "pipe")
    with pytest.raises(UserError, match="is the input: choose another file"):
        ask("classification", '{"text": "x"}', output=tmp_path / "input.jsonl")
    assert (tmp_path / "input.jsonl").read_text() == '{"text": "x"}'


def test_a_model_that_does_not_fit_the_board_is_refused_before_the_input_is_read(ask, tmp_path):
    with pytest.raises(UserError, match="--glue_task RTE does not know the label 'bad'"):
        ask("classification", input=tmp_path / "absent.tsv", output=tmp_path / "RTE.tsv", glue_task="RTE")


def test_damaged_folders_are_refused(ask, folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders / "regression", broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        ask(broken, text="x")
    shutil.copytree(folders / "regression", broken, dirs_exist_ok=True)
    (broken / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"the weights in .* cannot be read"):
        ask(broken, text="x")
    model = transformers.RobertaForSequenceClassification.from_pretrained(folders / "regression")
    torch.nn.init.constant_(model.classifier.out_proj.bias, float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="not finite"):
        ask(broken, text="x")
