"""One run of transformers' Trainer: one setting, one seed."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.finetuning.metrics import METRICS, classification_metrics, regression_metrics

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}  # as in pretraining, Liu et al. 2019, table 9
EVALUATION_BATCH_SIZE = 32


@dataclass(frozen=True)
class Setting:
    """What a sweep varies."""

    learning_rate: float
    train_batch_size: int


@dataclass(frozen=True)
class Recipe:
    """What all runs share. The defaults are those of Liu et al. 2019, table 10."""

    num_train_epochs: int = 10
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.1
    warmup_ratio: float = 0.06
    bf16: bool = False


@dataclass(frozen=True)
class Problem:
    """The model's folder and the encoded examples.

    Attributes:
        names: the classes' names; empty in regression.
        metric: the name of the metric that chooses.
    """

    folder: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    names: list[str]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    metric: str


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Attributes:
        epochs: metrics on the validation examples after each epoch, with the `loss`.
        best: index of the epoch with the best metric, the first of equals.
        weights: the model's state after that epoch, on the CPU.
    """

    setting: Setting
    seed: int
    epochs: list[dict[str, float]]
    best: int
    weights: dict[str, torch.Tensor]


def train(problem: Problem, setting: Setting, recipe: Recipe, seed: int) -> Run:
    """Fine-tune from the folder's weights and keep the state after the best epoch.

    Raises:
        UserError: the loss is no longer finite.
    """
    transformers.set_seed(seed)  # the head is new
    watch = _BestEpoch(
        problem.metric, f"learning rate {setting.learning_rate:g}, batch {setting.train_batch_size}, seed {seed}"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(problem, new_model(problem), setting, recipe, seed, Path(folder))
        trainer.add_callback(watch)
        trainer.train()
    return Run(setting, seed, watch.epochs, watch.best, watch.weights)


def evaluate(problem: Problem, weights: dict[str, torch.Tensor], features: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics, and the `loss`, of a run's `weights` on `features`."""
    model = new_model(problem)
    model.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(problem, model, Setting(0.0, 1), Recipe(), 0, Path(folder))
        return _plain(trainer.evaluate(features))


def new_model(problem: Problem) -> transformers.RobertaForSequenceClassification:
    """The folder's encoder, with a new head unless the folder holds one of the same shape."""
    if problem.names:
        head: dict[str, Any] = {
            "num_labels": len(problem.names),
            "id2label": dict(enumerate(problem.names)),
            "label2id": {name: index for index, name in enumerate(problem.names)},
            "problem_type": "single_label_classification",
        }
    else:
        head = {"num_labels": 1, "problem_type": "regression"}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # that the head is new is no news
    try:
        return transformers.RobertaForSequenceClassification.from_pretrained(
            problem.folder, dtype=torch.float32, ignore_mismatched_sizes=True, **head
        )
    finally:
        transformers.logging.set_verbosity(verbosity)


def make_trainer(
    problem: Problem,
    model: transformers.RobertaForSequenceClassification,
    setting: Setting,
    recipe: Recipe,
    seed: int,
    folder: Path,
) -> transformers.Trainer:
    """A Trainer that evaluates after each epoch, saves nothing and normalises its loss as `batch_loss` says."""
    steps = math.ceil(len(problem.train) / setting.train_batch_size) * recipe.num_train_epochs
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=setting.train_batch_size // recipe.gradient_accumulation_steps,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        per_device_eval_batch_size=EVALUATION_BATCH_SIZE,
        num_train_epochs=recipe.num_train_epochs,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.warmup_ratio * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=0.0,  # the paper's recipe does not clip
        **ADAM,
        bf16=recipe.bf16,
        seed=seed,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would divide the batch anew
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(problem.tokenizer),
        train_dataset=problem.train,
        eval_dataset=problem.validation,
        compute_metrics=_metrics_of_classes if problem.names else _metrics_of_numbers,
        compute_loss_func=batch_loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


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


class _BestEpoch(transformers.TrainerCallback):
    """Notes the metrics of each epoch, and keeps the weights of the best."""

    def __init__(self, metric: str, run: str) -> None:
        self.metric, self.run = metric, run
        self.epochs: list[dict[str, float]] = []
        self.best = 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, **others: Any) -> None:
        found = _plain(metrics)
        if not math.isfinite(found["loss"]):
            raise UserError(f"the loss is {found['loss']} after an epoch at {self.run}: use a lower --learning_rate")
        self.epochs.append(found)
        logger.info(f"{self.run}: epoch {len(self.epochs)} of {args.num_train_epochs}, {_in_words(found)}")
        if len(self.epochs) == 1 or found[self.metric] > self.epochs[self.best][self.metric]:
            self.best = len(self.epochs) - 1
            self.weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    """Trainer's metrics without its prefix and its timings."""
    names = ("loss", *(name for task in METRICS.values() for name in task))
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _metrics_of_classes(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return classification_metrics(prediction.predictions, prediction.label_ids)


def _metrics_of_numbers(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return regression_metrics(prediction.predictions.squeeze(-1), prediction.label_ids)
