"""Classification and regression of texts and pairs of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.finetuning.labelled_tables import (
    Columns,
    Table,
    Text,
    check_column,
    find_texts,
    listed,
    read_splits,
    read_table,
)
from ds_roberta.finetuning.task import (
    COMMAND_LINE,
    NO_LABEL,
    Answer,
    Encoded,
    Task,
    label_head,
    label_names,
    one_line,
    softmax,
)

LABEL_COLUMNS = ("label", "gold_label", "score", "is_duplicate", "Quality")  # in GLUE's files and data sets
SHOWN_LABELS = 5


class _TextTask(Task):
    """The common part of tasks that predict a label or a number for each text or pair."""

    model_class = transformers.RobertaForSequenceClassification
    options_class = Columns

    def __init__(self, options: Columns):
        self.options = options

    def read_inputs(self, path: Path) -> list[Text]:
        return find_texts(read_table(path), self.options)

    def make_input(self, text: str, text_pair: str | None) -> Text:
        return Text(COMMAND_LINE, text, text_pair)

    def encode(
        self, tokenizer: transformers.PreTrainedTokenizerBase, inputs: Sequence[Text], max_seq_length: int
    ) -> Encoded:
        features = encode_texts(tokenizer, inputs, max_seq_length)
        if inputs[0].label is not None:
            features = [{**feature, "labels": text.label} for feature, text in zip(features, inputs, strict=True)]
        return Encoded(inputs, features)

    @staticmethod
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """Cross-entropy, or the squared error in regression; see `Task.loss`.

        Args:
            outputs: with `logits`, (examples, classes), or (examples, 1) in regression.
            labels: (examples,), int64, or float in regression.
        """
        logits = outputs["logits"].float()
        if labels.is_floating_point():
            loss = functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        else:
            loss = functional.cross_entropy(logits, labels, reduction="sum")
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class Classification(_TextTask):
    """Predicts the label of a text or a pair, one of `names`."""

    name = "classification"

    def __init__(self, names: list[str], options: Columns):
        super().__init__(options)
        self.names = names
        self.head = {**label_head(names), "problem_type": "single_label_classification"}
        self.results = {"label_names": names}
        of_two = ("f1",) if len(names) == 2 else ()
        self.metric_names = ("accuracy", "macro_f1", "matthews_correlation", *of_two)

    @classmethod
    def from_data(cls, data: tuple[str, ...], options: Columns) -> tuple[Classification, dict[str, Sequence[Text]]]:
        tables = without_unlabelled_tests(read_splits(data), options)
        task = cls(class_names(tables["train"], options), options)
        return task, {split: task._examples(table) for split, table in tables.items()}

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> Classification:
        return cls(label_names(config), Columns(**given))

    @classmethod
    def fits(cls, config: transformers.RobertaConfig) -> bool:
        return super().fits(config) and config.num_labels > 1

    def _examples(self, table: Table) -> list[Text]:
        indices = {name: index for index, name in enumerate(self.names)}
        texts, labels = find_texts(table, self.options), map(str, label_values(table, self.options))
        examples = []
        for text, label in zip(texts, labels, strict=True):
            if label not in indices:
                problem = unknown_key_message("label", label, self.names)
                raise UserError(f"{text.place}: {problem}; no training row has it: fix or remove the row")
            examples.append(replace(text, label=indices[label]))
        return examples

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        return classification_metrics(np.asarray(logits), np.array([text.label for text in encoded.inputs]))

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        answers = []
        for text, found in zip(encoded.inputs, logits, strict=True):
            scores = dict(zip(self.names, map(float, softmax(found)), strict=True))
            ranked = sorted(scores, key=lambda name: -scores[name])
            line = "  " + ", ".join(f"{name} {scores[name]:.4f}" for name in ranked[:SHOWN_LABELS])
            row = {"label": ranked[0], "score": scores[ranked[0]], "scores": scores}
            answers.append(Answer([_heading(text), line], {**_asked(text), **row}))
        return answers


class Regression(_TextTask):
    """Predicts a number for a text or a pair."""

    name = "regression"
    metric_names = ("pearson", "spearman")

    def __init__(self, options: Columns):
        super().__init__(options)
        self.head = {"num_labels": 1, "problem_type": "regression"}
        self.results = {}

    @classmethod
    def from_data(cls, data: tuple[str, ...], options: Columns) -> tuple[Regression, dict[str, Sequence[Text]]]:
        tables = without_unlabelled_tests(read_splits(data), options)
        return cls(options), {split: _numbered(table, options) for split, table in tables.items()}

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> Regression:
        return cls(Columns(**given))

    @classmethod
    def fits(cls, config: transformers.RobertaConfig) -> bool:
        return super().fits(config) and config.num_labels == 1

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        return regression_metrics(np.asarray(logits)[:, 0], np.array([text.label for text in encoded.inputs]))

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        values = [float(found[0]) for found in logits]
        return [
            Answer([_heading(text), f"  {value:.4f}"], {**_asked(text), "value": value})
            for text, value in zip(encoded.inputs, values, strict=True)
        ]


def encode_texts(
    tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[Text], max_seq_length: int
) -> list[dict[str, Any]]:
    """`input_ids` and `attention_mask` of each text. Long texts are cut, in a pair the longer one first, and a warning
    names the first. A special token's letters stay text, as in pretraining."""

    def tokens(chosen: Sequence[Text], **options: Any) -> Any:
        pairs = None if chosen[0].pair is None else [text.pair for text in chosen]
        return tokenizer([text.text for text in chosen], pairs, split_special_tokens=True, **options)

    encoded = tokens(
        texts, truncation=True, max_length=max_seq_length, return_attention_mask=True, return_token_type_ids=False
    )
    full = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) == max_seq_length]
    if full:
        uncut = tokens(full, verbose=False)["input_ids"]
        cut = [text for text, ids in zip(full, uncut, strict=True) if len(ids) > max_seq_length]
        if cut:
            logger.warning(
                f"{len(cut)} of {len(texts)} texts are longer than {max_seq_length} tokens and were cut, first "
                f"{cut[0].place}"
            )
    return [
        {"input_ids": input_ids, "attention_mask": mask}
        for input_ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def label_column(table: Table, columns: Columns) -> str:
    """The name of the column that holds the labels.

    Raises:
        UserError: no column is named, and the table has none of the usual ones.
    """
    label = columns.label_column or next((name for name in LABEL_COLUMNS if name in table.columns), None)
    if label is None:
        raise UserError(
            f"{table.name} has the columns {listed(table)}: give the one with the label as --label_column, or leave "
            "out a file without labels"
        )
    return label


def without_unlabelled_tests(tables: dict[str, Table], columns: Columns) -> dict[str, Table]:
    """All splits except test splits without labels (-1 or no value), which most of GLUE's are."""
    label = label_column(tables["train"], columns)
    kept = {}
    for split, table in tables.items():
        if split.startswith("test") and all(row.get(label) in (None, "", -1, "-1") for row in table.rows):
            logger.info(f"{table.name} has no labels and is left out")
        else:
            kept[split] = table
    return kept


def label_values(table: Table, columns: Columns) -> list[Any]:
    """The table's labels as they are in the file.

    Raises:
        UserError: the column is missing, or a row has no label.
    """
    label = label_column(table, columns)
    check_column(table, label, "--label_column")
    values = [row.get(label) for row in table.rows]
    for index, value in enumerate(values):
        if value is None or value == "":
            raise UserError(f"{table.place(index)} has no {label!r}: label or remove the row")
        if not isinstance(value, str | int | float) or value != value:  # NaN, which a table without a label may have
            raise UserError(f"{table.place(index)}: {label!r} is {value!r}, not a label: label or remove the row")
    return values


def class_names(train: Table, columns: Columns) -> list[str]:
    """The classes of the training rows: in numerical order if all are numbers, else in alphabetical order.

    Raises:
        UserError: there are fewer than two.
    """
    names = {str(value) for value in label_values(train, columns)}
    if len(names) < 2:
        raise UserError(f"{train.name} has only the label {min(names)!r}: classification needs at least two")
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        numbers = {}
    if not all(map(math.isfinite, numbers.values())):
        numbers = {}  # a class may be called "nan"
    return sorted(names, key=lambda name: (numbers.get(name, 0.0), name))


def classification_metrics(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
    """scikit-learn's metrics of a classification.

    Args:
        logits: (examples, classes), float.
        labels: (examples,), int.

    Returns:
        `accuracy`, `macro_f1` over the classes that occur in labels or predictions, `matthews_correlation`, and for
        two classes `f1` of the second.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
    }
    if logits.shape[-1] == 2:
        metrics["f1"] = f1_score(labels, predicted, pos_label=1, zero_division=0)
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


def _numbered(table: Table, columns: Columns) -> list[Text]:
    """The table's texts with numbers as labels.

    Raises:
        UserError: a label is not a finite number.
    """
    examples = []
    for text, value in zip(find_texts(table, columns), label_values(table, columns), strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{text.place}: the label {value!r} is not a number: fix it or use --task classification")
        if number == NO_LABEL:
            raise UserError(f"{text.place}: the label {value!r} means no label to Trainer: shift or scale all labels")
        examples.append(replace(text, label=number))
    return examples


def _asked(text: Text) -> dict[str, str]:
    return {"text": text.text} if text.pair is None else {"text": text.text, "text_pair": text.pair}


def _heading(text: Text) -> str:
    return " | ".join(map(one_line, _asked(text).values()))
