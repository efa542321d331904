"""The interface that each kind of fine-tuning implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import transformers

from ds_roberta.config import class_name
from ds_roberta.errors import UserError
from ds_roberta.options import Settings

RESULTS = "results.json"
NO_LABEL = -100  # Trainer does not count it, and torch's cross entropy ignores it
SHORTEST = 8  # lower limit of --max_seq_length
COMMAND_LINE = "the command line"  # the place of a single text, for messages


@dataclass(frozen=True)
class Encoded:
    """Inputs as the model takes them.

    Attributes:
        features: `input_ids`, `attention_mask` and, if the inputs have labels, `labels` of each sequence.
        windows: for each feature, the part of an input that it holds; empty if every input is one feature.
    """

    inputs: Sequence[Any]
    features: list[dict[str, Any]]
    windows: Sequence[Any] = ()


@dataclass(frozen=True)
class Answer:
    """What the model predicts for one input.

    Attributes:
        lines: the prediction as text, for people.
        row: the prediction as a JSON object, for programs.
    """

    lines: list[str]
    row: dict[str, Any]


class Task(ABC):
    """A task, made by `from_data` for fine-tuning or by `from_model` for predictions. To add one, write a subclass and
    list it in `TASKS`.

    Attributes:
        name: the value of `--task`.
        architecture: transformers' name for a RoBERTa with the task's head; its import takes seconds.
        options_class: the task's own options.
        collator: makes a batch of features; called with the tokenizer.
        add_prefix_space: how the model's tokenizer is opened and saved; None: as it is.
        takes_pairs: whether an input may have two texts.
        metric_names: the metrics that may choose the best epoch and run; the first is the default.
        head: the head's values in the model's configuration.
        results: the task's own entries in `results.json`.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    options_class: ClassVar[type[Settings]]
    collator: ClassVar[Any] = transformers.DataCollatorWithPadding
    add_prefix_space: ClassVar[bool | None] = None
    takes_pairs: ClassVar[bool] = False

    metric_names: tuple[str, ...]
    head: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    @abstractmethod
    def from_data(cls, data: tuple[str, ...], options: Any) -> tuple[Task, dict[str, Sequence[Any]]]:
        """The task that labelled files define, and the inputs of each split.

        Args:
            data: see `labelled_tables.read_splits`.
            options: of `options_class`.

        Raises:
            UserError: a file cannot be read, or a row is wrong.
        """

    @classmethod
    @abstractmethod
    def from_model(cls, config: transformers.RobertaConfig, results: dict[str, Any], given: dict[str, Any]) -> Task:
        """The task of a fine-tuned model.

        Args:
            results: what fine-tuning wrote to `results.json`; empty for a folder of another origin.
            given: values of `options_class` that were given for these predictions, by name.
        """

    @classmethod
    def fits(cls, config: transformers.RobertaConfig) -> bool:
        """Whether a model with this configuration is for this task."""
        return (config.architectures or [""])[0] == class_name(config.model_type, cls.architecture)

    @abstractmethod
    def read_inputs(self, path: str) -> Sequence[Any]:
        """The inputs of a file to predict; labels are ignored.

        Raises:
            UserError: the file cannot be read, or a row is wrong.
        """

    def other_columns(self, given: Any) -> dict[str, Any]:
        """The columns of an input's row that it was not made from, which predictions keep."""
        return {}

    @abstractmethod
    def make_input(self, text: str, text_pair: str | None) -> Any:
        """The input that the command line gives.

        Raises:
            UserError: the task cannot use it.
        """

    @abstractmethod
    def encode(
        self, tokenizer: transformers.PreTrainedTokenizerBase, inputs: Sequence[Any], max_seq_length: int
    ) -> Encoded:
        """Turn inputs into token ids, and into labels where they have any.

        Args:
            max_seq_length: in tokens, the special ones included.
        """

    @abstractmethod
    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss summed over these labels, divided by the number of labels in the whole batch with all its
        micro-batches.

        RoBERTa's own loss in transformers is the mean of a micro-batch whatever Trainer passes to it, and Trainer
        (5.23) assumes that it is normalized: loss and gradient would grow with `gradient_accumulation_steps`.

        Args:
            outputs: the model's, by name.
            num_items_in_batch: None: the number of these labels.
        """

    @abstractmethod
    def metrics(self, encoded: Encoded, logits: Any) -> dict[str, Any]:
        """The metrics of labelled inputs by name.

        Args:
            logits: an array or a list with an entry for each feature, which may be padded: (labels,), or (T, labels)
                for tokens. If the model has two outputs, as for the starts and ends of answers, a pair of these.
        """

    def conclude(self, metrics: dict[str, Any]) -> None:  # noqa: B027
        """Take over what the best epoch's metrics on the validation examples decide, before anything is written."""

    def remarks(self, metrics: dict[str, Any]) -> list[str]:
        """What a person should know about a model with these metrics on the validation examples."""
        return []

    def error_analysis(self, encoded: Encoded, logits: Any) -> dict[str, Any] | None:
        """What the model confuses among labelled inputs, and its worst examples, as the module `error_analysis` has
        them; `logits` as in `metrics`. None: nothing is written."""
        return None

    @abstractmethod
    def answer(self, encoded: Encoded, logits: Any) -> list[Answer]:
        """What the model says about each input; `logits` as in `metrics`."""


def label_head(names: Sequence[str]) -> dict[str, Any]:
    """The configuration values of a head with these labels."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def label_names(config: transformers.RobertaConfig) -> list[str]:
    """The labels of a model, by index; raises `UserError` if its config does not name each."""
    names = [config.id2label.get(index) for index in range(config.num_labels)]
    if not all(isinstance(name, str | int | float) for name in names):
        raise UserError(f"the model has the id2label {config.id2label!r}: number the labels from 0 and name each")
    return names


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis; float64."""
    powers = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities along the last axis; float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def one_line(text: str) -> str:
    return " ".join(text.split())
