"""Multi-label classification: any number of labels for each text or pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch.nn import functional

from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.finetuning.classification import MULTI_LABEL
from ds_roberta.finetuning.error_analysis import example, label_counts, worst_examples
from ds_roberta.finetuning.labelled_tables import (
    Text,
    TextColumns,
    check_column,
    find_texts,
    read_splits,
    training_columns,
)
from ds_roberta.finetuning.labels import (
    Labels,
    in_order,
    is_none,
    label_column,
    labelled_rows,
    same_label,
    without_unlabelled_tests,
    without_unmarked_tests,
)
from ds_roberta.finetuning.task import RESULTS, Answer, Encoded, label_head, label_names
from ds_roberta.finetuning.text_task import TextTask, asked, heading, kept_columns
from ds_roberta.inputs.rows import parse_cell
from ds_roberta.inputs.tables import Table
from ds_roberta.options import option, require_share
from ds_roberta.process import logger

SEPARATOR, OTHER_SEPARATORS = ",", (";", "|", "#")
CHOICES = "choices"
"""Label Studio's key for several labels of a text."""
KEY = "multi_label"
"""Of `results.json`."""
_APPLIES = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


@dataclass(frozen=True)
class MultiLabelOptions(Labels):
    """Multi-label classification."""

    column_options: ClassVar[str] = f"{Labels.column_options}, or those with 0 and 1 as --label_columns"
    label_columns: str | None = option(
        "instead of a column of lists: columns, such as joy,anger, in which 1 says that this label applies", None
    )
    label_threshold: float | None = option(
        "labels with a higher probability apply (default: 0.5)",
        None,
        check=require_share,
    )
    choose_label_threshold: bool = option("choose that with the highest micro F1 on validation", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choose_label_threshold and self.label_threshold is not None:
            raise UserError("--label_threshold and --choose_label_threshold are both given: choose one")
        if self.label_columns is not None and self.label_column is not None:
            raise UserError("--label_column and --label_columns are both given: choose one")


class MultiLabelClassification(TextTask):
    """Predicts which of `names` apply to a text or a pair."""

    name = "multi-label-classification"
    options_class = MultiLabelOptions

    def __init__(
        self,
        names: list[str],
        options: MultiLabelOptions,
        threshold: float,
        text_columns: TextColumns | None = None,
    ):
        super().__init__(options, text_columns)
        self.names, self.choose, self.threshold = names, options.choose_label_threshold, threshold
        self.head = {**label_head(names), "problem_type": MULTI_LABEL}
        self.results |= {"label_names": names, KEY: {"threshold": threshold}}
        self.metric_names = ("micro_f1", "macro_f1", "accuracy")
        if self.choose:
            self.metric_names = ("best_micro_f1", *self.metric_names)

    @classmethod
    def from_data(
        cls, data: tuple[str, ...], options: MultiLabelOptions
    ) -> tuple[MultiLabelClassification, dict[str, Sequence[Text]]]:
        names = None if options.label_columns is None else _column_names(options.label_columns)
        tables = read_splits(
            data,
            validation_fraction=options.validation_fraction,
            labels=lambda train: _labels_of_rows(train, options, names),
        )
        if names is None:
            tables = without_unlabelled_tests(tables, options)
        else:
            tables = without_unmarked_tests(tables, names, options)
        labelled = {split: _label_sets(table, options, names) for split, table in tables.items()}
        if names is None:
            names = in_order({name for labels in labelled["train"][1] for name in labels})
            _warn_of_separators(names, tables["train"].name)
        if not names:
            raise UserError(f"no row of {tables['train'].name!r} has a label that applies: choose another file")
        splits: dict[str, Sequence[Text]] = {
            split: _with_labels(*rows, names, options) for split, rows in labelled.items()
        }
        threshold = 0.5 if options.label_threshold is None else options.label_threshold
        return cls(names, options, threshold, training_columns(tables, options)), splits

    @classmethod
    def from_model(
        cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]
    ) -> MultiLabelClassification:
        options = MultiLabelOptions(**given)
        try:
            kept = float(results[KEY]["threshold"]) if KEY in results else 0.5
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"{RESULTS} of the model has {KEY} in an unknown form ({error}): fine-tune it again"
            ) from error
        threshold = kept if options.label_threshold is None else options.label_threshold
        return cls(label_names(config), options, threshold, kept_columns(results))

    @classmethod
    def fits(cls, config: transformers.RobertaConfig) -> bool:
        return super().fits(config) and config.problem_type == MULTI_LABEL

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Binary cross-entropy, the mean over examples and labels; see `Task.loss`.

        Args:
            outputs: with `logits`, (examples, labels).
            labels: (examples, labels), float: 1 where a label applies.
            num_items_in_batch: labels times examples.
        """
        loss = functional.binary_cross_entropy_with_logits(outputs["logits"].float(), labels.float(), reduction="sum")
        return loss / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        """See `multi_label_metrics`; where the threshold is to be chosen, with the best one."""
        applies = np.array([text.label for text in encoded.inputs]) == 1
        found = multi_label_metrics(probabilities(logits), applies, self.threshold)
        if self.choose:
            found["best_micro_f1"], found["best_threshold"] = best_threshold(probabilities(logits), applies)
        return found

    def conclude(self, metrics: dict[str, Any]) -> None:
        if self.choose:
            self.threshold = metrics["best_threshold"]
            self.results[KEY] = {"threshold": self.threshold}

    def remarks(self, metrics: dict[str, Any]) -> list[str]:
        if self.choose or metrics["micro_f1"] > 0:
            return []
        return [
            f"no right label of a validation example has a probability above {self.threshold:g}: the model has learned "
            "little; try --choose_label_threshold, another --learning_rate or more --num_train_epochs"
        ]

    def error_analysis(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        """Probabilities are those of exactly these labels, if each is independent of the others."""
        applies = np.array([text.label for text in encoded.inputs]) == 1
        predicted = probabilities(logits) > self.threshold
        scores = np.asarray(logits, dtype=np.float64)
        of_gold, of_predicted = (-np.logaddexp(0, np.where(kind, -scores, scores)) for kind in (applies, predicted))
        examples = [
            example(
                text.place,
                asked(text).values(),
                *(f"{SEPARATOR} ".join(compress(self.names, kind[index])) for kind in (applies, predicted)),
                loss=float(-of_gold[index].mean()),
                gold_probability=float(np.exp(of_gold[index].sum())),
                predicted_probability=float(np.exp(of_predicted[index].sum())),
            )
            for index, text in enumerate(encoded.inputs)
        ]
        return label_counts(applies, predicted, self.names) | worst_examples(examples)

    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        answers = []
        for text, found in zip(encoded.inputs, probabilities(logits), strict=True):
            scores = dict(zip(self.names, map(float, found), strict=True))
            ranked = sorted(scores, key=lambda name: -scores[name])
            chosen = [name for name in ranked if scores[name] > self.threshold]
            shown = ", ".join(f"{name} {scores[name]:.4f}" for name in chosen)
            line = f"  {shown or f'none; the nearest is {ranked[0]} {scores[ranked[0]]:.4f}'}"
            row = {"labels": chosen, "threshold": self.threshold, "scores": scores}
            answers.append(Answer([heading(text), line], {**asked(text), **row}))
        return answers


def probabilities(logits: Any) -> np.ndarray[Any, Any]:
    """The logistic function of logits; float64."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, dtype=np.float64)))


def multi_label_metrics(
    scores: np.ndarray[Any, Any], applies: np.ndarray[Any, Any], threshold: float
) -> dict[str, float]:
    """scikit-learn's metrics of labels with a probability above the threshold.

    Args:
        scores: (examples, labels), float: probabilities.
        applies: (examples, labels), bool.

    Returns:
        `micro_f1` over all pairs of example and label, `macro_f1`, the mean over the labels, and `accuracy`, the share
        of examples with exactly their labels.
    """
    from sklearn.metrics import f1_score

    predicted = scores > threshold
    return {
        "micro_f1": float(f1_score(applies.ravel(), predicted.ravel(), zero_division=0)),
        "macro_f1": float(
            np.mean([f1_score(*columns, zero_division=0) for columns in zip(applies.T, predicted.T, strict=True)])
        ),
        "accuracy": float((predicted == applies).all(-1).mean()),
    }


def best_threshold(scores: np.ndarray[Any, Any], applies: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The highest micro F1 of any threshold, and the middle of the gap between probabilities that reaches it.

    Args:
        scores: (examples, labels), float: probabilities.
        applies: (examples, labels), bool.
    """
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, right = scores.ravel()[order], applies.ravel()[order]
    predicted = np.arange(1, len(ranked) + 1)
    f1 = 2 * np.cumsum(right) / (predicted + max(right.sum(), 1))
    below = np.append(ranked[1:], 0.0)
    f1[ranked == below] = -1.0  # no threshold divides equal probabilities
    best = int(f1.argmax())
    return float(f1[best]), float((ranked[best] + below[best]) / 2)


def _warn_of_separators(names: Sequence[str], file: str) -> None:
    """Name a label such as `joy;anger` if `joy` or `anger` is a label, too."""
    for letter in OTHER_SEPARATORS:
        joined = [name for name in names if letter in name and {part.strip() for part in name.split(letter)} & {*names}]
        if joined:
            logger.warning(
                f"{file}: {joined[0]!r} is taken for one label, and so are all with {letter!r}: separate labels by "
                f"{SEPARATOR!r} if it has several"
            )


def _column_names(label_columns: str) -> list[str]:
    names = [name.strip() for name in label_columns.split(SEPARATOR)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--label_columns {label_columns} has {twice!r} twice: give each column once")
    return names


def _labels_of_rows(table: Table, options: MultiLabelOptions, names: list[str] | None) -> list[list[str]]:
    """The labels that apply to each row, before rows are checked: see `read_splits`."""
    if names is not None:
        return [[name for name in names if _APPLIES.get(same_label(row.get(name)).lower())] for row in table.rows]
    column = label_column(table, options)
    values = [row.get(column) for row in _without_choices(table, column, options).rows]
    return [[same_label(item) for item in _items(value) or ()] for value in values]


def _label_sets(table: Table, options: MultiLabelOptions, columns: list[str] | None) -> tuple[Table, list[list[str]]]:
    """The labelled rows of a table, and the labels that apply to each."""
    if columns is None:
        table = _without_choices(table, label_column(table, options), options)
        table, values = labelled_rows(table, options, are_lists=True)
        column = label_column(table, options)
        return table, [_as_list(table, index, column, value) for index, value in enumerate(values)]
    for column in columns:
        check_column(table, column, "--label_columns")
        table, _ = labelled_rows(table, replace(options, label_columns=None, label_column=column))
    found: list[list[str]] = []
    for index, row in enumerate(table.rows):
        applies = {column: _APPLIES.get(same_label(row[column]).lower()) for column in columns}
        if None in applies.values():
            column = next(column for column in columns if applies[column] is None)
            raise UserError(f"{table.place(index)}: {column!r} is {row[column]!r}, not 0 or 1: fix or remove the row")
        found.append([column for column in columns if applies[column]])
    return table, found


def _without_choices(table: Table, column: str, options: MultiLabelOptions) -> Table:
    """The table with Label Studio's `{"choices": [...]}` as lists; where a row has it, text is a label with its commas,
    as Label Studio writes a single choice."""
    found = [_choices(row.get(column)) for row in table.rows]
    if not any(choices is not None for choices in found):
        return table
    rows = []
    for row, choices in zip(table.rows, found, strict=True):
        value = row.get(column)
        if isinstance(value, str) and choices is None and not is_none(value, options.ignore_label):
            choices = [value]
        rows.append(row if choices is None else {**row, column: choices})
    return replace(table, rows=rows)


def _choices(value: Any) -> list[Any] | None:
    """The list in Label Studio's `{"choices": [...]}`, which a `.csv` has as JSON; None of another value."""
    if isinstance(value, str) and value.startswith(f'{{"{CHOICES}"'):
        value = parse_cell(value)
    found = value.get(CHOICES) if isinstance(value, dict) else None
    return found if isinstance(found, list) else None


def _as_list(table: Table, index: int, column: str, value: Any) -> list[str]:
    """A row's labels, see `_items`."""
    labels = _items(value)
    if labels is None or not all(isinstance(label, str | int | float) for label in labels):
        raise UserError(f"{table.place(index)}: {column!r} is {value!r}, not a list of labels: fix or remove the row")
    names = list(map(same_label, labels))
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        columns = "; if they are 0 or 1 for each label, give a column for each, as --label_columns"
        raise UserError(
            f"{table.place(index)}: {column!r} has the label {repeated[0]!r} twice: fix the row"
            f"{columns if set(names) <= _APPLIES.keys() else ''}"
        )
    return names


def _items(value: Any) -> list[Any] | None:
    """A list, one number, or text: with commas (empty: no label), or a list as JSON and Python write it, of which text
    in a `.csv` may be; None if it is neither."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    found = parse_cell(text)
    return found if isinstance(found, list) else None


def _with_labels(
    table: Table, labels: Sequence[Sequence[str]], names: list[str], options: MultiLabelOptions
) -> list[Text]:
    """The table's texts, each with a 1 or a 0 for every name.

    Raises:
        UserError: a label is not among the names.
    """
    examples = []
    for text, found in zip(find_texts(table, options), labels, strict=True):
        if unknown := sorted(set(found) - set(names)):
            problem = unknown_key_message("label", unknown[0], names)
            raise UserError(f"{text.place}: {problem}; no training row has it: fix or remove the row")
        applying = set(found)
        examples.append(replace(text, label=tuple(1.0 if name in applying else 0.0 for name in names)))
    return examples
