"""SQuAD's metrics as its two official evaluation scripts compute them: exact match and the F1 of words, in percent.

Rajpurkar et al. 2016 and 2018, https://rajpurkar.github.io/SQuAD-explorer/ (evaluate-v1.1.py and -v2.0.py). The two
differ if a text has only articles and punctuation, so both are here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Convert to lower case and remove ASCII punctuation, articles and extra white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(gold: str, predicted: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(predicted))


def f1(gold: str, predicted: str) -> float:
    """F1 of two bags of words; 0 if they have no word in common, as in version 1.1."""
    gold_words, predicted_words = normalize_answer(gold).split(), normalize_answer(predicted).split()
    common = (Counter(gold_words) & Counter(predicted_words)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def f1_or_none(gold: str, predicted: str) -> float:
    """As `f1`, but 1 if neither has words, as in version 2.0."""
    return f1(gold, predicted) or float(not normalize_answer(gold) and not normalize_answer(predicted))


def squad_v1_metrics(golds: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, float]:
    """`exact_match` and `f1` of version 1.1.

    Args:
        golds: each question's gold answers, at least one; the best match counts.
        answers: each question's answer.
    """
    return {
        "exact_match": _percent(_best_scores(exact_match, golds, answers)),
        "f1": _percent(_best_scores(f1, golds, answers)),
    }


def squad_v2_metrics(
    golds: Sequence[Sequence[str]], answers: Sequence[str], null_probabilities: Sequence[float], threshold: float
) -> dict[str, float]:
    """What the script of version 2.0 prints with `--na-prob-file` and `--na-prob-thresh`.

    Args:
        golds: each question's gold answers; none if the context does not answer it.
        answers: each question's best answer that is not the null answer.
        null_probabilities: how likely the context does not answer the question, in [0, 1].
        threshold: a question with a probability above it counts as answered by the null answer.

    Returns:
        `exact`, `f1` and `total`; `HasAns_exact`, `HasAns_f1` and `HasAns_total` for the questions with an answer, if
        there are any, and `NoAns_…` for those without; `best_exact` and `best_f1`, the best that any threshold gives,
        and those thresholds, `best_exact_thresh` and `best_f1_thresh`.
    """
    with_words = [[gold for gold in of_question if normalize_answer(gold)] or [""] for of_question in golds]
    has_answer = [bool(of_question) for of_question in golds]
    metrics: dict[str, float] = {}
    best: dict[str, float] = {}
    for name, score in (("exact", exact_match), ("f1", f1_or_none)):
        raw = _best_scores(score, with_words, answers)
        decided = [
            score if probability <= threshold else float(not has)
            for score, probability, has in zip(raw, null_probabilities, has_answer, strict=True)
        ]
        metrics |= _by_kind(name, decided, has_answer)
        best[f"best_{name}"], best[f"best_{name}_thresh"] = best_threshold(raw, answers, null_probabilities, has_answer)
    answered = sum(has_answer)
    totals = {"total": len(golds), "HasAns_total": answered, "NoAns_total": len(golds) - answered}
    return metrics | {name: total for name, total in totals.items() if total} | best


def best_threshold(
    scores: Sequence[float], answers: Sequence[str], null_probabilities: Sequence[float], has_answer: Sequence[bool]
) -> tuple[float, float]:
    """The best mean score in percent, and the lowest threshold of the null probability that gives it.

    At first all questions count as answered by the null answer; then the threshold rises past one after another.
    """
    current = best = float(sum(not has for has in has_answer))
    threshold = 0.0
    for index in sorted(range(len(scores)), key=null_probabilities.__getitem__):
        current += scores[index] if has_answer[index] else -float(bool(answers[index]))
        if current > best:
            best, threshold = current, null_probabilities[index]
    return 100 * best / len(scores), threshold


def _best_scores(
    score: Callable[[str, str], float], golds: Sequence[Sequence[str]], answers: Sequence[str]
) -> list[float]:
    return [max(score(gold, answer) for gold in texts) for texts, answer in zip(golds, answers, strict=True)]


def _by_kind(name: str, scores: Sequence[float], has_answer: Sequence[bool]) -> dict[str, float]:
    metrics = {name: _percent(scores)}
    for prefix, kind in (("HasAns", True), ("NoAns", False)):
        chosen = [score for score, has in zip(scores, has_answer, strict=True) if has is kind]
        if chosen:
            metrics[f"{prefix}_{name}"] = _percent(chosen)
    return metrics


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)
