"""Runs that differ in one thing, side by side: their held-out loss, their choice between sentences, and what they are
worth fine-tuned.

    python -m benchmarks.compare examples/recipes/fast.json --data_dir data/wiki

The JSON file says what is compared (examples/recipes/README.md). Every run is the real command with `--recipe fast`,
as many tokens (or, with `--max_minutes`, as much CPU time) for each, and each of the seeds, on one thread of the CPU.
Seconds are the CPU time of optimizer steps, so that other work on the machine changes them little.

Each run's results are kept in a file as soon as they are known, and the same command goes on with what is missing.
Calls with the same options may run at the same time, on several cores: each takes what nobody else measures. Each ends
with a Markdown table of what is finished; `--runs` without names only makes it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, commit, cpu_model, publish, versions
from benchmarks.studies import (
    NEVER,
    Busy,
    Task,
    add_fine_tuning,
    beside,
    best_rate,
    command,
    difference,
    execute,
    fine_tuned,
    fingerprint_of,
    only_here,
    recipe_name,
    trained,
)
from ds_roberta.command_line import ArgumentParser, positive, positive_number, run_command, several
from ds_roberta.config import PRESETS
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json
from ds_roberta.training.metrics import METRICS_NAME, read_metrics
from ds_roberta.training.recipes import RECIPES

RESULTS = REPOSITORY / "benchmarks/results/compare"


@dataclass(frozen=True)
class Run:
    """How a run differs from the recipe.

    Attributes:
        options: of `launch/pretrain.py`.
        deepspeed: values of the DeepSpeed JSON.
        factors: what the optimizer's values for the model's width are multiplied by.
        budget: what the tokens or minutes of every run are multiplied by.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    budget: float = 1


@dataclass(frozen=True)
class Comparison:
    """What is compared: the first run is the one that the others are held against.

    Attributes:
        question: the title of the table.
        source: where the question comes from, and what was found there.
        options: of `launch/pretrain.py`, for all runs.
        evaluation: options of `launch/evaluate.py perplexity`, by which all exports are evaluated alike; empty: the
            runs' own last held-out losses are compared.
        runs: by their names.
    """

    question: str
    source: str
    runs: Mapping[str, Run]
    options: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Comparison:
        content = read_json(path)
        try:
            runs = {name: Run(**values) for name, values in content.pop("runs").items()}
            return cls(runs=runs, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{str(path)!r} is no comparison ({error}): see examples/recipes/README.md") from error


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        commit: that it ran at.
        cpu: that it ran on.
        settings: what `settings_of` says, None in results of older versions.
        eval_loss: None where the objective has no masked-LM loss.
        tokens, seconds: that it took, None in results of older versions.
        metrics: of fine-tuning on the validation split, by learning rate.
        tuning: what these are of, as `tuning_of` says; None in results of older versions.
        pairs: the accuracy on minimal pairs, the mean over paradigms.
        pairs_folder: its name, None in results of older versions.
    """

    commit: str
    cpu: str
    eval_loss: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    pairs: float | None = None
    settings: str | None = None
    tuning: str | None = None
    pairs_folder: str | None = None


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="the JSON file")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder made by 'preprocess shard'")
    parser.add_argument("--model", default="nano")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--max_tokens", type=positive, default=1_500_000, help="of each run (default: %(default)s)")
    budget.add_argument("--max_minutes", type=positive_number, help="CPU time of each run, in place of tokens")
    parser.add_argument("--eval_sequences", type=positive, default=512)
    parser.add_argument("--seeds", type=several(int), default=(0, 1, 2))
    parser.add_argument("--runs", nargs="*", metavar="NAME", help="which to run (default: all)")
    parser.add_argument("--pairs", type=Path, help="also measure each model on a folder of minimal pairs")
    parser.add_argument("--finetune_data", type=Path, help="also fine-tune each model: classification, by accuracy")
    add_fine_tuning(parser)
    parser.add_argument("--results", type=Path, help=f"folder of the results (default: in {RESULTS.parent.name})")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that this runs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run_command(lambda: compare(parser.parse_args()))


def compare(options: argparse.Namespace) -> None:
    options.results = options.results or RESULTS / options.comparison.stem
    comparison = Comparison.read(options.comparison)
    names = list(comparison.runs) if options.runs is None else options.runs
    if unknown := set(names) - comparison.runs.keys():
        raise UserError(f"--runs names {min(unknown)!r}: choose from {', '.join(map(repr, comparison.runs))}")
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in names:
            try:
                with only_here(options.results, result_path(options, name, seed).stem) as lock:
                    measure(options, comparison, name, seed, lock)
            except Busy:
                print(f"{name}, seed {seed}: another call measures it", flush=True)
    publish(report(options, comparison), beside(options.results, ".md"))


def result_path(options: argparse.Namespace, name: str, seed: int) -> Path:
    budget = f"{options.max_minutes:g}min" if options.max_minutes else options.max_tokens
    case = f"{options.model}-{budget}-{'-'.join(re.findall(r'[A-Za-z0-9.]+', name))}-seed{seed}"
    return Path(options.results / f"{case}.json")


def result_of(options: argparse.Namespace, comparison: Comparison, name: str, seed: int) -> Result | None:
    """What is kept of a run; raises `UserError` if it is of something else. Older versions did not keep all of it."""
    path = result_path(options, name, seed)
    if not path.exists():
        return None
    result = Result(**read_json(path))
    for what, found, asked in (
        ("other data, options or values of the recipe", result.settings,
         settings_of(arguments(options, comparison, name), comparison)),
        ("another task or fine-tuning", result.tuning, tuning_of(options)),
        ("other minimal pairs", result.pairs_folder, options.pairs and options.pairs.name),
    ):  # fmt: skip
        if None not in (found, asked) and found != asked:
            raise UserError(f"{str(path)!r} is of {what}: give another --results, or remove it")
    return result


def measure(options: argparse.Namespace, comparison: Comparison, name: str, seed: int, lock: int) -> None:
    """Run what has no result yet, and keep its result."""
    path, result = result_path(options, name, seed), result_of(options, comparison, name, seed)
    output, given = path.with_suffix(""), arguments(options, comparison, name)
    if result is None:
        program = commit()
        execute(command("pretrain.py", {**given, "seed": seed, "output_dir": output}), lock)
        loss, ran = held_out_loss(options, comparison, output, lock), trained(output)
        kind = settings_of(given, comparison)
        result = Result(program, cpu_model(), loss, ran["tokens"], ran["step_seconds"], settings=kind)
        write_json(path, asdict(result))
    if options.finetune_data and not result.metrics:
        result = replace(result, metrics=finetuned(options, output, seed, lock), tuning=tuning_of(options))
        write_json(path, asdict(result))
    if options.pairs and result.pairs is None:
        accuracy = minimal_pairs(options, output, lock)
        result = replace(result, pairs=accuracy, pairs_folder=options.pairs.name)
        write_json(path, asdict(result))
    print(f"{name}, seed {seed}: {result}", flush=True)


def arguments(options: argparse.Namespace, comparison: Comparison, name: str) -> dict[str, Any]:
    """The options of `launch/pretrain.py`; the DeepSpeed JSON is written where it differs from the recipe's."""
    run, recipe = comparison.runs[name], RECIPES["fast"]
    given: dict[str, Any] = {"recipe": "fast", "loss_plateau": "off", "eval_interval": NEVER, "save_interval": NEVER}
    given |= {key: getattr(options, key) for key in ("data_dir", "model", "max_seq_length", "eval_sequences")}
    if "max_steps" not in run.options:
        name_of_budget = "max_minutes" if options.max_minutes else "max_tokens"
        given[name_of_budget] = (options.max_minutes or options.max_tokens) * run.budget
    if run.deepspeed or run.factors:
        content = read_json(recipe.deepspeed_config)
        params = content["optimizer"]["params"] | recipe.params_for(PRESETS[options.model].hidden_size)
        content["optimizer"]["params"] = params | {key: params[key] * by for key, by in run.factors.items()}
        given["deepspeed_config"] = result_path(options, name, 0).with_suffix(".deepspeed.json")
        write_json(given["deepspeed_config"], content | run.deepspeed)
    return {**given, **comparison.options, **run.options}


def settings_of(given: Mapping[str, Any], comparison: Comparison) -> str:
    """A short name of all that a result depends on but the seed: data, options, their recipe, the evaluation."""
    data = Corpus.open(Path(given["data_dir"])).manifest.fingerprint
    deepspeed = read_json(given["deepspeed_config"]) if "deepspeed_config" in given else None
    options = {name: value for name, value in given.items() if name not in ("data_dir", "deepspeed_config")}
    return fingerprint_of([data, options, deepspeed, recipe_name(), comparison.evaluation])


def tuning_of(options: argparse.Namespace) -> str | None:
    """A short name of the task and of how models are fine-tuned on it; None without one."""
    if options.finetune_data is None:
        return None
    settings = ("finetune_data", "num_train_epochs", "finetune_learning_rates", "max_train_samples", "max_seq_length")
    # Only where it is given, so that results from before the option keep their name.
    dropout = [] if options.finetune_dropout is None else [options.finetune_dropout]
    return fingerprint_of([*(getattr(options, name) for name in settings), *dropout])


def held_out_loss(options: argparse.Namespace, comparison: Comparison, output: Path, lock: int) -> float | None:
    """Of a run that has ended; None where its objective has no masked-LM loss."""
    rows, _ = read_metrics(output / METRICS_NAME)
    if "unigram_loss" not in rows[0]:
        return None
    if not comparison.evaluation:
        return float([row["eval_loss"] for row in rows if "eval_loss" in row][-1])
    found = output / "perplexity.json"
    settings = {"model": output / "hf", "data": options.data_dir, "json": found, **comparison.evaluation}
    settings["eval_sequences"] = options.eval_sequences
    execute(command("evaluate.py", settings, "perplexity"), lock)
    return float(read_json(found)["loss"])


def minimal_pairs(options: argparse.Namespace, output: Path, lock: int) -> float:
    found = output / "minimal-pairs.json"
    settings = {"model": output / "hf", "data": options.pairs, "json": found}
    execute(command("evaluate.py", settings, "minimal-pairs"), lock)
    return float(read_json(found)["mean_accuracy"])


def finetuned(options: argparse.Namespace, output: Path, seed: int, lock: int) -> dict[str, float]:
    """The accuracy on the validation split after the best epoch, by learning rate."""
    task, data = Task("classification", "accuracy"), options.finetune_data
    found = fine_tuned(options, output / "hf", task, data, output / "finetuned", [seed], lock)
    return {rate: score for rate, [score] in found["scores_by_rate"].items()}


def report(options: argparse.Namespace, comparison: Comparison) -> list[str]:
    found = {
        name: {seed: result for seed in options.seeds if (result := result_of(options, comparison, name, seed))}
        for name in comparison.runs
    }
    every = [result for results in found.values() for result in results.values()]
    commits, cpus = {result.commit for result in every}, {result.cpu for result in every} or {cpu_model()}
    vocabulary = Corpus.open(options.data_dir).manifest.tokenizer.vocab_size
    if options.max_minutes:
        budget, option = f"{options.max_minutes:g} CPU-minutes", f"--max_minutes {options.max_minutes:g}"
    else:
        budget, option = f"{options.max_tokens / 1e6:g}M tokens", f"--max_tokens {options.max_tokens}"
    if options.finetune_data:
        rates = ",".join(f"{rate:g}" for rate in options.finetune_learning_rates)
        option += f" --finetune_data {options.finetune_data.name} --finetune_learning_rates {rates}"
    evaluation = " ".join(f"--{key} {value}" for key, value in comparison.evaluation.items())
    lines = [
        f"# {comparison.question}",
        "",
        comparison.source,
        "",
        f"{' and '.join(sorted(cpus))}, one thread. {versions('torch', 'deepspeed')} The runs were made at "
        f"{', '.join(sorted(commits)) or 'none'}.",
        "",
        f"{options.model} on {options.data_dir.name}, {vocabulary:,} ids, {options.max_seq_length} tokens, {budget} a "
        f"run unless its row says otherwise: `python -m benchmarks.compare {relative(options.comparison)} --model "
        f"{options.model} {option}`. Held-out losses{f' of `perplexity {evaluation}`' if evaluation else ''}: lower is "
        "better. A difference is the mean over the seeds that both runs have; it is inside the spread where the losses "
        "of one run lie among the other's.",
        "",
        *loss_table(found),
    ]
    pairs = {
        name: {seed: result.pairs for seed, result in results.items() if result.pairs is not None}
        for name, results in found.items()
    }
    if any(pairs.values()):
        lines += ["", "Accuracy on minimal pairs, the mean over paradigms:", "", *accuracy_table(pairs)]
    if any(result.metrics for result in every):
        lines += ["", *metrics_table(options, found)]
    return lines


def relative(path: Path) -> Path:
    absolute = path.resolve()
    return absolute.relative_to(REPOSITORY) if absolute.is_relative_to(REPOSITORY) else path


def loss_table(found: Mapping[str, Mapping[int, Result]]) -> list[str]:
    """Losses by run and seed, as a table; the others are held against the first run."""
    head = "| run | million tokens | CPU-seconds | held-out loss, by seed | mean | beside the first |"
    table, first = [head, "|---|---|---|---|---|---|"], next(iter(found))
    base = losses_of(found[first])
    for name, results in found.items():
        if not results:
            continue
        losses = losses_of(results)
        tokens = [result.tokens for result in results.values() if result.tokens is not None]
        seconds = [result.seconds for result in results.values() if result.seconds is not None]
        cells = [
            f"{statistics.fmean(tokens) / 1e6:.2f}" if tokens else "",
            f"{statistics.fmean(seconds):,.0f}" if seconds else "",
            ", ".join(f"{loss:.3f}" for loss in losses.values()),
            f"{statistics.fmean(losses.values()):.3f}" if losses else "",
            difference(losses, base) if name != first else "",
        ]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def losses_of(results: Mapping[int, Result]) -> dict[int, float]:
    return {seed: result.eval_loss for seed, result in results.items() if result.eval_loss is not None}


def accuracy_table(found: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Accuracies by run and seed, as a table; the first run that has some is the one that the others are held
    against.
    """
    table = ["| run | accuracy, by seed | mean | beside the first |", "|---|---|---|---|"]
    base: Mapping[int, float] = {}
    for name, values in found.items():
        if not values:
            continue
        beside = difference(values, base) if base else ""
        base = base or values
        by_seed = ", ".join(f"{value:.3f}" for value in values.values())
        table.append(f"| {name} | {by_seed} | {statistics.fmean(values.values()):.3f} | {beside} |")
    return table


def metrics_table(options: argparse.Namespace, found: Mapping[str, Mapping[int, Result]]) -> list[str]:
    by_run: dict[str, dict[int, float]] = {}
    for name, results in found.items():
        tuned = {seed: result.metrics for seed, result in results.items() if result.metrics}
        if not tuned:
            continue
        rates = next(iter(tuned.values()))
        rate = best_rate({rate: [metrics[rate] for metrics in tuned.values()] for rate in rates})
        by_run[f"{name}, at {float(rate):g}"] = {seed: metrics[rate] for seed, metrics in tuned.items()}
    return [
        f"Accuracy after fine-tuning on {options.finetune_data.name if options.finetune_data else 'a task'}, "
        f"{options.num_train_epochs} epochs on at most {options.max_train_samples:,} examples, the best epoch of each "
        "on the validation split, at the learning rate with the best median:",
        "",
        *accuracy_table(by_run),
    ]


if __name__ == "__main__":
    main()
