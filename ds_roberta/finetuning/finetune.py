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
from ds_roberta.finetuning.examples import Columns, Examples, class_examples, label_names, number_examples
from ds_roberta.finetuning.metrics import METRICS
from ds_roberta.finetuning.model import encode_examples, read_config, read_tokenizer, sequence_length
from ds_roberta.finetuning.tables import read_splits
from ds_roberta.finetuning.trainer import Problem, Recipe, Run, Setting, evaluate, new_model, train

RESULTS = "results.json"
SWEEP = [Setting(rate, size) for size in (16, 32) for rate in (1e-5, 2e-5, 3e-5)]  # Liu et al. 2019, table 10


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning is asked for.

    Attributes:
        data: see `tables.read_splits`.
        metric: the metric on the validation examples that chooses; None: the first of the task's `METRICS`.
        max_seq_length: in tokens; None: the model's positions.
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


def finetune(config: FinetuneConfig) -> None:
    """Train every setting with every seed; write the best model, its tokenizer and `results.json`, all or nothing.

    The best setting is the one with the highest median over the seeds of each run's best epoch; the model is that
    setting's best run, after its best epoch.

    Raises:
        UserError: a setting, the data or the model's folder is wrong, or the output cannot be written.
    """
    _check(config)
    metric = config.metric or METRICS[config.task][0]
    model_config = read_config(config.model)
    tokenizer = read_tokenizer(config.model, model_config)
    max_seq_length = sequence_length(model_config, config.max_seq_length)
    names, splits = _read_examples(config)
    if metric == "f1" and len(names) != 2:
        raise UserError(f"--metric f1 is of two classes, these are {len(names)}: use macro_f1")
    features = {split: encode_examples(tokenizer, examples, max_seq_length) for split, examples in splits.items()}
    problem = Problem(config.model, tokenizer, names, features["train"], features["validation"], metric)
    with replaced_folder(config.output_dir, is_finetuned_folder, "a model that was fine-tuned before") as partial:
        runs = {
            setting: [train(problem, setting, config.recipe, seed) for seed in config.seeds]
            for setting in config.settings
        }
        best = choose(runs, metric)
        test = evaluate(problem, best.weights, features["test"]) if "test" in features else None
        summaries = [_summary(setting, of_setting, metric) for setting, of_setting in runs.items()]
        results = {
            "model": str(config.model),
            "task": config.task,
            "metric": metric,
            "label_names": names,
            "data": list(config.data),
            "examples": {split: len(rows) for split, rows in features.items()},
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
    for library in ("accelerate", "sklearn", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"fine-tuning needs {library}, which is not installed: pip install 'ds_roberta[finetune]'")
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise UserError(
            f"fine-tuning is of one process, not WORLD_SIZE={os.environ['WORLD_SIZE']}: start it with python"
        )
    if config.metric not in (None, *METRICS[config.task]):
        raise UserError(
            f"--metric {config.metric} is not of {config.task}: use one of {', '.join(METRICS[config.task])}"
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


def _read_examples(config: FinetuneConfig) -> tuple[list[str], dict[str, Examples]]:
    tables = read_splits(config.data)
    if config.task == "regression":
        return [], {split: number_examples(table, config.columns) for split, table in tables.items()}
    names = label_names(tables["train"], config.columns)
    return names, {split: class_examples(table, config.columns, names) for split, table in tables.items()}


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
