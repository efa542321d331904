"""Question answering as a task: what the model is trained on leads to SQuAD's measures."""

import json

import numpy as np
import pytest
import torch
import transformers

from ds_roberta.finetuning.question_answering import QuestionAnswering, SpanOptions

CONTEXT = " ".join(f"karen{number} sulto minka" for number in range(40))


def squad(*answers):
    """A file of questions with these answers, None for none."""
    entries = [
        {
            "id": str(number),
            "question": "karen sulto?",
            "answers": [] if answer is None else [{"text": answer, "answer_start": CONTEXT.index(answer)}],
            "is_impossible": answer is None,
        }
        for number, answer in enumerate(answers)
    ]
    return {"version": "v2.0", "data": [{"paragraphs": [{"context": CONTEXT, "qas": entries}]}]}


def first_version(content):
    for entry in content["data"][0]["paragraphs"][0]["qas"]:
        del entry["is_impossible"]
    return {**content, "version": "1.1"}


@pytest.fixture
def data(tmp_path):
    def write(content):
        for split in ("train", "dev"):
            (tmp_path / f"{split}-x.json").write_text(json.dumps(content))
        return (str(tmp_path),)

    return write


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return transformers.RobertaTokenizer.from_pretrained(tokenizer_folder)


def perfect_logits(encoded):
    """Logits, padded, whose highest values are at the labels."""
    longest = max(len(feature["input_ids"]) for feature in encoded.features)
    starts = np.full((len(encoded.features), longest + 3), -9.0, dtype=np.float32)
    ends = starts.copy()
    for row, feature in enumerate(encoded.features):
        first, last = feature["labels"]
        starts[row, first] = ends[row, last] = 9
    return starts, ends


def test_the_labels_as_logits_measure_as_perfect(data, tokenizer):
    task, splits = QuestionAnswering.from_data(
        data(first_version(squad("karen7 sulto", "karen39"))), SpanOptions(doc_stride=16)
    )
    encoded = task.encode(tokenizer, splits["validation"], 64)
    assert len(encoded.inputs) == 2 < len(encoded.features)
    assert task.metrics(encoded, perfect_logits(encoded)) == {"exact_match": 100, "f1": 100}
    assert task.metric_names[0] == "f1"
    assert not task.results["question_answering"]["may_be_unanswerable"]


def test_questions_without_an_answer(data, tokenizer):
    task, splits = QuestionAnswering.from_data(data(squad("karen7 sulto", None, "karen39")), SpanOptions(doc_stride=16))
    encoded = task.encode(tokenizer, splits["train"], 64)
    metrics = task.metrics(encoded, perfect_logits(encoded))
    assert {name: metrics[name] for name in ("exact", "HasAns_f1", "NoAns_exact", "best_f1", "NoAns_total")} == {
        "exact": 100,
        "HasAns_f1": 100,
        "NoAns_exact": 100,
        "best_f1": 100,
        "NoAns_total": 1,
    }
    assert task.results["question_answering"]["may_be_unanswerable"]
    assert set(task.metric_names) <= set(metrics)


def test_the_loss_is_that_of_transformers_over_all_micro_batches(tokenizer):
    torch.manual_seed(0)
    starts, ends = torch.randn(2, 4, 9)
    labels = torch.randint(0, 9, (4, 2))
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(starts, labels[:, 0]) + cross_entropy(ends, labels[:, 1])) / 2
    torch.testing.assert_close(QuestionAnswering.loss({"start_logits": starts, "end_logits": ends}, labels), expected)
    parts = [
        QuestionAnswering.loss({"start_logits": starts[rows], "end_logits": ends[rows]}, labels[rows], labels.numel())
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    answers = {"text": ["sulto"], "answer_start": [7]}
    row = {"id": "a", "title": "x", "question": "?", "context": CONTEXT, "answers": answers}
    rows = datasets.Dataset.from_list([row])
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(tmp_path / "saved"))
    _task, splits = QuestionAnswering.from_data((str(tmp_path / "saved"),), SpanOptions())
    assert splits["train"][0].answers == ("sulto",)
