"""Words as windows of token ids, tags as labels, and entities as seqeval finds and counts them."""

import numpy as np
import pytest
import transformers

from ds_roberta.finetuning.tagged_sentences import Sentence
from ds_roberta.finetuning.token_classification import (
    entity_metrics,
    find_entities,
    make_word_windows,
    token_labels,
    word_logits,
    word_spans,
)

NAMES = ["O", "B-X", "I-X"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return transformers.RobertaTokenizer.from_pretrained(tokenizer_folder)


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


def test_first_subwords_alone_are_labelled(tokenizer):
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


def test_windows_come_together_again(tokenizer):
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


def test_measures_without_any_entity():
    metrics = entity_metrics([["O"]], [["O"]])
    assert metrics == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1, "by_type": {}}


def test_entities_are_found_with_their_scores():
    found = find_entities(["B-X", "I-X", "O", "I-Y"], np.array([0.9, 0.7, 0.1, 0.5]))
    assert [(entity.type, entity.start, entity.end, round(entity.score, 6)) for entity in found] == [
        ("X", 0, 2, 0.8),
        ("Y", 3, 4, 0.5),
    ]
