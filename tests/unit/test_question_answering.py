"""Question answering: questions as windows of token ids, answers as labels, logits as answers, SQuAD's metrics."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers

from ds_roberta.errors import UserError
from ds_roberta.finetuning.question_answering import (
    QuestionAnswering,
    SpanOptions,
    Window,
    decode,
    make_windows,
    span_labels,
    window_starts,
)
from ds_roberta.finetuning.squad import Question
from ds_roberta.transformers_folder import read_model

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


def test_the_worst_questions_are_those_with_the_highest_loss(data, tokenizer):
    task, splits = QuestionAnswering.from_data(data(squad("karen7 sulto", None, "karen39")), SpanOptions(doc_stride=16))
    encoded = task.encode(tokenizer, splits["train"], 64)
    starts, ends = perfect_logits(encoded)
    windows = [row for row, window in enumerate(encoded.windows) if window.question == 2]
    starts[windows], ends[windows] = 0, 0
    starts[windows, 0], ends[windows, 0] = 5, 5  # no answer, while some of the windows hold one
    worst, *others = task.error_analysis(encoded, (starts, ends))["worst"]
    assert (worst["text"], worst["gold"], worst["predicted"]) == ("karen sulto?", "karen39", "no answer")
    assert {(each["gold"], each["predicted"]) for each in others} == {("karen7 sulto",) * 2, ("no answer",) * 2}
    labels = torch.tensor([encoded.features[row]["labels"] for row in windows])
    expected = [
        float(task.loss({"start_logits": torch.tensor(starts[[row], :length]),
                         "end_logits": torch.tensor(ends[[row], :length])}, labels[[number]]))
        for number, row in enumerate(windows) for length in [len(encoded.features[row]["input_ids"])]
    ]  # fmt: skip
    assert worst["loss"] == pytest.approx(np.mean(expected))
    assert worst["loss"] > 0.5 > max(each["loss"] for each in others)


def test_the_loss_is_that_of_transformers_over_all_micro_batches(tokenizer):
    torch.manual_seed(0)
    starts, ends = torch.randn(2, 4, 9)
    labels = torch.randint(0, 9, (4, 2))
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(starts, labels[:, 0]) + cross_entropy(ends, labels[:, 1])) / 2
    loss = QuestionAnswering(False, SpanOptions()).loss
    torch.testing.assert_close(loss({"start_logits": starts, "end_logits": ends}, labels), expected)
    parts = [
        loss({"start_logits": starts[rows], "end_logits": ends[rows]}, labels[rows], labels.numel())
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_a_model_of_three_classes_gets_a_head_of_two_outputs(roberta_folder, tmp_path):
    folder = tmp_path / "of three classes"
    config = transformers.RobertaConfig.from_pretrained(roberta_folder, num_labels=3)
    transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    changes = QuestionAnswering(False, SpanOptions()).head
    model = read_model(folder, transformers.RobertaForQuestionAnswering, changes=changes)
    assert model(input_ids=torch.tensor([[0, 5, 2]])).start_logits.shape == (1, 3)


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    answers = {"text": ["sulto"], "answer_start": [7]}
    row = {"id": "a", "title": "x", "question": "?", "context": CONTEXT, "answers": answers}
    rows = datasets.Dataset.from_list([row])
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(tmp_path / "saved"))
    _task, splits = QuestionAnswering.from_data((str(tmp_path / "saved"),), SpanOptions())
    assert splits["train"][0].answers == ("sulto",)


WORDS = ("karen sulto minka torenvor lika dush  pasul\n katomi " * 5).strip()


def question(context=WORDS, answer=None, text="Where is karen sulto?"):
    start = None if answer is None else context.rindex(answer)
    return Question("x", "x", text, context, () if answer is None else (answer,), start)


def test_windows_are_pairs_as_the_tokenizer_makes_them(tokenizer):
    asked = question()
    (window,) = make_windows(tokenizer, [asked], 500, 128)
    assert window.input_ids == tokenizer(asked.question, asked.context)["input_ids"]


def test_windows_cover_the_context_and_overlap(tokenizer):
    asked = question()
    windows = make_windows(tokenizer, [asked], 48, 16)
    assert len(windows) > 3
    assert all(len(window.input_ids) <= 48 for window in windows)
    whole = tokenizer(asked.context, add_special_tokens=False)["input_ids"]
    pieces = [window.input_ids[window.first : -1] for window in windows]
    starts = window_starts(len(whole), len(pieces[0]), 16)
    assert pieces == [whole[start : start + len(pieces[0])] for start in starts]
    assert starts[-1] + len(pieces[-1]) == len(whole)


@pytest.mark.parametrize(
    ("tokens", "room", "stride", "starts"),
    [
        (10, 10, 4, [0]),
        (11, 10, 4, [0, 4]),
        (14, 10, 4, [0, 4]),
        (15, 10, 4, [0, 4, 8]),
        (30, 10, 128, [0, 5, 10, 15, 20]),  # half of the room at most
        (3, 1, 128, [0, 1, 2]),
        (0, 10, 4, [0]),
    ],
)
def test_where_windows_begin(tokens, room, stride, starts):
    assert window_starts(tokens, room, stride) == starts


@pytest.mark.parametrize("answer", ["katomi", "pasul\n katomi", "lika dush  pasul", "karen", "aren"])
def test_labels_lead_back_to_the_answer(tokenizer, answer):
    asked = question(answer=answer)
    found = set()
    for window in make_windows(tokenizer, [asked], 48, 16):
        first, last = span_labels(window, asked)
        assert (first == 0) == (last == 0)
        if first:
            span = window.offsets[first - window.first][0], window.offsets[last - window.first][1]
            found.add(asked.context[slice(*span)])
            assert span[0] <= asked.start < asked.start + len(answer) <= span[1]
    assert found == {"karen" if answer == "aren" else answer}


def test_a_window_without_the_whole_answer_has_none(tokenizer):
    asked = question(answer=WORDS[10:-10])
    assert {span_labels(window, asked) for window in make_windows(tokenizer, [asked], 48, 16)} == {(0, 0)}


def test_long_questions_are_cut_and_found(tokenizer, caplog):
    long = question(text=WORDS)
    windows = make_windows(tokenizer, [long], 48, 16)
    assert max(len(window.input_ids) for window in windows) == 48
    assert windows[0].first == 24 + 3
    caplog.clear()
    make_windows(tokenizer, [question(), replace(long, place="x, row 2")], 48, 16)
    assert "1 of 2 questions are too long and were cut, first x, row 2" in caplog.text


def test_letters_of_special_tokens_stay_text(tokenizer):
    asked = question(context="karen </s> sulto", answer="sulto")
    (window,) = make_windows(tokenizer, [asked], 64, 16)
    assert window.input_ids.count(tokenizer.eos_token_id) == 3
    first, last = span_labels(window, asked)
    assert asked.context[window.offsets[first - window.first][0] : window.offsets[last - window.first][1]] == "sulto"


def window_of(words, first=3):
    """A window whose tokens are one character each, of which spaces are empty."""
    offsets = np.array([(place, place + (letter != " ")) for place, letter in enumerate(words)], dtype=np.int32)
    return Window(0, [0] * (first + len(words) + 1), first, offsets)


def logits(window, **places):
    found = np.full(len(window.input_ids), -5.0)
    for place, value in places.items():
        found[window.first + int(place[1:]) if place != "null" else 0] = value
    return found


def test_the_best_span_is_decoded():
    window = window_of("abcdef")
    found = decode([window], [logits(window, _1=4, _4=3, null=1)], [logits(window, _2=5, _0=9, null=2)], SpanOptions())
    assert (found.spans[0].start, found.spans[0].end, found.spans[0].score) == (1, 3, 9)
    assert found.null_score == 3
    assert found.null_probability == pytest.approx(1 / (1 + np.exp(6)))
    assert all(span.start < span.end for span in found.spans)
    ordered = sorted(found.spans, key=lambda span: span.start)
    assert all(one.end <= other.start for one, other in pairwise(ordered))


def test_spans_are_short_and_within_the_context():
    window = window_of("a bcd")
    starts, ends = logits(window, _0=9, _1=20), logits(window, _4=9, _2=3, _1=20)
    starts[2] = ends[2] = 50  # in the question
    best = decode([window], [starts], [ends], SpanOptions(max_answer_length=3)).spans[0]
    assert (best.start, best.end) == (0, 3)


@pytest.mark.parametrize("seed", range(5))
def test_no_span_is_better_than_the_first(seed):
    rng = np.random.default_rng(seed)
    windows = [window_of("abcd efgh"), window_of("ij")]
    starts, ends = ([rng.normal(size=len(window.input_ids)) for window in windows] for _ in range(2))
    best = decode(windows, starts, ends, SpanOptions(max_answer_length=4)).spans[0]
    scores = [
        of_starts[window.first + first] + of_ends[window.first + last]
        for window, of_starts, of_ends in zip(windows, starts, ends, strict=True)
        for first, (begin, end) in enumerate(window.offsets)
        for last in range(first, min(first + 4, len(window.offsets)))
        if begin < end and window.offsets[last][0] < window.offsets[last][1]
    ]
    assert best.score == pytest.approx(max(scores))


def test_the_null_answer_must_hold_in_all_windows():
    one, two = window_of("ab"), window_of("cd")
    found = decode(
        [one, two],
        [logits(one, null=8), logits(two, null=1, _0=2)],
        [logits(one, null=8), logits(two, null=1, _1=2)],
        SpanOptions(n_best_size=1),
    )
    assert found.null_score == 2
    assert [(span.start, span.end) for span in found.spans] == [(0, 2)]
    assert found.probabilities(with_null=True) == [pytest.approx(1 / (1 + np.exp(-2)))]


def test_a_context_without_words_has_no_answer():
    window = window_of("  ")
    found = decode([window], [logits(window)], [logits(window)], SpanOptions())
    assert found.spans == ()
    assert found.null_probability == 1


def test_a_test_split_without_answers_is_left_out(data, tmp_path, caplog):
    caplog.set_level("INFO")
    asked = {"id": "a", "question": "karen?", "context": CONTEXT}
    article = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [{"id": "a", "question": "karen?"}]}]}]}
    no_text = {"text": [], "answer_start": []}
    for content in (asked, *({**asked, "answers": none} for none in (None, [], no_text)), article):
        (tmp_path / "test.json").write_text(json.dumps(content))
        _task, splits = QuestionAnswering.from_data(data(squad("karen39")), SpanOptions())
        assert set(splits) == {"train", "validation"}
        assert f"{tmp_path / 'test.json'} has no labels and is left out" in caplog.text
        caplog.clear()
    (tmp_path / "test.json").write_text(
        json.dumps([{**asked, "is_impossible": True, "answers": []}, {**asked, "id": "b"}])
    )
    with pytest.raises(UserError, match=r"test.json, row 2: 'answers' is None"):
        QuestionAnswering.from_data(data(squad("karen39")), SpanOptions())
