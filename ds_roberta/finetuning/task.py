"""What a kind of fine-tuning adds to what all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

NO_LABEL = -100  # which Trainer does not count and torch's cross entropy leaves out
Features = list[dict[str, Any]]  # `input_ids`, `attention_mask` and `labels` of each sequence
Loss = Callable[[Any, torch.Tensor, Any], torch.Tensor]
Measure = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """A split as the model takes it.

    Attributes:
        examples: their number; an example may have several features.
        measure: from the model's outputs for all features, in order and padded, to the metrics, by name.
    """

    features: Features
    examples: int
    measure: Measure


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        model: the transformers class, an encoder with the task's head.
        head: the head's values in the model's configuration.
        splits: each split's examples.
        encode: from a split's examples to features and their measure; with the tokenizer and the length in tokens.
        loss: of (outputs, labels, num_items_in_batch): the sum over labels of the sequences, over the number of labels
            in the whole batch, all its micro-batches together.
        collator: makes a batch of features, from the tokenizer.
        metrics: the names of those that may choose; the first does, unless another is named.
        add_prefix_space: with which the model's tokenizer is opened, and saved; None: with its own.
        results: what `results.json` says besides.
    """

    model: type[transformers.PreTrainedModel]
    head: dict[str, Any]
    splits: dict[str, Any]
    encode: Callable[[transformers.PreTrainedTokenizerBase, Any, int], Encoded]
    loss: Loss
    collator: Callable[[transformers.PreTrainedTokenizerBase], Any]
    metrics: tuple[str, ...]
    add_prefix_space: bool | None = None
    results: dict[str, Any] = field(default_factory=dict)


def label_head(names: list[str]) -> dict[str, Any]:
    """The values of a head with these labels."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
