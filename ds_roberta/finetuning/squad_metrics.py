"""SQuAD's measures: exact match and token F1, as in the official evaluation script of version 2.0.

Rajpurkar et al. 2016 and 2018, https://rajpurkar.github.io/SQuAD-explorer/. The script of version 1.1 gives the same values
for answers that are more than articles and punctuation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles and superfluous white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(gold: str, predicted: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(predicted))


def f1(gold: str, predicted: str) -> float:
    """F1 of the bags of words; of two texts without words 1, of one 0."""
    gold_words, predicted_words = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not gold_words or not predicted_words:
        return float(gold_words == predicted_words)
    common = (Counter(gold_words) & Counter(predicted_words)).total()
    return 2 * common / (len(gold_words) + len(predicted_words))


def squad_metrics(
    golds: Sequence[Sequence[str]], answers: Sequence[str], null_probabilities: Sequence[float], threshold: float = 0.5
) -> dict[str, float]:
    """The official script's values, in percent.

    Args:
        golds: each question's gold answers; none stands for a question without an answer.
        answers: each question's best answer that is not the null answer.
        null_probabilities: how likely each question has no answer, in [0, 1].
        threshold: a question with a probability above it counts as answered by the null answer. Golds without any
            unanswerable question (SQuAD 1.1) leave no choice: the answers stand as they are.

    Returns:
        `exact` and `f1`. Where questions without an answer are among them also both of these of the questions with an
        answer (`HasAns_`) and of those without (`NoAns_`), and the best values that a threshold can give
        (`best_exact`, `best_f1`) with the lowest of these thresholds (`best_exact_thresh`, `best_f1_thresh`).
    """
    golds = [[gold for gold in of_question if normalize_answer(gold)] for of_question in golds]
    scores = {
        name: [max(score(gold, answer) for gold in of_question or [""]) for of_question, answer in zip(golds, answers)]
        for name, score in (("exact", exact_match), ("f1", f1))
    }
    has_answer = [bool(of_question) for of_question in golds]
    if all(has_answer):
        return {name: _percent(of_questions) for name, of_questions in scores.items()}
    metrics: dict[str, float] = {}
    best: dict[str, float] = {}
    for name, of_questions in scores.items():
        decided = [
            score if probability <= threshold else float(not has)
            for score, probability, has in zip(of_questions, null_probabilities, has_answer)
        ]
        metrics[name] = _percent(decided)
        for prefix, kind in (("HasAns", True), ("NoAns", False)):
            chosen = [score for score, has in zip(decided, has_answer) if has is kind]
            if chosen:
                metrics[f"{prefix}_{name}"] = _percent(chosen)
        best[f"best_{name}"], best[f"best_{name}_thresh"] = best_threshold(
            of_questions, answers, null_probabilities, has_answer
        )
    return metrics | best


def best_threshold(
    scores: Sequence[float], answers: Sequence[str], null_probabilities: Sequence[float], has_answer: Sequence[bool]
) -> tuple[float, float]:
    """The best mean score in percent, and the lowest threshold of the null probability that gives it.

    At first all questions count as unanswered; then the threshold rises over one question after the other.
    """
    current = best = float(sum(not has for has in has_answer))
    threshold = 0.0
    for index in sorted(range(len(scores)), key=null_probabilities.__getitem__):
        current += scores[index] if has_answer[index] else -float(bool(answers[index]))
        if current > best:
            best, threshold = current, null_probabilities[index]
    return 100 * best / len(scores), threshold


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)
