"""Classification and regression of texts and pairs of texts."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from ds_roberta.finetuning.examples import Columns, Examples, class_examples, label_names, labelled, number_examples
from ds_roberta.finetuning.labelled_tables import read_splits
from ds_roberta.finetuning.metrics import classification_metrics, regression_metrics
from ds_roberta.finetuning.model import encode_examples
from ds_roberta.finetuning.task import Encoded, Task, label_head


def classification(data: tuple[str, ...], columns: Columns) -> Task:
    """
    Raises:
        UserError: as `read_splits`, `label_names` and `class_examples`.
    """
    tables = labelled(read_splits(data), columns)
    names = label_names(tables["train"], columns)
    splits = {split: class_examples(table, columns, names) for split, table in tables.items()}
    return Task(
        model=transformers.RobertaForSequenceClassification,
        head={**label_head(names), "problem_type": "single_label_classification"},
        splits=splits,
        encode=partial(_encode, measure=classification_metrics),
        loss=batch_loss,
        collator=transformers.DataCollatorWithPadding,
        metrics=("accuracy", "macro_f1", "matthews_correlation", *(("f1",) if len(names) == 2 else ())),
        results={"label_names": names},
    )


def regression(data: tuple[str, ...], columns: Columns) -> Task:
    """
    Raises:
        UserError: as `read_splits` and `number_examples`.
    """
    tables = labelled(read_splits(data), columns)
    return Task(
        model=transformers.RobertaForSequenceClassification,
        head={"num_labels": 1, "problem_type": "regression"},
        splits={split: number_examples(table, columns) for split, table in tables.items()},
        encode=partial(_encode, measure=lambda predicted, labels: regression_metrics(predicted.squeeze(-1), labels)),
        loss=batch_loss,
        collator=transformers.DataCollatorWithPadding,
        metrics=("pearson", "spearman"),
    )


def batch_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The examples' summed loss over the number of examples in the whole batch, all its micro-batches together.

    RoBERTa's own loss in transformers is the mean of a micro-batch whatever Trainer tells it, and Trainer (5.23) takes
    it for normalised: loss and gradient would grow with `gradient_accumulation_steps`.

    Args:
        outputs: with `logits`, (examples, classes), or (examples, 1) in regression.
        labels: (examples,), int64, or float in regression.
        num_items_in_batch: None stands for these examples alone.
    """
    logits = outputs["logits"].float()
    if labels.is_floating_point():
        loss = functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    else:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase, examples: Examples, max_seq_length: int, measure: Any
) -> Encoded:
    labels = np.array(examples.labels)
    features = encode_examples(tokenizer, examples, max_seq_length)
    return Encoded(features, len(features), lambda logits: measure(logits, labels))
