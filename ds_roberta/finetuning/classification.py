"""Classification and regression of texts and pairs of texts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.finetuning.error_analysis import confusion, example, worst_examples
from ds_roberta.finetuning.labelled_tables import Columns, Text, TextColumns, find_texts, read_splits, training_columns
from ds_roberta.finetuning.labels import (
    Labels,
    class_names,
    label_of_rows,
    labelled_rows,
    same_label,
    without_unlabelled_tests,
)
from ds_roberta.finetuning.task import NO_LABEL, Answer, Encoded, label_head, label_names, log_softmax, softmax
from ds_roberta.finetuning.text_task import TextTask, asked, heading, kept_columns
from ds_roberta.inputs.tables import Table
from ds_roberta.options import option

BALANCED = "balanced"
MULTI_LABEL = "multi_label_classification"
"""transformers' `problem_type` of a head whose labels do not exclude each other."""
SHOWN_LABELS = 5
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,\d+\s*")


@dataclass(frozen=True)
class ClassificationOptions(Labels):
    """Classification."""

    class_weights: str = option(
        "weights of the classes in the loss; balanced: a rare class counts as much as a frequent one",
        "none",
        choices=("none", BALANCED),
    )
    positive_label: str | None = option(
        "of two labels, the one whose f1 is reported (default: the last in order)", None
    )


class Classification(TextTask):
    """Predicts the label of a text or a pair, one of `names`."""

    name = "classification"
    options_class = ClassificationOptions

    def __init__(
        self,
        names: list[str],
        options: Columns,
        weights: Sequence[float] | None = None,
        text_columns: TextColumns | None = None,
        positive: int = 1,
    ):
        """
        Args:
            weights: of each class in the loss; 1 on average over the training examples.
            positive: of two classes, the one that `f1` is of.
        """
        super().__init__(options, text_columns)
        self.names, self.weights, self.positive = names, weights, positive
        self.head = {**label_head(names), "problem_type": "single_label_classification"}
        self.results["label_names"] = names
        if weights is not None:
            self.results["class_weights"] = dict(zip(names, weights, strict=True))
        self.metric_names: tuple[str, ...] = ("accuracy", "macro_f1", "matthews_correlation")
        if len(names) == 2:
            self.metric_names += ("f1",)
            self.results["positive_label"] = names[positive]

    @classmethod
    def from_data(
        cls, data: tuple[str, ...], options: ClassificationOptions
    ) -> tuple[Classification, dict[str, Sequence[Text]]]:
        tables = without_unlabelled_tests(
            read_splits(data, validation_fraction=options.validation_fraction, labels=label_of_rows(options)), options
        )
        labelled = {split: labelled_rows(table, options) for split, table in tables.items()}
        train, labels = labelled["train"]
        names = class_names(labels, train.name)
        splits: dict[str, Sequence[Text]] = {
            split: _with_classes(*rows, names, options) for split, rows in labelled.items()
        }
        weights = balanced_weights(splits["train"], len(names)) if options.class_weights == BALANCED else None
        positive = 1 if options.positive_label is None else _positive_class(options.positive_label, names)
        return cls(names, options, weights, training_columns(tables, options), positive), splits

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> Classification:
        return cls(label_names(config), Columns(**given), text_columns=kept_columns(results))

    @classmethod
    def fits(cls, config: transformers.RobertaConfig) -> bool:
        return super().fits(config) and config.num_labels > 1 and config.problem_type != MULTI_LABEL

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy, of each example times its class's weight; see `Task.loss`.

        Args:
            outputs: with `logits`, (examples, classes).
            labels: (examples,), int64.
        """
        logits = outputs["logits"].float()
        weights = None if self.weights is None else logits.new_tensor(self.weights)
        loss = functional.cross_entropy(logits, labels, weight=weights, reduction="sum")
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        """scikit-learn's, and `predicted_classes`, how many classes the model predicts at all."""
        scores, labels = np.asarray(logits), np.array([text.label for text in encoded.inputs])
        metrics = classification_metrics(scores, labels, self.positive)
        return {**metrics, "predicted_classes": len(np.unique(scores.argmax(-1)))}

    def remarks(self, metrics: dict[str, Any]) -> list[str]:
        if metrics["predicted_classes"] > 1:
            return []
        return [
            "the model predicts one class for all validation examples: it has not learned the task; try another "
            "--learning_rate, more --num_train_epochs, or --class_weights balanced where one class is frequent"
        ]

    def error_analysis(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        scores = log_softmax(np.asarray(logits))
        gold, predicted = [int(text.label) for text in encoded.inputs], scores.argmax(-1).tolist()
        examples = [
            example(
                text.place,
                asked(text).values(),
                self.names[label],
                self.names[found],
                loss=float(-of_text[label]),
                gold_probability=float(np.exp(of_text[label])),
                predicted_probability=float(np.exp(of_text[found])),
            )
            for text, of_text, label, found in zip(encoded.inputs, scores, gold, predicted, strict=True)
        ]
        gold_names, found_names = ([self.names[index] for index in indices] for indices in (gold, predicted))
        return confusion(gold_names, found_names, self.names, "examples") | worst_examples(examples)

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        answers = []
        for text, found in zip(encoded.inputs, logits, strict=True):
            scores = dict(zip(self.names, map(float, softmax(found)), strict=True))
            ranked = sorted(scores, key=lambda name: -scores[name])
            line = "  " + ", ".join(f"{name} {scores[name]:.4f}" for name in ranked[:SHOWN_LABELS])
            row = {"label": ranked[0], "score": scores[ranked[0]], "scores": scores}
            answers.append(Answer([heading(text), line], {**asked(text), **row}))
        return answers


class Regression(TextTask):
    """Predicts a number for a text or a pair."""

    name = "regression"
    metric_names = ("pearson", "spearman")

    def __init__(self, options: Columns, text_columns: TextColumns | None = None):
        super().__init__(options, text_columns)
        self.head = {"num_labels": 1, "problem_type": "regression"}

    @classmethod
    def from_data(cls, data: tuple[str, ...], options: Labels) -> tuple[Regression, dict[str, Sequence[Text]]]:
        tables = without_unlabelled_tests(read_splits(data, validation_fraction=options.validation_fraction), options)
        splits: dict[str, Sequence[Text]] = {split: _numbered(table, options) for split, table in tables.items()}
        return cls(options, training_columns(tables, options)), splits

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> Regression:
        return cls(Columns(**given), kept_columns(results))

    @classmethod
    def fits(cls, config: transformers.RobertaConfig) -> bool:
        return super().fits(config) and config.num_labels == 1

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The squared error; see `Task.loss`.

        Args:
            outputs: with `logits`, (examples, 1).
            labels: (examples,), float.
        """
        loss = functional.mse_loss(outputs["logits"].float().squeeze(-1), labels.float(), reduction="sum")
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        return regression_metrics(np.asarray(logits)[:, 0], np.array([text.label for text in encoded.inputs]))

    def error_analysis(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        return worst_examples(
            example(
                text.place,
                asked(text).values(),
                f"{text.label:.4g}",
                f"{float(found[0]):.4g}",
                loss=float((float(found[0]) - text.label) ** 2),
            )
            for text, found in zip(encoded.inputs, logits, strict=True)
        )

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        values = [float(found[0]) for found in logits]
        return [
            Answer([heading(text), f"  {value:.4f}"], {**asked(text), "value": value})
            for text, value in zip(encoded.inputs, values, strict=True)
        ]


def _positive_class(label: str, names: list[str]) -> int:
    if len(names) != 2:
        raise UserError(
            f"--positive_label {label} is for two labels, the training examples have {len(names)}: leave it out"
        )
    if same_label(label) not in names:
        raise UserError(f"--positive_label {label} is none of the training examples': choose {' or '.join(names)}")
    return names.index(same_label(label))


def classification_metrics(
    logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], positive: int = 1
) -> dict[str, float]:
    """scikit-learn's metrics of a classification.

    Args:
        logits: (examples, classes), float.
        labels: (examples,), int.
        positive: of two classes, the one that `f1` is of.

    Returns:
        `accuracy`, `macro_f1` over the classes that occur in labels or predictions, `matthews_correlation`, and for
        two classes `f1`.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
        # For a single class, scikit-learn warns before it gives 0.
        "matthews_correlation": matthews_corrcoef(labels, predicted) if len({*labels, *predicted}) > 1 else 0.0,
    }
    if logits.shape[-1] == 2:
        metrics["f1"] = f1_score(labels, predicted, pos_label=positive, zero_division=0)
    return {name: float(value) for name, value in metrics.items()}


def regression_metrics(predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
    """scipy's `pearson` and `spearman` of two (examples,) arrays; 0 if one is constant, as they are undefined."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, labels).statistic),
        "spearman": float(spearmanr(predicted, labels).statistic),
    }


def balanced_weights(train: Sequence[Text], classes: int) -> list[float]:
    """scikit-learn's weights of classes by which all count alike: `examples / (classes * examples of the class)`."""
    from sklearn.utils.class_weight import compute_class_weight

    weights = compute_class_weight("balanced", classes=np.arange(classes), y=[text.label for text in train])
    return [float(weight) for weight in weights]


def _with_classes(table: Table, labels: Sequence[Any], names: list[str], columns: Columns) -> list[Text]:
    """The table's texts with the indices of their classes as labels.

    Raises:
        UserError: a label is not among the names.
    """
    indices = {name: index for index, name in enumerate(names)}
    examples = []
    for text, label in zip(find_texts(table, columns), map(same_label, labels), strict=True):
        if label not in indices:
            problem = unknown_key_message("label", label, names)
            raise UserError(f"{text.place}: {problem}; no training row has it: fix or remove the row")
        examples.append(replace(text, label=indices[label]))
    return examples


def _numbered(table: Table, options: Labels) -> list[Text]:
    """The table's texts with numbers as labels.

    Raises:
        UserError: a label is not a finite number.
    """
    examples = []
    table, labels = labelled_rows(table, options)
    for text, value in zip(find_texts(table, options), labels, strict=True):
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            remedy = "write it with a decimal point" if _DECIMAL_COMMA.fullmatch(str(value)) else "fix it"
            raise UserError(f"{text.place}: the label {value!r} is not a number: {remedy} or use --task classification")
        if number == NO_LABEL:
            raise UserError(f"{text.place}: the label {value!r} means no label to Trainer: shift or scale all labels")
        examples.append(replace(text, label=number))
    return examples
