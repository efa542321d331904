"""One run of transformers' Trainer: one setting, one seed."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.finetuning.task import Encoded, Task

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
    """The model's folder, the task and its encoded examples; `metric` is the name of the one that chooses."""

    folder: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    task: Task
    train: Encoded
    validation: Encoded
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
    epochs: list[dict[str, Any]]
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


def evaluate(problem: Problem, weights: dict[str, torch.Tensor], encoded: Encoded) -> dict[str, Any]:
    """The metrics, and the `loss`, of a run's `weights` on `encoded`."""
    model = new_model(problem)
    model.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        measured = replace(problem, validation=encoded)
        trainer = make_trainer(measured, model, Setting(0.0, 1), Recipe(), 0, Path(folder))
        return _plain(trainer.evaluate())


def new_model(problem: Problem) -> transformers.PreTrainedModel:
    """The folder's encoder, with a new head unless the folder holds one of the same shape."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # that the head is new is no news
    transformers.logging.disable_progress_bar()
    try:
        return problem.task.model.from_pretrained(
            problem.folder, dtype=torch.float32, ignore_mismatched_sizes=True, **problem.task.head
        )
    finally:
        transformers.logging.set_verbosity(verbosity)


def make_trainer(
    problem: Problem,
    model: transformers.PreTrainedModel,
    setting: Setting,
    recipe: Recipe,
    seed: int,
    folder: Path,
) -> transformers.Trainer:
    """A Trainer that evaluates after each epoch, saves nothing and normalises its loss as `Task.loss` says."""
    steps = math.ceil(len(problem.train.features) / setting.train_batch_size) * recipe.num_train_epochs
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
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would divide the batch anew
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=problem.task.collator(problem.tokenizer),
        train_dataset=problem.train.features,
        eval_dataset=problem.validation.features,
        compute_metrics=lambda prediction: problem.validation.measure(prediction.predictions),
        compute_loss_func=problem.task.loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class _BestEpoch(transformers.TrainerCallback):
    """Notes the metrics of each epoch, and keeps the weights of the best."""

    def __init__(self, metric: str, run: str) -> None:
        self.metric, self.run = metric, run
        self.epochs: list[dict[str, Any]] = []
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


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Trainer's metrics without its prefix and its timings."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    names = (name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
    return {name: metrics[f"eval_{name}"] for name in names if name not in timings}


def _in_words(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
