"""All runs of a fine-tuning, and the folder that it writes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import ds_roberta
from ds_roberta.data.tokenizer_files import write_tokenizer
from ds_roberta.distributed import Ranks, StopRequest
from ds_roberta.errors import UserError
from ds_roberta.files import (
    TOKENIZER_FILES,
    check_replaceable,
    errors_of_the_disk,
    holds_only,
    read_json,
    replaced_folder,
    write_json,
    write_text,
)
from ds_roberta.finetuning import TASKS
from ds_roberta.finetuning.deepspeed_json import read_deepspeed_json
from ds_roberta.finetuning.error_analysis import ERROR_ANALYSIS
from ds_roberta.finetuning.model_card import model_card
from ds_roberta.finetuning.one_run import (
    MODEL_FOLDER,
    Diverged,
    Problem,
    Recipe,
    Run,
    Setting,
    Stopped,
    evaluate,
    for_width,
    in_words,
    predictions,
    train,
)
from ds_roberta.finetuning.task import RESULTS, SHORTEST
from ds_roberta.finetuning.work_folder import keep_finished, open_work_folder, run_folder
from ds_roberta.inputs.tables import TABULAR_NAMES
from ds_roberta.lease import leases_folder, sole_writer
from ds_roberta.model.export import MODEL_CARD
from ds_roberta.model.kernels import set_gpu_arithmetic
from ds_roberta.options import Settings, option, require_positive
from ds_roberta.process import STOPPED_EXIT_CODE, logger
from ds_roberta.transformers_folder import check_tokenizer, open_folder, open_tokenizer, without_progress_bars

KIND = "just a model from an earlier fine-tuning"
NOT_IN_THE_PLAN = {"data", "deepspeed_config", "model", "output_dir", "seeds", "settings"}
"""Fields of `FinetuneConfig`: paths, whose content counts, and what makes runs of one plan."""
MODEL_FILES = ("config.json", "model.safetensors")
SWEEP = [Setting(rate, size) for size in (16, 32) for rate in (1e-5, 2e-5, 3e-5)]  # Liu et al. 2019, table 10


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """Model, task and data; see also `Recipe`.

    Attributes:
        data: see `labelled_tables.read_splits`.
        scale_rates: whether the rates of the settings are meant for a model as wide as base; see `for_width`.
        task_options: the task's own, of its `options_class`; None: their defaults.
    """

    model: Path = option("the transformers folder to start from", required=True)
    task: str = option("what to learn", choices=TASKS, required=True)
    data: tuple[str, ...] = option(
        "a folder with train, validation (or dev) and optionally test files (tables as "
        f"{TABULAR_NAMES}; CoNLL's columns, SQuAD's .json), or one saved by datasets, or hf://datasets/OWNER/NAME; or "
        "such files, also as validation=FILE",
        required=True,
        type=str,
        nargs="+",
        metavar="DIR_or_FILE",
    )
    output_dir: Path = option("the folder to write", required=True)
    metric: str | None = option(
        "the metric on validation that chooses the best epoch and run; a wrong one names the task's (default: "
        "accuracy, micro_f1, pearson or f1; with --choose_label_threshold best_micro_f1)",
        None,
    )
    max_seq_length: int | None = option("in tokens; default: the length that the model was trained with", None)
    max_train_samples: int | None = option(
        "train on at most N examples: a random sample, the same for every seed, in which labels need not have the same "
        "shares as in the whole",
        None,
        check=require_positive,
        metavar="N",
    )
    deepspeed_config: Path | None = option("train with DeepSpeed; see ds_configs/finetune.json", None)
    settings: tuple[Setting, ...] = (Setting(learning_rate=2e-5, train_batch_size=16),)
    scale_rates: bool = False
    seeds: tuple[int, ...] = (0,)
    recipe: Recipe = field(default_factory=Recipe)
    task_options: Settings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.settings or not self.seeds:
            raise UserError("settings and seeds need at least one entry each")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:  # numpy's limit
                raise UserError(f"--seeds {seed} is not between 0 and {2**32 - 1}: choose another")


def finetune(config: FinetuneConfig) -> int:
    """Train every setting with every seed; write the best model, its tokenizer and `results.json`, all or nothing.

    The best setting is the one with the highest median over the seeds of each run's best epoch; the model is that
    setting's best run, after its best epoch. Until then the runs are in a folder next to the output, so that the same
    command continues after an interruption.

    Returns:
        0, or `STOPPED_EXIT_CODE` if it was asked to stop (SIGUSR1, SIGTERM, Ctrl-C) and saved.

    Raises:
        UserError: a setting, the data or the model's folder is wrong, or the output cannot be written.
    """
    deepspeed_config = read_deepspeed_json(config.deepspeed_config)
    ranks = _ranks(deepspeed_config is not None)
    _check(config, ranks.world_size)
    set_gpu_arithmetic()
    with without_progress_bars():
        folder = open_folder(config.model)
        max_seq_length = folder.sequence_length(config.max_seq_length, SHORTEST)
        if config.scale_rates:
            settings = for_width(config.settings, folder.config.hidden_size)
            config = replace(config, settings=settings, scale_rates=False)
        problem = _problem(config, max_seq_length, deepspeed_config)
        output = config.output_dir.resolve()
        with errors_of_the_disk(output), ranks.main_holds(_sole_writer(output)):
            ranks.on_main(lambda: check_replaceable(output, is_finetuned_folder, KIND))
            asked = {name: value for name, value in asdict(config).items() if name not in NOT_IN_THE_PLAN}
            asked |= {"deepspeed_config": deepspeed_config, "head": problem.task.head}
            work = ranks.on_main(lambda: open_work_folder(output, asked, config.model, problem.encoded))
            try:
                runs, best = _train_all(config, problem, work, ranks)
            except Stopped:
                ranks.log("stopped on request; the same command continues from here")
                return STOPPED_EXIT_CODE
            except Diverged:
                if ranks.is_main:
                    keep_finished(work)
                raise
            problem.task.conclude(best.epochs[best.best])
            of_best = run_folder(work, best.setting, best.seed)
            others = {
                split: evaluate(problem, best, of_best, rows, ranks)
                for split, rows in problem.encoded.items()
                if split not in ("train", "validation")
            }
            summaries = [_summary(*each, problem.metric, config.recipe) for each in runs.items()]
            validation = problem.encoded["validation"]
            logits = predictions(problem, best, of_best, validation, ranks)
            analysis = ranks.on_main(lambda: problem.task.error_analysis(validation, logits))
            results = _results(config, problem, max_seq_length, summaries, best, others)
            ranks.on_main(lambda: _write(output, problem, of_best / MODEL_FOLDER, max_seq_length, results, analysis))
            ranks.on_main(lambda: shutil.rmtree(work.parent))
    for summary in summaries:
        ranks.log(
            f"learning rate {summary['learning_rate']:g}, batch {summary['train_batch_size']}: {problem.metric} on "
            f"validation {summary['median']:.4f} (median of {len(config.seeds)}), {summary['best']:.4f} (best)"
        )
    for remark in problem.task.remarks(best.epochs[best.best]):
        ranks.log(f"warning: {remark}")
    for split, metrics in others.items():
        ranks.log(f"{split}: {in_words(metrics)}")
    ranks.log(f"wrote {config.output_dir}: seed {best.seed}, epoch {best.best + 1}")
    return 0


@contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    with errors_of_the_disk(output), sole_writer(output, leases_folder(output)):  # before rank 0 tells the others
        yield


def _problem(config: FinetuneConfig, max_seq_length: int, deepspeed_config: dict[str, Any] | None) -> Problem:
    task_class = TASKS[config.task]
    task, splits = task_class.from_data(config.data, config.task_options or task_class.options_class())
    metric = config.metric or task.metric_names[0]
    if metric not in task.metric_names:
        raise UserError(f"--metric {metric} does not exist for these data: use one of {', '.join(task.metric_names)}")
    splits["train"] = _sample(splits["train"], config.max_train_samples)
    tokenizer = open_tokenizer(config.model, task.add_prefix_space)
    encoded = {split: task.encode(tokenizer, inputs, max_seq_length) for split, inputs in splits.items()}
    return Problem(config.model, tokenizer, task, encoded, metric, config.recipe, deepspeed_config)


def _sample(examples: Sequence[Any], at_most: int | None) -> Sequence[Any]:
    """A fixed random sample in its order in the file; a larger one contains the smaller ones."""
    if at_most is None or at_most >= len(examples):
        return examples
    chosen = np.random.default_rng(0).permutation(len(examples))[:at_most]
    logger.info(f"{at_most:,} of {len(examples):,} training examples are used, chosen at random (--max_train_samples)")
    return [examples[index] for index in sorted(chosen)]


def _train_all(
    config: FinetuneConfig, problem: Problem, work: Path, ranks: Ranks
) -> tuple[dict[Setting, list[Run]], Run]:
    """Train all runs; return them and the best one, with its model in its folder.

    Raises:
        Stopped: a run was asked to stop and has saved.
    """
    runs: dict[Setting, list[Run]] = {}
    with StopRequest(ranks) as stop:
        for setting, seed in product(config.settings, config.seeds):
            run = train(problem, setting, seed, run_folder(work, setting, seed), stop, ranks)
            runs.setdefault(setting, []).append(run)
            ranks.on_main(lambda: _remove_weights(work, runs, problem.metric))
        best = choose(runs, problem.metric)
        of_best = run_folder(work, best.setting, best.seed)
        if not ranks.on_main((of_best / MODEL_FOLDER).is_dir):  # an earlier call, with more runs, had a better one
            ranks.on_main(lambda: shutil.rmtree(of_best))
            best = train(problem, best.setting, best.seed, of_best, stop, ranks)
    return runs, best


def _results(
    config: FinetuneConfig,
    problem: Problem,
    max_seq_length: int,
    summaries: list[dict[str, Any]],
    best: Run,
    others: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        summaries: of the settings, from `_summary`.
        others: the metrics of the splits that are neither `train` nor `validation`.
    """
    return {
        "model": str(config.model),
        "task": config.task,
        "metric": problem.metric,
        "data": list(config.data),
        "examples": {split: len(rows.inputs) for split, rows in problem.encoded.items()},
        "max_train_samples": config.max_train_samples,
        **problem.task.results,
        "max_seq_length": max_seq_length,
        "recipe": asdict(config.recipe),
        "deepspeed_config": problem.deepspeed_config,
        "settings": summaries,
        "best": {
            **asdict(best.setting),
            "seed": best.seed,
            "epoch": best.best + 1,
            "stopped_after_epoch": best.stopped_after_epoch(config.recipe),
            "validation": best.epochs[best.best],
            **others,
        },
        "versions": {"ds_roberta": ds_roberta.__version__, "transformers": transformers.__version__},
    }


def _write(
    output: Path,
    problem: Problem,
    model: Path,
    max_seq_length: int,
    results: dict[str, Any],
    analysis: dict[str, Any] | None,
) -> None:
    with replaced_folder(output, is_finetuned_folder, KIND, is_held=True) as partial:
        for name in MODEL_FILES:
            shutil.copyfile(model / name, partial / name)
        write_tokenizer(problem.folder, partial, max_seq_length, problem.task.add_prefix_space)
        check_tokenizer(partial, problem.folder, problem.task.add_prefix_space)
        write_json(partial / RESULTS, results)
        if analysis is not None:
            write_json(partial / ERROR_ANALYSIS, analysis)
        config, architecture = read_json(partial / "config.json"), problem.task.architecture
        card = model_card(config["model_type"], architecture, results, has_error_analysis=analysis is not None)
        write_text(partial / MODEL_CARD, card)


def choose(runs: dict[Setting, list[Run]], metric: str) -> Run:
    """The best run of the setting with the highest median; the first if several are equal."""
    best_setting = max(runs.values(), key=lambda of_setting: statistics.median(run.score(metric) for run in of_setting))
    return max(best_setting, key=lambda run: run.score(metric))


def is_finetuned_folder(folder: Path) -> bool:
    """Whether `folder` holds only what a fine-tuning wrote, so that another may replace it."""
    return (folder / RESULTS).is_file() and holds_only(
        folder, TOKENIZER_FILES | set(MODEL_FILES) | {RESULTS, ERROR_ANALYSIS, MODEL_CARD}
    )


def _ranks(with_deepspeed: bool) -> Ranks:
    """This process's rank under the launcher; a single process joins no group unless DeepSpeed needs one."""
    if not with_deepspeed and "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return Ranks.of_one_process()
    from ds_roberta.training.device import init_distributed  # DeepSpeed takes seconds

    return init_distributed()


def _check(config: FinetuneConfig, world_size: int) -> None:
    for library in ("accelerate", "sklearn", "scipy", "seqeval"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"fine-tuning needs {library}, which is not installed: pip install 'ds_roberta[finetune]'")
    if config.recipe.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU, and none is found here: leave it out, or give --bf16")
    output = config.output_dir.resolve()
    if config.model.resolve().is_relative_to(output):
        raise UserError(
            f"--model {str(config.model)!r} is in --output_dir {str(config.output_dir)!r}, which is replaced "
            "as a whole: choose another folder for the output"
        )
    if len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"--seeds {','.join(map(str, config.seeds))} has a seed twice: give each once")
    if len(set(config.settings)) != len(config.settings):
        raise UserError("--learning_rate or --train_batch_size has a value twice: give each once")
    parts = config.recipe.gradient_accumulation_steps * world_size
    for setting in config.settings:
        if setting.train_batch_size % parts:
            raise UserError(
                f"the batch of {setting.train_batch_size} cannot be divided among {world_size} processes and "
                f"--gradient_accumulation_steps {config.recipe.gradient_accumulation_steps}: use a multiple of {parts}"
            )


def _remove_weights(work: Path, runs: dict[Setting, list[Run]], metric: str) -> None:
    """Keep only the weights of the runs that may be the best: one of the current setting, one of the earlier ones."""
    *before, latest = runs.items()
    keep = [choose(dict([latest]), metric), *([choose(dict(before), metric)] if before else [])]
    for run in (run for of_setting in runs.values() for run in of_setting):
        if run not in keep:
            shutil.rmtree(run_folder(work, run.setting, run.seed) / MODEL_FOLDER, ignore_errors=True)


def _summary(setting: Setting, runs: Sequence[Run], metric: str, recipe: Recipe) -> dict[str, Any]:
    scores = [run.score(metric) for run in runs]
    return {
        **asdict(setting),
        "median": statistics.median(scores),
        "best": max(scores),
        "runs": [
            {
                "seed": run.seed,
                "epoch": run.best + 1,
                "stopped_after_epoch": run.stopped_after_epoch(recipe),
                "epochs": run.epochs,
            }
            for run in runs
        ],
    }
