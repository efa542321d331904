"""How good tags are, and the entities that they mark: seqeval's and scikit-learn's measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

LETTERS_OF_IOBES = {"L": "E", "U": "S"}  # for BILUO's, which seqeval's default mode does not know


@dataclass(frozen=True)
class Entity:
    """Words [start, end) of a sentence; `score` is the mean probability of their tags."""

    type: str
    start: int
    end: int
    score: float


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """seqeval's `precision`, `recall`, `f1` of whole entities, `accuracy` of tags, and `by_type`: the first three with
    the number of gold entities (`support`) for each type.

    All schemes are read in seqeval's default mode, as conlleval does: incomplete entities count, too.
    """
    from seqeval.metrics.sequence_labeling import accuracy_score, get_entities, precision_recall_fscore_support

    gold, predicted = ([_as_iobes(tags) for tags in sentences] for sentences in (gold, predicted))
    types = sorted({type_ for tags in (gold, predicted) for type_, _, _ in get_entities(tags)})
    every = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
    by_type = precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    return {
        **_measures(every),
        "accuracy": float(accuracy_score(gold, predicted)),
        "by_type": _by_name(types, by_type),
    }


def tag_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """scikit-learn's metrics of tags that do not mark entities: `accuracy`, `macro_f1`, and `by_tag`: precision,
    recall, F1 and the number of words (`support`) for each tag that occurs in either."""
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
    """The entities in a sentence's tags, by seqeval.

    Args:
        probabilities: (words,), one for each tag.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return [
        Entity(type_, start, last + 1, float(probabilities[start : last + 1].mean()))
        for type_, start, last in get_entities(_as_iobes(tags))
    ]


def _as_iobes(tags: Sequence[str]) -> list[str]:
    return [LETTERS_OF_IOBES.get(tag[0], tag[0]) + tag[1:] for tag in tags]


def _by_name(names: list[str], measures: Sequence[Any]) -> dict[str, dict[str, float]]:
    return {
        name: {**_measures(of_name), "support": int(of_name[3])}
        for name, of_name in zip(names, zip(*measures, strict=True), strict=True)
    }


def _measures(measures: Sequence[Any]) -> dict[str, float]:
    return dict(zip(("precision", "recall", "f1"), map(float, measures[:3]), strict=True))
