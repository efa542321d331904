"""One run of transformers' Trainer: one setting, one seed."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ds_roberta.distributed import Ranks, StopRequest
from ds_roberta.errors import UserError
from ds_roberta.files import load_json, value_at, write_json
from ds_roberta.finetuning.task import Encoded, Task
from ds_roberta.finetuning.trainer_checkpoints import TRAINER_STATE, check_processes, last_checkpoint
from ds_roberta.options import Settings, must_be, option, require_fraction, require_positive, require_share
from ds_roberta.process import logger
from ds_roberta.progress import StepBar
from ds_roberta.transformers_folder import read_model

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6}  # as in pretraining, Liu et al. 2019, table 9
BASE_WIDTH = 768
EVALUATION_BATCH_SIZE = 32
MODEL_FOLDER = "model"
_RECORD = "run.json"
_TRAINER_FOLDER = "trainer"


@dataclass(frozen=True)
class Setting:
    """The hyperparameters that a sweep varies."""

    learning_rate: float
    train_batch_size: int

    def __post_init__(self) -> None:
        require_positive("train_batch_size", self.train_batch_size)
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate must be a number above 0, got {self.learning_rate}")

    def __str__(self) -> str:
        return f"learning rate {self.learning_rate:g}, batch {self.train_batch_size}"


def for_width(settings: Sequence[Setting], hidden_size: int) -> tuple[Setting, ...]:
    """Settings for models as wide as base or wider, with the rates that suit one of this width.

    Rates grow with the square of how much narrower a model is, at most to 50 times: measured at a width of 128. The
    rates of small models in the literature are similar (Turc et al. 2019, ELECTRA's small model in Clark et al. 2020).
    """
    factor = min(max(BASE_WIDTH / hidden_size, 1.0) ** 2, 50.0)
    scaled = tuple(
        replace(setting, learning_rate=float(f"{setting.learning_rate * factor:.2g}")) for setting in settings
    )
    if factor > 1:
        found, of_base = (
            ", ".join(dict.fromkeys(f"{setting.learning_rate:g}" for setting in each)) for each in (scaled, settings)
        )
        logger.info(f"learning rate {found}: the model's width is {hidden_size} (for {BASE_WIDTH} or more: {of_base})")
    return scaled


@dataclass(frozen=True)
class Recipe(Settings):
    """The recipe of every run; the defaults are those of Liu et al. 2019, table 10, and the model's own dropout."""

    num_train_epochs: int = option("passes over the training examples", 10, check=require_positive)
    gradient_accumulation_steps: int = option("micro-batches per batch", 1, check=require_positive)
    weight_decay: float = option(
        "AdamW's weight decay", 0.1, check=must_be("0 or a number above it", lambda value: 0 <= value < math.inf)
    )
    warmup_ratio: float = option(
        "fraction of all steps in which the learning rate rises",
        0.06,
        check=require_share,
    )
    hidden_dropout_prob: float | None = option(
        "dropout of hidden states and of the head (default: the model's)", None, check=require_fraction
    )
    attention_probs_dropout_prob: float | None = option(
        "dropout of attention weights (default: the model's)", None, check=require_fraction
    )
    early_stopping: int | None = option(
        "end a run once the metric has not improved for N epochs; until then, the learning rate follows the schedule "
        "of all epochs",
        None,
        check=require_positive,
        metavar="N",
    )
    bf16: bool = option("compute in bf16; the weights stay fp32, with DeepSpeed its master copies", False)
    fp16: bool = option("compute in fp16 on a GPU; the weights stay fp32, with DeepSpeed its master copies", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 are both given: choose one")

    @property
    def dropout(self) -> dict[str, float | None]:
        """What is given, by the names of transformers' config, in which a head's own dropout would take precedence."""
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, "classifier_dropout": None} if "hidden_dropout_prob" in given else given


@dataclass(frozen=True)
class Problem:
    """The model's folder, the task and its encoded examples.

    Attributes:
        encoded: the examples of each split; `train` and `validation` are among them.
        metric: the name of the metric that chooses the best epoch.
        deepspeed_config: the content of DeepSpeed's JSON; None: Trainer works without DeepSpeed.
    """

    folder: Path
    tokenizer: transformers.PreTrainedTokenizerBase
    task: Task
    encoded: dict[str, Encoded]
    metric: str
    recipe: Recipe
    deepspeed_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """The outcome of one run; the model after its best epoch is in `MODEL_FOLDER` of its folder.

    Attributes:
        epochs: metrics on the validation examples after each epoch, with the `loss`.
        best: index of the epoch with the best metric, the first if several are equal.
    """

    setting: Setting
    seed: int
    epochs: list[dict[str, Any]]
    best: int

    def score(self, metric: str) -> float:
        return self.epochs[self.best][metric]

    def stopped_after_epoch(self, recipe: Recipe) -> int | None:
        """The epoch after which the run stopped early; None: it trained for all epochs."""
        return len(self.epochs) if len(self.epochs) < recipe.num_train_epochs else None


class Diverged(UserError):
    """The loss is no longer finite."""


class Stopped(Exception):
    """The run was asked to stop and has saved."""


def train(problem: Problem, setting: Setting, seed: int, folder: Path, stop: StopRequest, ranks: Ranks) -> Run:
    """Fine-tune from the model's weights, or continue from the folder's checkpoint; a finished run's result is read.

    Args:
        folder: the run's own, created if necessary.
        stop: checked after each step.

    Raises:
        Diverged: the loss is no longer finite; the run's folder is removed.
        Stopped: `stop` requested it.
    """
    record = folder / _RECORD
    if record.exists():
        content = load_json(record.read_text(encoding="utf-8"))
        return Run(setting, seed, content["epochs"], content["best"])
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = ranks.on_main(lambda: last_checkpoint(folder / _TRAINER_FOLDER))
    recipe, name, step = problem.recipe, f"{setting}, seed {seed}", 0
    if checkpoint is not None:
        check_processes(checkpoint, ranks.world_size)
        step = int(checkpoint.name.rpartition("-")[2])
        ranks.log(f"{name}: continues from step {step}")
        before = ranks.on_main(lambda: _epochs(transformers.TrainerState.load_from_json(checkpoint / TRAINER_STATE)))
        if stops_early(before, problem.metric, recipe.early_stopping):  # killed before its record was written
            problem = replace(problem, recipe=replace(recipe, num_train_epochs=len(before)))
    trainer = make_trainer(problem, setting, seed, folder / _TRAINER_FOLDER, ranks.world_size)
    loss = trainer.compute_loss_func = _BatchLoss(problem.task)
    with StepBar(_max_steps(problem, setting), name, step, ranks.is_main) as bar:
        watch = _Watch(name, problem, loss, bar, stop, ranks)
        trainer.add_callback(watch)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Diverged:  # in all processes, which share the loss
            if ranks.is_main:
                shutil.rmtree(folder)
            raise
    if watch.stopped:
        raise Stopped
    epochs = _epochs(trainer.state)
    best = best_epoch(epochs, problem.metric)
    trainer.save_model(str(folder / MODEL_FOLDER))  # the best epoch's: load_best_model_at_end
    ranks.on_main(lambda: write_json(record, {"epochs": epochs, "best": best}))
    ranks.on_main(lambda: shutil.rmtree(folder / _TRAINER_FOLDER))
    return Run(setting, seed, epochs, best)


def best_epoch(epochs: Sequence[dict[str, Any]], metric: str) -> int:
    """The index of the epoch with the highest metric, the first if several are equal."""
    return max(range(len(epochs)), key=lambda epoch: epochs[epoch][metric])


def stops_early(epochs: Sequence[dict[str, Any]], metric: str, patience: int | None) -> bool:
    """Whether transformers' `EarlyStoppingCallback` with this `early_stopping_patience` stops a run after these epochs.

    As a function of the epochs, which Trainer saves, it needs no counter that has to survive an interruption.
    """
    return patience is not None and len(epochs) > patience + best_epoch(epochs, metric)


def evaluate(problem: Problem, run: Run, folder: Path, encoded: Encoded, ranks: Ranks) -> dict[str, Any]:
    """The metrics, and the `loss`, of a run's model on `encoded`; `folder` is the run's."""
    trainer = _trainer_of_best(problem, run, folder, ranks)
    trainer.compute_metrics = lambda prediction: problem.task.metrics(encoded, prediction.predictions)
    return _plain(trainer.evaluate(encoded.features))


def predictions(problem: Problem, run: Run, folder: Path, encoded: Encoded, ranks: Ranks) -> Any:
    """The logits of a run's model on `encoded`, as `Task.metrics` takes them; `folder` is the run's."""
    trainer = _trainer_of_best(problem, run, folder, ranks)
    trainer.compute_metrics = None
    return trainer.predict(encoded.features).predictions


def _trainer_of_best(problem: Problem, run: Run, folder: Path, ranks: Ranks) -> transformers.Trainer:
    """A Trainer with a finished run's model; with DeepSpeed only at stage 3, the one in which Trainer evaluates a model
    that it has not trained."""
    if value_at(problem.deepspeed_config, ("zero_optimization", "stage")) != 3:
        problem = replace(problem, deepspeed_config=None)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the Accelerator that trained
    return make_trainer(
        problem, run.setting, run.seed, folder / _TRAINER_FOLDER, ranks.world_size, folder / MODEL_FOLDER
    )


def make_trainer(
    problem: Problem, setting: Setting, seed: int, folder: Path, world_size: int, weights: Path | None = None
) -> transformers.Trainer:
    """A Trainer that evaluates and saves after each epoch, keeps the best and normalizes its loss as `Task.loss` does.

    Args:
        folder: where Trainer writes its checkpoints.
        weights: the folder with the encoder and perhaps the head, which is otherwise new; None: the problem's model.
    """
    recipe = problem.recipe
    train_set, validation_set = problem.encoded["train"], problem.encoded["validation"]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=setting.train_batch_size // recipe.gradient_accumulation_steps // world_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        per_device_eval_batch_size=EVALUATION_BATCH_SIZE,
        num_train_epochs=recipe.num_train_epochs,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.warmup_ratio * _max_steps(problem, setting)),
        weight_decay=recipe.weight_decay,
        max_grad_norm=0.0,  # the paper's recipe does not clip
        **ADAM,
        bf16=recipe.bf16,
        fp16=recipe.fp16,
        deepspeed=problem.deepspeed_config,
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the last: with 1, Trainer removes the one saved by a stop
        load_best_model_at_end=True,
        metric_for_best_model=problem.metric,
        greater_is_better=True,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is not finite ends the run, even if DeepSpeed drops its gradient
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),  # otherwise several processes on CPUs would train separately
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would divide the batch again
    transformers.set_seed(seed)  # for a new head
    model_class = getattr(transformers, problem.task.architecture)
    model = read_model(weights or problem.folder, model_class, changes=problem.task.head | recipe.dropout)
    model._weight_conversions = None  # under ZeRO-3 transformers 5.23 would save LayerNorm's old names, gamma and beta
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=problem.task.collator(problem.tokenizer),
        train_dataset=train_set.features,
        eval_dataset=validation_set.features,
        compute_metrics=lambda prediction: problem.task.metrics(validation_set, prediction.predictions),
        compute_loss_func=problem.task.loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    logging.getLogger("transformers.trainer_utils").addFilter(_is_news)
    return trainer


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Trainer says of checkpoints that are less than a second apart, which it then orders by number."""
    return not record.getMessage().startswith("mtime may not be reliable")


def _max_steps(problem: Problem, setting: Setting) -> int:
    of_epoch = math.ceil(len(problem.encoded["train"].features) / setting.train_batch_size)
    return of_epoch * problem.recipe.num_train_epochs


class _BatchLoss:
    """The task's loss, which also adds up that of a step's micro-batches."""

    def __init__(self, task: Task) -> None:
        self.task, self.of_step = task, torch.tensor(0.0)

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.task.loss(outputs, labels, num_items_in_batch)
        self.of_step = self.of_step.to(loss.device) + loss.detach()
        return loss


class _Watch(transformers.TrainerCallback):
    """Shows each step and logs each epoch, ends a run that has diverged or no longer improves, and makes a run that is
    asked to stop save first."""

    def __init__(
        self, run: str, problem: Problem, loss: _BatchLoss, bar: StepBar, stop: StopRequest, ranks: Ranks
    ) -> None:
        self.run, self.metric, self.patience = run, problem.metric, problem.recipe.early_stopping
        self.loss, self.bar, self.stop, self.ranks, self.stopped = loss, bar, stop, ranks, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.loss.of_step = torch.zeros_like(self.loss.of_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.bar.step(lambda: self.loss.of_step.item() * self.ranks.world_size)  # other processes' parts are alike
        if state.global_step < state.max_steps and self.stop.agreed():
            self.stopped = control.should_training_stop = True
            control.should_save = _is_within_epoch(args, state)  # after an epoch Trainer saves what it has evaluated

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.stopped and _is_within_epoch(args, state):
            # Trainer takes the stop for an epoch's end: it would evaluate, and perhaps choose, half an epoch's model.
            control.should_evaluate = control.should_save = control.should_log = False

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any, **others: Any) -> None:
        if not math.isfinite(loss := logs.get("loss", 0.0)):
            raise Diverged(f"the loss is {loss} in training at {self.run}: use a lower --learning_rate")

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Any, **others: Any) -> None:
        found = _plain(metrics)
        if not math.isfinite(found["loss"]):
            raise Diverged(f"the loss is {found['loss']} after an epoch at {self.run}: use a lower --learning_rate")
        epoch = f"epoch {round(state.epoch)} of {args.num_train_epochs}"
        lines = [f"{self.run}: {epoch}, {in_words(found)}"]
        # Agreed on: processes on different CPUs may round a metric differently.
        if (
            state.global_step < state.max_steps
            and self.patience
            and self.ranks.any(stops_early(_epochs(state), self.metric, self.patience))
        ):
            control.should_training_stop = True
            epochs = "an epoch" if self.patience == 1 else f"{self.patience} epochs"
            lines.append(f"{self.run}: {self.metric} has not improved for {epochs}: ends after {epoch}")
        with self.bar.interrupted():
            for line in lines:
                self.ranks.log(line)


def _is_within_epoch(args: Any, state: Any) -> bool:
    return bool(state.global_step % (state.max_steps // args.num_train_epochs))


def _epochs(state: transformers.TrainerState) -> list[dict[str, Any]]:
    """The metrics on the validation examples after each epoch."""
    return [_plain(entry) for entry in state.log_history if "eval_loss" in entry]


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Trainer's metrics without its prefix and its timings, in the order in which a continued run reads them."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    names = sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
    return {name: metrics[f"eval_{name}"] for name in names if name not in timings}


def in_words(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
