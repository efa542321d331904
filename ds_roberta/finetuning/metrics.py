"""How good predictions are, by scikit-learn and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np


def classification_metrics(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
    """
    Args:
        logits: (examples, classes), float.
        labels: (examples,), int.

    Returns:
        `accuracy`, `macro_f1` over the classes that occur in labels or predictions, `matthews_correlation`, and of two
        classes `f1` of the second.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes = logits.shape[-1]
    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
    }
    if classes == 2:
        metrics["f1"] = f1_score(labels, predicted, pos_label=1, zero_division=0)
    return {name: float(value) for name, value in metrics.items()}


def regression_metrics(predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
    """`pearson` and `spearman` of two (examples,) arrays; 0 where one is constant, as they are not defined there."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, labels).statistic),
        "spearman": float(spearmanr(predicted, labels).statistic),
    }
