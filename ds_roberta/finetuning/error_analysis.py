"""What a fine-tuned model confuses on the validation examples, and those that it gets most wrong.

Fine-tuning writes it beside `results.json`; the report shows it:

    {"unit": "examples", "labels": ["a", "b"], "confusion": {"a": {"a": 7, "b": 2}, …}, "worst": [{"text": …}, …]}

With several labels for each example, `label_counts` takes the place of `confusion`; a regression has neither.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ds_roberta.finetuning.tagged_sentences import Sentence
from ds_roberta.finetuning.task import log_softmax, one_line

ERROR_ANALYSIS = "error_analysis.json"
WORST_EXAMPLES = 50
LONGEST_TEXT = 300


def confusion(gold: Iterable[str], predicted: Iterable[str], labels: Sequence[str], unit: str) -> dict[str, Any]:
    """How many units, such as examples or words, of each gold label have each predicted label; zeros are left out."""
    order = {label: index for index, label in enumerate(labels)}
    rows: dict[str, dict[str, int]] = {row: {} for row in labels}
    counts = Counter(zip(gold, predicted, strict=True))
    for row, column in sorted(counts, key=lambda pair: order[pair[1]]):
        rows[row][column] = counts[row, column]
    return {"unit": unit, "labels": list(labels), "confusion": rows}


def tag_errors(sentences: Sequence[Sentence], logits: Sequence[np.ndarray], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The confusion of the words' kinds, and the worst sentences, with the tags that are wrong.

    A sentence's loss is the mean over its words, its probabilities are geometric means.

    Args:
        logits: of each sentence, (words, tags).
        kinds: what each of the model's tags counts as, in the order of the tags.
    """
    indices = {tag: index for index, tag in enumerate(kinds)}
    names = list(kinds)
    gold_kinds, predicted_kinds, examples = [], [], []
    for sentence, scores in zip(sentences, map(log_softmax, logits), strict=True):
        tags = [names[index] for index in scores.argmax(-1)]
        known = [(word, indices[tag]) for word, tag in enumerate(sentence.tags) if tag in indices]
        gold_kinds += [kinds[sentence.tags[word]] for word, _ in known]
        predicted_kinds += [kinds[tags[word]] for word, _ in known]
        loss = -float(np.mean([scores[place] for place in known])) if known else 0.0
        wrong = [word for word, tag in enumerate(sentence.tags) if tag != tags[word]]
        texts = (" ".join(f"{sentence.words[word]}/{found[word]}" for word in wrong) for found in (sentence.tags, tags))
        examples.append(
            example(
                sentence.place,
                [sentence.text or " ".join(sentence.words)],
                *texts,
                loss=loss,
                gold_probability=math.exp(-loss),
                predicted_probability=math.exp(scores.max(-1).mean()),
            )
        )
    return confusion(gold_kinds, predicted_kinds, list(dict.fromkeys(kinds.values())), "words") | worst_examples(
        examples
    )


def label_counts(applies: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """True positives, false positives and false negatives of each label.

    Args:
        applies: (examples, labels), bool.
        predicted: (examples, labels), bool.
    """
    pairs = {
        "true_positives": applies & predicted,
        "false_positives": ~applies & predicted,
        "false_negatives": applies & ~predicted,
    }
    counts = {kind: found.sum(0).tolist() for kind, found in pairs.items()}
    of_labels = {name: {kind: found[index] for kind, found in counts.items()} for index, name in enumerate(names)}
    return {"unit": "examples", "labels": list(names), "label_counts": of_labels}


def example(place: str, texts: Iterable[str], gold: str, predicted: str, **numbers: float) -> dict[str, Any]:
    """An example for `worst_examples`.

    Args:
        texts: a text, or the two of a pair; long ones are cut.
        numbers: the `loss` and, if the task has them, `gold_probability` and `predicted_probability`.
    """
    text = " | ".join(map(_cut, texts))
    return {"place": place, "text": text, "gold": _cut(gold), "predicted": _cut(predicted), **numbers}


def worst_examples(examples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The examples with the highest loss, the highest first."""
    return {"worst": sorted(examples, key=lambda each: -each["loss"])[:WORST_EXAMPLES]}


def _cut(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT - 1]}…"
