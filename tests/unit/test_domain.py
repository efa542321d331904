"""`benchmarks.domain`: the task has no leak, rates are multiplied, figures are those of the right runs."""

import argparse
import json
import random

import pytest
from prepare import prepare_corpus

from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from preprocessing.reading.documents import ReadOptions
from preprocessing.units import ShardOptions

domain = pytest.importorskip("benchmarks.domain")  # it needs rensa and matplotlib
report, texts = (pytest.importorskip(f"benchmarks.{name}") for name in ("domain_report", "domain_texts"))
WORDS = [f"{first}{second}" for first in ("ka", "to", "mi", "ren") for second in ("sul", "pa", "vor", "li")]
BOILERPLATE = " ".join(WORDS[:16])


def line(seed, count=20):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture(scope="module")
def documents():
    """By their first lines; some lines are too short, one is in all documents."""
    return {
        line(f"first {number}"): {
            "text": "\n".join([line(f"first {number}"), "short", BOILERPLATE, line(f"last {number}")]),
            "source": "ab"[number % 2],
        }
        for number in range(300)
    }


@pytest.fixture(scope="module")
def prepared(documents, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("domain")
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents.values()))
    options = ShardOptions(ReadOptions(source_column="source"), validation_fraction=texts.HELD_OUT)
    prepare_corpus((str(path),), tokenizer_folder, folder / "data", options)
    return Corpus.open(folder / "data")


def test_passages_are_of_held_out_documents_and_each_document_is_in_one_split(documents, prepared):
    passages = texts.passages_of(prepared, lambda text: len(text.split()) >= texts.SHORTEST_WORDS)
    of_line = {text: document for document in documents.values() for text in document["text"].split("\n")}
    assert len(passages) == 2 * prepared.manifest.documents("validation") + 1 > 30
    assert [each.source for each in passages if each.text == BOILERPLATE] == ["a"]  # whose documents come first
    splits = {}
    for each in passages:
        if each.text != BOILERPLATE:
            document = of_line[each.text]
            assert not texts.is_training_text(document["text"], {})
            assert each.source == document["source"]
            splits.setdefault(document["text"], set()).add(each.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "validation"}
    assert set(texts.texts_of(prepared, "train")) == {
        document["text"] for document in documents.values() if texts.is_training_text(document["text"], {})
    }


def test_a_passage_must_fit_with_every_tokenizer(prepared):
    folder = prepared.folder / TOKENIZER_FOLDER
    tokens = len(texts.training_tokenizer(folder).encode(line(0)))  # with its two special tokens
    assert texts.fitting([folder], tokens)(line(0))
    assert not texts.fitting([folder], tokens - 1)(line(0))
    assert not texts.fitting([folder], 128)(line(0, texts.SHORTEST_WORDS - 1))


def passages(source, split, count):
    return [texts.Passage(line(f"{source} {split} {number}", 30), source, split) for number in range(count)]


def test_the_task_leaves_out_near_copies_and_sources_with_few_passages():
    some = {(source, split): passages(source, split, 20) for source in "ab" for split in ("train", "validation")}
    training = some["a", "train"][0].text
    copied = texts.Passage(f"{some['b', 'train'][3].text} more", "a", "validation")
    few = [*passages("c", "train", 20), *passages("c", "validation", 3), *passages("", "train", 20)]
    every = [each for group in some.values() for each in group]
    task, counts = texts.task_of([*every, copied, *few], ["other", f"before {training} after"])
    assert set(task) == set(every) - {some["a", "train"][0]}
    assert counts["a"] == {"train": 19, "validation": 20, "near copies": 2}
    assert counts["c"] == {"train": 20, "validation": 3, "near copies": 0}


def test_passages_for_nats_per_byte_are_no_copies_of_training_text():
    some = passages("a", "train", 6)
    order = texts.first_by_hash(some, 6)
    assert texts.without_copies(some, [], 3) == (order[:3], 0)
    copied = f"before {order[1].text} after"
    assert texts.without_copies(some, [copied], 3) == ([order[0], *order[2:4]], 1)
    assert texts.without_copies(some, [copied], 9) == ([order[0], *order[2:]], 1)


def test_the_largest_sources_give_the_same_passages_in_any_order(monkeypatch):
    monkeypatch.setattr(texts, "LARGEST", {"train": 15, "validation": 12})
    some = [each for source in "ab" for split in texts.LARGEST for each in passages(source, split, 20)]
    task, counts = texts.task_of(some, [])
    assert counts["b"] == {"train": 15, "validation": 12, "near copies": 0}
    assert set(texts.task_of(some[::-1], [])[0]) == set(task)


def test_a_task_needs_two_sources():
    with pytest.raises(UserError, match=r"needs two sources .* --source_column"):
        texts.task_of([*passages("a", "train", 20), *passages("a", "validation", 20)], [])


def test_the_recipe_s_rates_for_the_width_are_multiplied_to_continue(roberta_folder):
    assert domain.rates(roberta_folder, 0.5) == {"learning_rate": 1e-3, "muon_lr": 0.005}
    assert domain.rates(roberta_folder, None) == {}


def test_nats_per_byte_weigh_passages_by_their_bytes(roberta_folder):
    first, second = line(1), f"{line(2, 5)} ü"
    rows = [{"text": first, "kind": "a"}, {"text": second, "kind": "b"}]
    rows += [{"text": text, "kind": "both"} for text in (first, second)]
    found = domain.nats_per_byte(roberta_folder, rows)
    sizes = [len(text.encode()) for text in (first, second)]
    assert found["both"] * sum(sizes) == pytest.approx(found["a"] * sizes[0] + found["b"] * sizes[1])
    assert found["a"] != pytest.approx(found["b"])


def test_rows_have_the_figures_of_their_runs_as_far_as_they_are_finished():
    options = argparse.Namespace(seeds=(0, 1), learning_rate_factors=(0.3, 1.0))
    cases = domain.cases_of(options)

    def losses(general, by_byte, own=True):
        per_token = {"domain": {"loss": 4.0}, **({"general": {"loss": general}} if own else {})}
        return {"per_token": per_token, "per_byte": {"domain": by_byte, "general": 2 * by_byte}}

    found = {
        "before-losses": losses(3.0, 1.5),
        "own-0.3-seed0": {"tokens": 1e6, "step_seconds": 50.0},
        "own-0.3-seed0-losses": losses(3.2, 1.0),
        "own-0.3-seed1-losses": losses(3.4, 1.2),
        "new-0.3-seed1-losses": losses(None, 1.1, own=False),
        "own-1-seed0-task": {"scores_by_rate": {"0.0001": [0.7], "0.001": [0.9]}},
        "own-1-seed1-task": {"scores_by_rate": {"0.0001": [0.8], "0.001": [0.5]}},
        "scratch-seed0-task": {"scores_by_rate": {"0.0001": [0.6], "0.001": [0.5]}},
    }
    before, own, new, fast, *_ = [row.split(" | ", 1)[1] for row in list(report.table(options, cases, found))[2:]]
    assert before == " |  | 4.000 | 3.000 | 1.500 | 3.000 |  |"
    assert own == "1.00 | 50 | 4.000 | 3.300 [3.200, 3.400] | 1.100 [1.000, 1.200] | 2.200 [2.000, 2.400] |  |"
    assert new == " |  | 4.000 |  | 1.100 | 2.200 |  |"
    assert fast.endswith("| 0.750 [0.700, 0.800] (0.0001) |")
    rows = [row.split(" | ") for row in report.comparisons(options, cases, found)][2:]
    assert [cells[1:] for cells in rows if cells[0].startswith("| continued, own tokenizer, rates × 0.3")] == [
        ["the model as it was", "-0.400", "-0.800", " |"]
    ]
    assert [cells[2] for cells in rows if "continued, own tokenizer, rates × 0.3" in cells[1]] == [
        "-0.100, one seed, inside the spread"
    ]
    assert [cells[-1] for cells in rows if cells[1].startswith("from scratch")] == ["+0.100, one seed |"]


def test_the_report_says_which_sources_are_left_out_and_what_a_constant_answer_is_worth():
    counts = {"a": (500, 30), "b": (400, 10), "c": (80, 9)}
    task = {name: {"train": train, "validation": count, "near copies": 0} for name, (train, count) in counts.items()}
    sizes = {"vocab_size": {"own": 8192}, "tokens": {"own": 5e6}, "documents": {"train": 9}, "passages": {"domain": 2},
             "near_copies": {"domain": 1}, "model": {"num_hidden_layers": 2, "hidden_size": 128}}  # fmt: skip
    lines = list(report._texts({"texts": {**sizes, "task": task}}))
    assert "The task has 2 sources, and an accuracy of 0.750 if" in lines[0]
    assert [row.split(" | ")[0] for row in lines[4:-1]] == ["| a", "| b", "| c (left out)"]
