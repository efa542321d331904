"""A fine-tuned model's folder, opened, and its logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ds_roberta.errors import UserError
from ds_roberta.finetuning.model import sequence_length
from ds_roberta.transformers_folder import open_folder, open_tokenizer, read_model

RESULTS = "results.json"
MODELS = {
    "RobertaForSequenceClassification": transformers.RobertaForSequenceClassification,
    "RobertaForTokenClassification": transformers.RobertaForTokenClassification,
    "RobertaForQuestionAnswering": transformers.RobertaForQuestionAnswering,
}


@dataclass(frozen=True)
class FinetunedModel:
    """
    Attributes:
        task: `classification`, `regression`, `token-classification` or `question-answering`.
        names: of the model's labels, by index; not of regression and question answering.
        max_seq_length: in tokens, the special ones included.
        results: what fine-tuning wrote about itself; empty for a folder of another origin.
    """

    task: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    names: list[str]
    max_seq_length: int
    results: dict[str, Any]


def open_finetuned(folder: Path, max_seq_length: int | None) -> FinetunedModel:
    """Read a folder with a head; the model goes to the GPU where there is one.

    Args:
        max_seq_length: None stands for the one of fine-tuning.

    Raises:
        UserError: it is no such folder, its parts do not fit together, or it has fewer positions.
    """
    opened = open_folder(folder)
    config = opened.config
    architecture = (config.architectures or [""])[0]
    if architecture not in MODELS:
        raise UserError(
            f"{str(folder)!r} holds a {architecture or 'model without a name'}, which has no head for predictions: "
            "fine-tune it with launch/finetune.py"
        )
    length = sequence_length(opened, max_seq_length)
    model = read_model(folder, MODELS[architecture])
    return FinetunedModel(
        _task(architecture, config),
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        open_tokenizer(folder),
        [config.id2label[index] for index in range(config.num_labels)],
        length,
        _results(folder),
    )


def logits(finetuned: FinetunedModel, sequences: Sequence[list[int]], batch_size: int) -> list[tuple[np.ndarray, ...]]:
    """The model's outputs for each sequence of token ids: (labels,) of sequences, (T, labels) of tokens, and two of
    (T,) for the beginnings and ends of answers; float32.

    Raises:
        UserError: one is not finite.
    """
    found: dict[int, tuple[np.ndarray, ...]] = {}
    by_length = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = finetuned.tokenizer.pad(
            {"input_ids": [sequences[index] for index in chosen]}, padding_side="right", return_tensors="pt"
        )
        with torch.inference_mode():
            output = finetuned.model(**batch.to(finetuned.model.device)).to_tuple()
        arrays = [tensor.float().cpu().numpy() for tensor in output]
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(
                f"the logits of the model in {finetuned.model.name_or_path!r} are not finite: its training has "
                "diverged or its weights are damaged; fine-tune it again"
            )
        found |= {index: tuple(array[row] for array in arrays) for row, index in enumerate(chosen)}
    return [found[index] for index in range(len(sequences))]


def _task(architecture: str, config: transformers.RobertaConfig) -> str:
    if architecture == "RobertaForSequenceClassification":
        return "regression" if config.num_labels == 1 else "classification"
    return "token-classification" if architecture == "RobertaForTokenClassification" else "question-answering"


def _results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a JSON object ({error}): remove or mend it") from error
