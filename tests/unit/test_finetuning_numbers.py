"""Fine-tuning's numbers: losses of parts, metrics, and which run is the best."""

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ds_roberta.finetuning.classification import Classification, Regression, classification_metrics, regression_metrics
from ds_roberta.finetuning.finetune import choose
from ds_roberta.finetuning.labels import Labels
from ds_roberta.finetuning.one_run import Run, Setting


def test_the_loss_of_parts_adds_up_to_that_of_the_whole():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    for weights in (None, [0.5, 2.0, 1.0]):
        weight = None if weights is None else torch.tensor(weights)
        whole = torch.nn.functional.cross_entropy(logits, labels, weight, reduction="none").mean()
        loss = Classification(["a", "b", "c"], Labels(), weights).loss
        parts = sum(loss({"logits": logits[part]}, labels[part], 6) for part in (slice(4), slice(4, 6)))
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(loss({"logits": logits}, labels), whole)
    numbers = torch.randn(6)
    squared = torch.nn.functional.mse_loss(logits[:, 0], numbers)
    torch.testing.assert_close(Regression(Labels()).loss({"logits": logits[:, :1]}, numbers), squared)


def test_metrics_are_those_of_the_libraries():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 2)), rng.integers(2, size=50)
    predicted = logits.argmax(-1)
    assert classification_metrics(logits, labels) == {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
        "f1": f1_score(labels, predicted),
    }
    numbers = rng.normal(size=50)
    found = regression_metrics(logits[:, 0], numbers)
    assert found == {
        "pearson": pearsonr(logits[:, 0], numbers).statistic,
        "spearman": spearmanr(logits[:, 0], numbers).statistic,
    }
    assert regression_metrics(np.zeros(50), numbers) == {"pearson": 0, "spearman": 0}


def test_the_setting_with_the_best_median_is_chosen_and_its_best_run():
    def runs(setting, *scores):
        return [Run(setting, seed, [{"accuracy": score}], 0) for seed, score in enumerate(scores)]

    first, second = Setting(1e-5, 16), Setting(2e-5, 16)
    best = choose({first: runs(first, 0.1, 0.2, 0.9), second: runs(second, 0.3, 0.4, 0.5)}, "accuracy")
    assert (best.setting, best.seed) == (second, 2)
