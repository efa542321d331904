"""Each task with the real commands: a small model is fine-tuned on a few rows, and its predictions give its metrics."""

import json

import pytest
import torch
from commands import REPOSITORY, environment, launch
from forked import run_ranks
from safetensors.torch import load_file
from seqeval.metrics import accuracy_score, f1_score
from sklearn.metrics import accuracy_score as share_of_equal
from sklearn.metrics import f1_score as share_f1

from ds_roberta.finetuning.squad_metrics import squad_v1_metrics, squad_v2_metrics

FINETUNE, PREDICT = REPOSITORY / "launch/finetune.py", REPOSITORY / "launch/predict.py"
CONTEXTS = [f"pa karen{number} sulto lived in minka{number} . torenvor dush ." for number in range(24)]


@pytest.fixture
def finetuned(roberta_folder, tmp_path):
    """A function that fine-tunes on the same file for training and validation, and asks about that file: the metrics
    of the one, the rows of the other."""

    def finetune_and_ask(task, content, name, *options):
        (tmp_path / f"train{name}").write_text(content)
        (tmp_path / f"dev{name}").write_text(content)
        files = [tmp_path / f"{split}{name}" for split in ("train", "dev")]
        launch(
            *(FINETUNE, "--model", roberta_folder, "--task", task, "--data", *files, "--output_dir", "tuned"),
            *("--num_train_epochs", "4", "--learning_rate", "1e-2", *options),
            cwd=tmp_path,
        )
        launch(PREDICT, "--model", "tuned", "--input", files[1], "--output", "answers.jsonl", cwd=tmp_path)
        best = json.loads((tmp_path / "tuned/results.json").read_text())["best"]
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        return best["validation"], rows

    return finetune_and_ask


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_classification(finetuned):
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(CONTEXTS)]
    metrics, answers = finetuned("classification", lines(rows), ".jsonl")
    assert metrics["accuracy"] == share_of_equal([row["label"] for row in rows], [row["label"] for row in answers])


def test_multi_label_classification(finetuned):
    rows = [{"text": text, "label": [name for name, k in (("a", 2), ("b", 3)) if number % k == 0]}
            for number, text in enumerate(CONTEXTS)]  # fmt: skip
    metrics, answers = finetuned("multi-label-classification", lines(rows), ".jsonl", "--choose_label_threshold")
    expected, predicted = ([[name in row[key] for name in "ab"] for row in found]
                           for key, found in (("label", rows), ("labels", answers)))  # fmt: skip
    assert metrics["best_micro_f1"] == pytest.approx(share_f1(expected, predicted, average="micro"))
    assert {row["threshold"] for row in answers} == {metrics["best_threshold"]}


def test_regression(finetuned):
    rows = "".join(f"{text}\t{number}\n" for number, text in enumerate(CONTEXTS))
    metrics, answers = finetuned("regression", f"sentence\tscore\n{rows}", ".tsv")
    assert -1 <= metrics["pearson"] <= 1
    assert [row["text"] for row in answers] == CONTEXTS


def test_token_classification(finetuned):
    words = [text.split() for text in CONTEXTS]
    tags = [["B-X" if word[:5] == "karen" else "I-X" if word == "sulto" else "O" for word in row] for row in words]
    columns = "\n\n".join("\n".join(map("\t".join, zip(*row, strict=True))) for row in zip(words, tags, strict=True))
    metrics, answers = finetuned("token-classification", columns, ".conll")
    predicted = [row["tags"] for row in answers]
    assert metrics["f1"] == pytest.approx(f1_score(tags, predicted))
    assert metrics["f1"] > 0.5  # a word determines its tag
    assert metrics["accuracy"] == pytest.approx(accuracy_score(tags, predicted))
    assert metrics["by_type"]["X"]["support"] == len(CONTEXTS)


def squad(version, without_answer):
    paragraphs = []
    for number, context in enumerate(CONTEXTS):
        answer = f"minka{number}"
        answers = [] if number in without_answer else [{"text": answer, "answer_start": context.index(answer)}]
        marks = {"is_impossible": not answers} if version == "v2.0" else {}
        entry = {"id": str(number), "question": "karen lived ?", "answers": answers, **marks}
        paragraphs.append({"context": context, "qas": [entry]})
    return {"version": version, "data": [{"title": "x", "paragraphs": paragraphs}]}


def test_question_answering(finetuned):
    metrics, answers = finetuned("question-answering", json.dumps(squad("1.1", ())), "-v1.json")
    golds = [[f"minka{number}"] for number in range(len(CONTEXTS))]
    expected = squad_v1_metrics(golds, [row["answer"] for row in answers])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_question_answering_with_contexts_that_have_no_answer(finetuned):
    without = range(0, len(CONTEXTS), 3)
    metrics, answers = finetuned("question-answering", json.dumps(squad("v2.0", without)), "-v2.json")
    golds = [[] if number in without else [f"minka{number}"] for number in range(len(CONTEXTS))]
    null_probabilities = [row["no_answer_probability"] for row in answers]
    expected = squad_v2_metrics(golds, [row["best_answer"] for row in answers], null_probabilities, 0.5)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    decided = squad_v2_metrics(golds, [row["answer"] for row in answers], [0.0] * len(golds), 1.0)
    assert {name: metrics[name] for name in ("exact", "f1")} == pytest.approx(
        {name: decided[name] for name in ("exact", "f1")}
    )


def test_zero_3_on_two_processes_trains_what_one_process_does(roberta_folder, tmp_path):
    deepspeed_config = json.loads((REPOSITORY / "ds_configs/finetune.json").read_text())
    deepspeed_config["zero_optimization"]["stage"] = 3
    (tmp_path / "zero3.json").write_text(json.dumps(deepspeed_config))
    content = lines([{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(CONTEXTS)])
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(content)
    settings = ("--model", roberta_folder, "--task", "classification", "--data", tmp_path, "--num_train_epochs", "3")
    settings += ("--learning_rate", "1e-3", "--train_batch_size", "8")
    settings += ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
    launch(FINETUNE, *settings, "--output_dir", "one", cwd=tmp_path)
    command = (FINETUNE, *settings, "--deepspeed_config", "zero3.json", "--output_dir", "two")
    run_ranks(2, *command, cwd=tmp_path, environment=environment(tmp_path), seconds=280)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    losses = [[epoch["loss"] for epoch in found["settings"][0]["runs"][0]["epochs"]] for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][2] < losses[0][0]
    assert two["best"]["test"]["loss"] == pytest.approx(two["best"]["validation"]["loss"], rel=1e-5)  # the same rows
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)


def test_a_test_split_is_measured_after_training_at_any_stage(roberta_folder, tmp_path):
    """Trainer by itself evaluates with DeepSpeed only what it has just trained, or at stage 3."""
    content = lines([{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(CONTEXTS[:16])])
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(content)
    launch(
        *(FINETUNE, "--model", roberta_folder, "--task", "classification", "--data", tmp_path, "--output_dir", "tuned"),
        *("--num_train_epochs", "1", "--deepspeed_config", REPOSITORY / "ds_configs/finetune.json"),
        cwd=tmp_path,
    )
    best = json.loads((tmp_path / "tuned/results.json").read_text())["best"]
    assert best["test"]["loss"] == pytest.approx(best["validation"]["loss"], rel=1e-5)  # the same rows
    worst = json.loads((tmp_path / "tuned/error_analysis.json").read_text())["worst"]
    losses = [each["loss"] for each in worst]
    assert sum(losses) / len(losses) == pytest.approx(best["validation"]["loss"], rel=1e-5)


def test_errors_are_one_line(roberta_folder, tmp_path):
    (tmp_path / "train.conll").write_text("karen B-X\nsulto\n")
    (tmp_path / "dev.conll").write_text("karen B-X\n")
    printed = launch(
        *(FINETUNE, "--model", roberta_folder, "--task", "token-classification", "--data", tmp_path),
        *("--output_dir", "tuned"),
        cwd=tmp_path,
        code=2,
    )
    assert printed.splitlines()[-1].startswith("error: ")
    assert "train.conll, row 2 has the word 'sulto' but no tag" in printed
    assert "Traceback" not in printed
    printed = launch(PREDICT, "--model", roberta_folder, "--text", "x", cwd=tmp_path, code=2)
    assert "which has no head for predictions" in printed
    assert "Traceback" not in printed
