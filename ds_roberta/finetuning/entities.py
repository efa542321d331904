"""Words with tags as token ids: windows over sentences, labels at first subwords, and the way back to words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import transformers

from ds_roberta.finetuning.tagged_sentences import Sentence
from ds_roberta.finetuning.task import NO_LABEL


@dataclass(frozen=True)
class WordWindow:
    """A piece of a sentence: `<s> piece </s>`.

    Attributes:
        sentence: the sentence's index.
        words: indices of the words that are labelled here; each word is in exactly one window.
        positions: position of each such word's first subword in `input_ids`.
    """

    sentence: int
    input_ids: list[int]
    words: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Entity:
    """Words [start, end) of a sentence; `score` is the mean probability of their tags."""

    type: str
    start: int
    end: int
    score: float


def make_word_windows(
    tokenizer: transformers.PreTrainedTokenizerBase, sentences: Sequence[Sentence], max_seq_length: int
) -> list[WordWindow]:
    """Windows over each sentence, in order. Every word is encoded with a space before it, as RoBERTa's tokenizer does
    with `add_prefix_space`; where a word alone is longer than a window, its end is cut off."""
    room = max_seq_length - 2
    distinct = sorted({word for sentence in sentences for word in sentence.words})
    encoded = tokenizer(
        [f" {word}" for word in distinct],
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=True,
        verbose=False,
    )["input_ids"]
    ids = {word: word_ids[:room] for word, word_ids in zip(distinct, encoded, strict=True)}
    windows = []
    for index, sentence in enumerate(sentences):
        lengths = [len(ids[word]) for word in sentence.words]
        for start, end, first, last in word_spans(lengths, room):
            input_ids = [tokenizer.bos_token_id]
            positions = []
            for number in range(start, end):
                if first <= number < last:
                    positions.append(len(input_ids))
                input_ids += ids[sentence.words[number]]
            windows.append(WordWindow(index, [*input_ids, tokenizer.eos_token_id], list(range(first, last)), positions))
    return windows


def word_spans(lengths: Sequence[int], room: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows of at most `room` tokens over words of these lengths, each at most `room`; they overlap by up to half.

    Yields:
        start, end of the words in the window, and first, last (exclusive) of those that it labels: two windows share
        the words that both have in halves, so that each word is seen with words on both sides.
    """
    start = first = 0
    while True:
        end, tokens = start, 0
        while end < len(lengths) and (end == start or tokens + lengths[end] <= room):
            tokens += lengths[end]
            end += 1
        if end == len(lengths):
            yield start, end, first, end
            return
        following, shared = end, 0
        most = min(room // 2, room - lengths[end])  # the next window holds one more word at least
        while following - 1 > start and shared + lengths[following - 1] <= most:
            following -= 1
            shared += lengths[following]
        last = (following + end + 1) // 2
        yield start, end, first, last
        start, first = following, last


def token_labels(window: WordWindow, sentence: Sentence, names: Sequence[str]) -> list[int]:
    """A label for each token: the tag's index at a labelled word's first subword, else -100; also where no training
    sentence has the tag."""
    indices = {name: index for index, name in enumerate(names)}
    labels = [NO_LABEL] * len(window.input_ids)
    for word, position in zip(window.words, window.positions, strict=True):
        labels[position] = indices.get(sentence.tags[word], NO_LABEL)
    return labels


def word_logits(windows: Sequence[WordWindow], logits: Sequence[np.ndarray], sentences: int) -> list[np.ndarray]:
    """Each sentence's logits, (words, tags), from its windows', each (T, tags)."""
    found: list[list[np.ndarray]] = [[] for _ in range(sentences)]
    for window, of_window in zip(windows, logits, strict=True):
        found[window.sentence].append(of_window[window.positions])
    return [np.concatenate(pieces) for pieces in found]


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """seqeval's `precision`, `recall`, `f1` of whole entities, `accuracy` of tags, and `by_type`: the first three with
    the number of gold entities (`support`) for each type."""
    from seqeval.metrics.sequence_labeling import accuracy_score, get_entities, precision_recall_fscore_support

    types = sorted({type_ for tags in (gold, predicted) for type_, _, _ in get_entities(tags)})
    every = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
    by_type = precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    return {
        **_measures(every),
        "accuracy": float(accuracy_score(gold, predicted)),
        "by_type": _by_name(types, by_type),
    }


def tag_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Of tags that do not mark entities: `accuracy`, `macro_f1`, and `by_tag`: precision, recall, F1 and the number of
    words (`support`) of each that occurs in the one or the other, by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    words, found = list(chain.from_iterable(gold)), list(chain.from_iterable(predicted))
    names = sorted({*words, *found})
    by_tag = precision_recall_fscore_support(words, found, labels=names, average=None, zero_division=0)
    return {
        "accuracy": float(accuracy_score(words, found)),
        "macro_f1": float(f1_score(words, found, average="macro", zero_division=0)),
        "by_tag": _by_name(names, by_tag),
    }


def find_entities(tags: list[str], probabilities: np.ndarray) -> list[Entity]:
    """seqeval's entities in a sentence's tags.

    Args:
        probabilities: (words,), of each tag.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return [
        Entity(type_, start, last + 1, float(probabilities[start : last + 1].mean()))
        for type_, start, last in get_entities(tags)
    ]


def _by_name(names: list[str], measures: Sequence[Any]) -> dict[str, dict[str, float]]:
    return {
        name: {**_measures(of_name), "support": int(of_name[3])}
        for name, of_name in zip(names, zip(*measures, strict=True), strict=True)
    }


def _measures(measures: Sequence[Any]) -> dict[str, float]:
    return dict(zip(("precision", "recall", "f1"), map(float, measures[:3]), strict=True))
