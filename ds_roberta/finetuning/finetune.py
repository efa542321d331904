"""All runs of a fine-tuning, and the folder that it leaves."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

import ds_roberta
from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.files import replaced_folder, write_json
from ds_roberta.finetuning.classification import classification, regression
from ds_roberta.finetuning.examples import Columns
from ds_roberta.finetuning.inference import RESULTS
from ds_roberta.finetuning.model import read_config, read_tokenizer, sequence_length
from ds_roberta.finetuning.question_answering import question_answering
from ds_roberta.finetuning.spans import SpanOptions
from ds_roberta.finetuning.task import Task
from ds_roberta.finetuning.token_classification import token_classification
from ds_roberta.finetuning.trainer import Problem, Recipe, Run, Setting, evaluate, new_model, train

TASKS = ("classification", "regression", "token-classification", "question-answering")
SWEEP = [Setting(rate, size) for size in (16, 32) for rate in (1e-5, 2e-5, 3e-5)]  # Liu et al. 2019, table 10


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning is asked for.

    Attributes:
        data: see `tables.read_splits`.
        metric: the metric on the validation examples that chooses; None: the first of `Task.metrics`.
        max_seq_length: in tokens; None: the model's positions.
        spans: of question answering.
    """

    model: Path
    task: str
    data: tuple[str, ...]
    output_dir: Path
    columns: Columns
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    metric: str | None
    max_seq_length: int | None
    spans: SpanOptions


def finetune(config: FinetuneConfig) -> None:
    """Train every setting with every seed; write the best model, its tokenizer and `results.json`, all or nothing.

    The best setting is the one with the highest median over the seeds of each run's best epoch; the model is that
    setting's best run, after its best epoch.

    Raises:
        UserError: a setting, the data or the model's folder is wrong, or the output cannot be written.
    """
    _check(config)
    model_config = read_config(config.model)
    max_seq_length = sequence_length(model_config, config.max_seq_length)
    task = read_task(config)
    metric = config.metric or task.metrics[0]
    if metric not in task.metrics:
        raise UserError(f"--metric {metric} is not of these data: use one of {', '.join(task.metrics)}")
    tokenizer = read_tokenizer(config.model, model_config, **task.tokenizer_options)
    encoded = {split: task.encode(tokenizer, examples, max_seq_length) for split, examples in task.splits.items()}
    problem = Problem(config.model, tokenizer, task, encoded["train"], encoded["validation"], metric)
    with replaced_folder(config.output_dir, is_finetuned_folder, "a model that was fine-tuned before") as partial:
        runs = {
            setting: [train(problem, setting, config.recipe, seed) for seed in config.seeds]
            for setting in config.settings
        }
        best = choose(runs, metric)
        test = evaluate(problem, best.weights, encoded["test"]) if "test" in encoded else None
        summaries = [_summary(setting, of_setting, metric) for setting, of_setting in runs.items()]
        results = {
            "model": str(config.model),
            "task": config.task,
            "metric": metric,
            "data": list(config.data),
            "examples": {split: rows.examples for split, rows in encoded.items()},
            **task.results,
            "max_seq_length": max_seq_length,
            "recipe": asdict(config.recipe),
            "settings": summaries,
            "best": {**_entry(best), "test": test},
            "versions": {"ds_roberta": ds_roberta.__version__, "transformers": transformers.__version__},
        }
        _save(problem, best, max_seq_length, partial)
        write_json(partial / RESULTS, results)
    for summary in summaries:
        logger.info(
            f"learning rate {summary['learning_rate']:g}, batch {summary['train_batch_size']}: {metric} on validation "
            f"{summary['median']:.4f} (median of {len(config.seeds)}), {summary['best']:.4f} (best)"
        )
    logger.info(
        f"wrote {config.output_dir}: seed {best.seed}, epoch {best.best + 1}" + (f", test {test}" if test else "")
    )


def choose(runs: dict[Setting, list[Run]], metric: str) -> Run:
    """The best run of the setting with the highest median; the first of equals."""
    best_setting = max(
        runs.values(), key=lambda of_setting: statistics.median(_score(run, metric) for run in of_setting)
    )
    return max(best_setting, key=lambda run: _score(run, metric))


def is_finetuned_folder(folder: Path) -> bool:
    return (folder / RESULTS).is_file() and (folder / "config.json").is_file()


def _check(config: FinetuneConfig) -> None:
    for library in ("accelerate", "sklearn", "scipy", "seqeval"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"fine-tuning needs {library}, which is not installed: pip install 'ds_roberta[finetune]'")
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise UserError(
            f"fine-tuning is of one process, not WORLD_SIZE={os.environ['WORLD_SIZE']}: start it with python"
        )
    if len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"--seeds {','.join(map(str, config.seeds))} names a seed twice: name each once")
    accumulation = config.recipe.gradient_accumulation_steps
    for setting in config.settings:
        if setting.train_batch_size % accumulation:
            raise UserError(
                f"--gradient_accumulation_steps {accumulation} does not divide the batch of "
                f"{setting.train_batch_size}: use a divisor"
            )


def read_task(config: FinetuneConfig) -> Task:
    if config.task == "question-answering":
        return question_answering(config.data, config.spans)
    read = {"classification": classification, "regression": regression, "token-classification": token_classification}
    return read[config.task](config.data, config.columns)


def _save(problem: Problem, run: Run, max_seq_length: int, folder: Path) -> None:
    model = new_model(problem)
    model.load_state_dict(run.weights)
    model.save_pretrained(folder)
    problem.tokenizer.model_max_length = max_seq_length
    problem.tokenizer.save_pretrained(folder)


def _score(run: Run, metric: str) -> float:
    return run.epochs[run.best][metric]


def _entry(run: Run) -> dict[str, Any]:
    return {**asdict(run.setting), "seed": run.seed, "epoch": run.best + 1, "validation": run.epochs[run.best]}


def _summary(setting: Setting, runs: Sequence[Run], metric: str) -> dict[str, Any]:
    scores = [_score(run, metric) for run in runs]
    return {
        **asdict(setting),
        "median": statistics.median(scores),
        "best": max(scores),
        "runs": [{"seed": run.seed, "epoch": run.best + 1, "epochs": run.epochs} for run in runs],
    }
