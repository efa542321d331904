"""All runs of a fine-tuning, and the folder that it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import transformers

import ds_roberta
from ds_roberta.data.tokenizer_files import write_tokenizer
from ds_roberta.deepspeed_keys import unknown_keys
from ds_roberta.distributed import STOPPED_EXIT_CODE, Ranks, StopRequest, logger
from ds_roberta.errors import UserError
from ds_roberta.files import (
    TOKENIZER_FILES,
    check_replaceable,
    errors_of_the_disk,
    holds_only,
    json_fingerprint,
    replaced_folder,
    write_json,
)
from ds_roberta.finetuning.classification import classification, regression
from ds_roberta.finetuning.examples import Columns
from ds_roberta.finetuning.inference import RESULTS
from ds_roberta.finetuning.labelled_tables import split_entry
from ds_roberta.finetuning.model import sequence_length
from ds_roberta.finetuning.one_run import (
    MODEL_FOLDER,
    Problem,
    Recipe,
    Run,
    Setting,
    Stopped,
    evaluate,
    in_words,
    train,
)
from ds_roberta.finetuning.question_answering import question_answering
from ds_roberta.finetuning.spans import SpanOptions
from ds_roberta.finetuning.task import Task
from ds_roberta.finetuning.token_classification import token_classification
from ds_roberta.model.attention import exclude_cudnn
from ds_roberta.options import require_one_of
from ds_roberta.transformers_folder import check_tokenizer, open_folder, open_tokenizer

TASKS = ("classification", "regression", "token-classification", "question-answering")
_AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_GATHER = "stage3_gather_16bit_weights_on_model_save"  # in whatever precision the weights have
KIND = "a model that was fine-tuned before, alone"
MODEL_FILES = ("config.json", "model.safetensors")
SWEEP = [Setting(rate, size) for size in (16, 32) for rate in (1e-5, 2e-5, 3e-5)]  # Liu et al. 2019, table 10


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning is asked for.

    Attributes:
        data: see `labelled_tables.read_splits`.
        metric: the metric on the validation examples that chooses; None: the first of `Task.metrics`.
        max_seq_length: in tokens; None: the length that the model was trained with.
        spans: of question answering.
    """

    model: Path
    task: str
    data: tuple[str, ...]
    output_dir: Path
    columns: Columns = field(default_factory=Columns)
    settings: tuple[Setting, ...] = (Setting(learning_rate=2e-5, train_batch_size=16),)
    seeds: tuple[int, ...] = (0,)
    recipe: Recipe = field(default_factory=Recipe)
    metric: str | None = None
    max_seq_length: int | None = None
    spans: SpanOptions = field(default_factory=SpanOptions)
    deepspeed_config: Path | None = None

    def __post_init__(self) -> None:
        require_one_of("--task", self.task, TASKS)
        if not self.settings or not self.seeds:
            raise UserError("settings and seeds need one entry each at least")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:  # numpy's limit
                raise UserError(f"--seeds {seed} is not within 0 and {2**32 - 1}: give another")


def finetune(config: FinetuneConfig) -> int:
    """Train every setting with every seed; write the best model, its tokenizer and `results.json`, all or nothing.

    The best setting is the one with the highest median over the seeds of each run's best epoch; the model is that
    setting's best run, after its best epoch. Until then the runs lie in a folder beside the output, so that the same
    call goes on where it was broken off.

    Returns:
        0, or `STOPPED_EXIT_CODE` where it was asked to stop (SIGUSR1, SIGTERM, Ctrl-C) and saved.

    Raises:
        UserError: a setting, the data or the model's folder is wrong, or the output cannot be written.
    """
    deepspeed_config = read_deepspeed_config(config.deepspeed_config)
    ranks = _ranks(deepspeed_config is not None)
    _check(config, ranks.world_size)
    transformers.utils.logging.disable_progress_bar()
    exclude_cudnn()
    max_seq_length = sequence_length(open_folder(config.model), config.max_seq_length)
    task = read_task(config)
    metric = config.metric or task.metrics[0]
    if metric not in task.metrics:
        raise UserError(f"--metric {metric} is not of these data: use one of {', '.join(task.metrics)}")
    tokenizer = open_tokenizer(config.model, task.add_prefix_space)
    encoded = {split: task.encode(tokenizer, examples, max_seq_length) for split, examples in task.splits.items()}
    problem = Problem(
        config.model, tokenizer, task, encoded["train"], encoded["validation"], metric, config.recipe, deepspeed_config
    )
    output = config.output_dir.resolve()
    with errors_of_the_disk(output):
        work = ranks.on_main(lambda: _work_folder(output, config, deepspeed_config))
        runs: dict[Setting, list[Run]] = {}
        with StopRequest(ranks) as stop:
            try:
                for setting, seed in product(config.settings, config.seeds):
                    run = train(problem, setting, seed, _run_folder(work, setting, seed), stop, ranks)
                    runs.setdefault(setting, []).append(run)
                    ranks.on_main(lambda: _remove_weights(work, runs, metric))
                best = choose(runs, metric)
                of_best = _run_folder(work, best.setting, best.seed)
                if not ranks.on_main((of_best / MODEL_FOLDER).is_dir):  # another call, of more runs, had a better one
                    ranks.on_main(lambda: shutil.rmtree(of_best))
                    best = train(problem, best.setting, best.seed, of_best, stop, ranks)
            except Stopped:
                ranks.log("stopped on request; the same command goes on from here")
                return STOPPED_EXIT_CODE
        others = {
            split: evaluate(problem, best, of_best, rows, ranks)
            for split, rows in encoded.items()
            if split not in ("train", "validation")
        }
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
            "deepspeed_config": deepspeed_config,
            "settings": summaries,
            "best": {**_entry(best), **others},
            "versions": {"ds_roberta": ds_roberta.__version__, "transformers": transformers.__version__},
        }

        def write() -> None:
            with replaced_folder(output, is_finetuned_folder, KIND) as partial:
                for name in MODEL_FILES:
                    shutil.copyfile(of_best / MODEL_FOLDER / name, partial / name)
                write_tokenizer(config.model, partial, max_seq_length, task.add_prefix_space)
                check_tokenizer(partial, config.model, task.add_prefix_space)
                write_json(partial / RESULTS, results)

        ranks.on_main(write)
        ranks.on_main(lambda: shutil.rmtree(work.parent))
    for summary in summaries:
        ranks.log(
            f"learning rate {summary['learning_rate']:g}, batch {summary['train_batch_size']}: {metric} on validation "
            f"{summary['median']:.4f} (median of {len(config.seeds)}), {summary['best']:.4f} (best)"
        )
    for split, metrics in others.items():
        ranks.log(f"{split}: {in_words(metrics)}")
    ranks.log(f"wrote {config.output_dir}: seed {best.seed}, epoch {best.best + 1}")
    return 0


def choose(runs: dict[Setting, list[Run]], metric: str) -> Run:
    """The best run of the setting with the highest median; the first of equals."""
    best_setting = max(runs.values(), key=lambda of_setting: statistics.median(run.score(metric) for run in of_setting))
    return max(best_setting, key=lambda run: run.score(metric))


def is_finetuned_folder(folder: Path) -> bool:
    """Whether `folder` holds what a fine-tuning wrote and nothing else, so that another may replace it."""
    return (folder / RESULTS).is_file() and holds_only(folder, TOKENIZER_FILES | set(MODEL_FILES) | {RESULTS})


def _ranks(with_deepspeed: bool) -> Ranks:
    """This process among those of the launcher; a process alone joins none unless DeepSpeed asks for it."""
    if not with_deepspeed and "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return Ranks(0, 1, 0, None)
    from ds_roberta.training.device import init_distributed  # DeepSpeed takes seconds

    return init_distributed()


def _check(config: FinetuneConfig, world_size: int) -> None:
    for library in ("accelerate", "sklearn", "scipy", "seqeval"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"fine-tuning needs {library}, which is not installed: pip install 'ds_roberta[finetune]'")
    if len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"--seeds {','.join(map(str, config.seeds))} names a seed twice: name each once")
    if len(set(config.settings)) != len(config.settings):
        raise UserError("--learning_rate or --train_batch_size names a value twice: name each once")
    parts = config.recipe.gradient_accumulation_steps * world_size
    for setting in config.settings:
        if setting.train_batch_size % parts:
            raise UserError(
                f"the batch of {setting.train_batch_size} cannot be divided among {world_size} processes and "
                f"--gradient_accumulation_steps {config.recipe.gradient_accumulation_steps}: use a multiple of {parts}"
            )


def read_task(config: FinetuneConfig) -> Task:
    if config.task == "question-answering":
        return question_answering(config.data, config.spans)
    read = {"classification": classification, "regression": regression, "token-classification": token_classification}
    return read[config.task](config.data, config.columns)


def read_deepspeed_config(path: Path | None) -> dict[str, Any] | None:
    """
    Raises:
        UserError: the file cannot be read, is no JSON object, has a key that DeepSpeed does not know, or settles what
            the command line does.
    """
    if path is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed_config needs deepspeed, which is not installed: pip install deepspeed")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --deepspeed_config {str(path)!r} ({error}): give a JSON file") from error
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {str(path)!r} is no JSON object: see ds_configs/finetune.json")
    if unknown := unknown_keys(content):
        raise UserError(f"--deepspeed_config {str(path)!r}: {unknown[0]}", *unknown[1:])
    settled = [name for name in ("optimizer", "scheduler") if name in content]
    settled += [name for name in _AUTO if content.get(name, "auto") != "auto"]
    precisions = {name: content.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    settled += [f"{name}.enabled" for name, enabled in precisions.items() if enabled != "auto"]
    if settled:
        raise UserError(
            f"--deepspeed_config {str(path)!r} settles {', '.join(settled)}, which fine-tuning's command line does: "
            'remove it or give "auto", as ds_configs/finetune.json has it'
        )
    zero = content.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.setdefault(_GATHER, True):
        raise UserError(
            f"--deepspeed_config {str(path)!r} says {_GATHER} false, so that no model could be written: remove it"
        )
    return content


def _work_folder(output: Path, config: FinetuneConfig, deepspeed_config: dict[str, Any] | None) -> Path:
    """Where the runs lie until the output is written; one of another plan is emptied.

    Settings and seeds are not part of a plan: each run has a folder of its own.

    Raises:
        UserError: the output is there and must not be replaced.
    """
    check_replaceable(output, is_finetuned_folder, KIND)
    asked = asdict(config) | {"settings": None, "seeds": None, "deepspeed_config": deepspeed_config}
    work = output.parent / f".{output.name}.runs"
    given = [config.model, *(split_entry(entry)[1] for entry in config.data)]
    inputs = [file for path in given for file in _files(path) if not {output, work} & set(file.resolve().parents)]
    asked["inputs"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in inputs]
    plan = json_fingerprint(json.loads(json.dumps(asked, default=str)))
    if work.exists() and not (work / plan).exists():
        logger.info(f"{work} is of another fine-tuning that was broken off: it begins anew")
        shutil.rmtree(work)
    (work / plan).mkdir(parents=True, exist_ok=True)
    return work / plan


def _files(path: Path) -> list[Path]:
    return sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]


def _run_folder(work: Path, setting: Setting, seed: int) -> Path:
    return work / f"rate-{setting.learning_rate!r}-batch-{setting.train_batch_size}-seed-{seed}"


def _remove_weights(work: Path, runs: dict[Setting, list[Run]], metric: str) -> None:
    """Keep the weights of the runs that may still be the best: one of the setting in progress, one of those before."""
    *before, latest = runs.items()
    keep = [choose(dict([latest]), metric), *([choose(dict(before), metric)] if before else [])]
    for run in (run for of_setting in runs.values() for run in of_setting):
        if run not in keep:
            shutil.rmtree(_run_folder(work, run.setting, run.seed) / MODEL_FOLDER, ignore_errors=True)


def _entry(run: Run) -> dict[str, Any]:
    return {**asdict(run.setting), "seed": run.seed, "epoch": run.best + 1, "validation": run.epochs[run.best]}


def _summary(setting: Setting, runs: Sequence[Run], metric: str) -> dict[str, Any]:
    scores = [run.score(metric) for run in runs]
    return {
        **asdict(setting),
        "median": statistics.median(scores),
        "best": max(scores),
        "runs": [{"seed": run.seed, "epoch": run.best + 1, "epochs": run.epochs} for run in runs],
    }
