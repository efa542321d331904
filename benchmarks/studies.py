"""What studies that take hours share: a folder of finished items, each measured by one process at a time; commands
whose clock is CPU time; what is measured of a model by the real commands.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from benchmarks.environment import REPOSITORY, commit, python_path
from ds_roberta.command_line import positive, positive_number, probability, several
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json
from ds_roberta.finetuning.task import RESULTS
from ds_roberta.training.metrics import METRICS_NAME, read_metrics
from ds_roberta.training.recipes import RECIPES

IN_CPU_TIME = """import runpy, sys, time
time.perf_counter = time.process_time
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")"""
"""Runs the script that is the first argument, with the CPU time of its process and threads as its clock."""

WITH_THE_STUDY = ("setpriv", "--pdeathsig", "TERM")
"""Before a command: it is asked to stop if the study is killed, so that the study can go on at once."""


WAIT = 10.0
"""Seconds between two looks at what another call measures."""
NEVER = 1_000_000_000
"""An interval that no run reaches."""
PACKING = "contiguous"
"""Of the held-out text, as of `--recipe fast`."""
SEQUENCES = 2048
"""Of held-out text, at most."""
VALIDATION_FRACTION = "0.1"
"""Of the training examples, for tasks that have no validation split."""


@dataclass(frozen=True)
class Item:
    """What is measured and kept at once.

    Attributes:
        part: of the study; `--parts` chooses by it.
        name: of its JSON in the folder of results.
        needs: the names of items that come before it.
        measure: takes the descriptor of the item's lock and returns JSON values.
    """

    part: str
    name: str
    needs: tuple[str, ...]
    measure: Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """How a task is fine-tuned and measured; `--task` and `--metric` of `launch/finetune.py`."""

    kind: str
    metric: str


class Busy(UserError):
    """Another process measures the same part."""


def same_settings(results: Path, settings: Mapping[str, Any], kind: str) -> None:
    """Note in the folder what its results are of, or raise `UserError` if they are of something else.

    Args:
        settings: JSON values.
        kind: of results, for the message.
    """
    path = results / "settings.json"
    if not path.exists():
        results.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    kept = read_json(path)
    if changed := [f"{name} {kept.get(name)!r}, not {value!r}" for name, value in settings.items()
                   if kept.get(name) != value]:  # fmt: skip
        raise UserError(f"the {kind} in {str(results)!r} are of {'; '.join(changed)}: give another --results")


@contextmanager
def only_here(results: Path, part: str) -> Iterator[int]:
    """Hold a lock that a second call, or a command that outlived its call, would hold; yields its descriptor.

    Raises:
        Busy: another process holds it.
    """
    with (results / f"{part}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another process measures {part!r} in {str(results)!r}: wait or end it") from error
        yield file.fileno()


def execute(command: Sequence[str], lock: int) -> None:
    """Run a command, which holds the lock too; raises `UserError` if it fails."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    words = [*WITH_THE_STUDY, *command]
    code = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=False, pass_fds=[lock]).returncode
    if code:
        raise UserError(f"exit code {code}: {' '.join(command)}")


def command(script: str, settings: Mapping[str, Any], *words: str) -> list[str]:
    """A command of `launch/` whose clock is CPU time."""
    words = (*words, *(word for name, value in settings.items() for word in (f"--{name}", str(value))))
    return [sys.executable, "-c", IN_CPU_TIME, str(REPOSITORY / "launch" / script), *words]


def parts_of(text: str, known: Sequence[str]) -> list[str]:
    """The names in `--parts`. Raises `UserError` if one is not among the known."""
    parts = [name for name in text.split(",") if name]
    if unknown := set(parts) - set(known):
        raise UserError(f"--parts names {min(unknown)!r}: choose from {', '.join(known)}")
    return parts


def finish_all(
    results: Path, items: Iterable[Item], parts: Sequence[str], publish: Callable[[dict[str, Any]], None]
) -> None:
    """Measure the items of some parts, in this order, and wait for those that another call measures.

    Args:
        publish: takes what all items gave that are finished, by name.

    Raises:
        UserError: items failed; all others are finished and published before.
    """
    items = list(items)
    left = [item for item in items if item.part in parts]
    reasons: dict[str, str] = {}
    failed: dict[str, UserError] = {}
    while left:
        waiting, busy = [], False
        for item in left:
            reason = None
            try:
                if missing := finish(results, item):
                    reason = f"needs {' and '.join(missing)} first"
            except Busy:
                reason, busy = "another call measures it", True
            except UserError as failure:
                failed[item.name] = failure
                print(f"{item.name}: {failure}", flush=True)
            if reason:
                waiting.append(item)
                if reasons.get(item.name) != reason:
                    print(f"{item.name}: {reason}", flush=True)
                reasons[item.name] = reason
        if busy:
            time.sleep(WAIT)
        elif len(waiting) == len(left):
            break
        left = waiting
    publish({item.name: read_json(path) for item in items if (path := kept(results, item.name))})
    if failed:
        name, error = next(iter(failed.items()))
        raise UserError(f"not measured: {', '.join(failed)}; {name}: {error}")


def finish(results: Path, item: Item) -> list[str]:
    """Measure an item unless it is finished; returns the names of those that must be finished before.

    Raises:
        Busy: another call measures it.
        UserError: it cannot be measured.
    """
    if missing := [name for name in item.needs if not kept(results, name)]:
        return missing
    with only_here(results, item.name) as lock:
        if kept(results, item.name):
            print(f"{item.name}: finished before", flush=True)
            return []
        print(f"{item.name}: measuring", flush=True)
        began, program = time.monotonic(), commit()
        found = item.measure(lock)
        write_json(results / f"{item.name}.json", {**found, "seconds": time.monotonic() - began, "commit": program})
    return []


def kept(results: Path, name: str) -> Path | None:
    path = results / f"{name}.json"
    return path if path.exists() else None


def held_out_loss(model: Path, data: Path, max_seq_length: int, path: Path, lock: int) -> dict[str, Any]:
    """The loss in nats per masked token on the held-out documents of a data folder with the model's tokenizer.

    Args:
        path: of the command's JSON.
    """
    words = ["perplexity", "--data", str(data), "--max_seq_length", str(max_seq_length)]
    words += ["--packing", PACKING, "--eval_sequences", str(SEQUENCES)]
    evaluate(model, words, path, lock)
    return {name: read_json(path)[name] for name in ("loss", "masked_tokens")}


def evaluate(model: Path, words: Sequence[str], path: Path, lock: int) -> None:
    script = [sys.executable, str(REPOSITORY / "launch/evaluate.py"), *words]
    execute([*script, "--model", str(model), "--json", str(path)], lock)


def trained(output: Path) -> dict[str, Any]:
    """The steps of a run that has ended, its tokens, and the CPU-seconds of its steps."""
    rows, _ = read_metrics(output / METRICS_NAME)
    steps = [row for row in rows if "step_seconds" in row]
    seconds = sum(row["step_seconds"] for row in steps)
    return {"steps": steps[-1]["global_step"], "tokens": steps[-1]["consumed_tokens"], "step_seconds": seconds}


def add_fine_tuning(parser: argparse.ArgumentParser) -> None:
    """Add the options that `fine_tuned` reads."""
    parser.add_argument("--max_seq_length", type=positive, default=128)
    parser.add_argument("--finetune_learning_rates", type=several(positive_number), default=(1e-4, 3e-4, 1e-3))
    parser.add_argument("--num_train_epochs", type=positive, default=3, help="of fine-tuning")
    parser.add_argument("--max_train_samples", type=positive, default=10_000, help="of each task's training examples")
    parser.add_argument("--finetune_dropout", type=probability, help="of fine-tuning (default: each model's own)")


def fine_tuned(
    options: argparse.Namespace, model: Path, task: Task, data: Path, output: Path, seeds: Sequence[int], lock: int
) -> dict[str, Any]:
    """Fine-tune at each learning rate with each seed; the scores of the rate with the best median."""
    from ds_roberta.training.device import fastest_precision  # the rest of the module needs no DeepSpeed

    words = [sys.executable, str(REPOSITORY / "launch/finetune.py"), "--model", str(model), "--task", task.kind]
    words += ["--data", str(data), "--output_dir", str(output), "--metric", task.metric]
    if not any(path.stem in ("validation", "dev") for path in data.iterdir()):
        words += ["--validation_fraction", VALIDATION_FRACTION]
    words += ["--seeds", ",".join(map(str, seeds))]
    words += ["--learning_rate", ",".join(f"{rate:g}" for rate in options.finetune_learning_rates)]
    for option in ("max_seq_length", "num_train_epochs", "max_train_samples"):
        words += [f"--{option}", str(getattr(options, option))]
    if options.finetune_dropout is not None:
        for option in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            words += [f"--{option}", f"{options.finetune_dropout:g}"]
    precision = fastest_precision()
    execute([*words, "--bf16"] if precision == "bf16" else words, lock)
    results = read_json(output / RESULTS)
    scores = scores_by_rate(results["settings"], task.metric)
    rate = best_rate(scores)
    return {
        "metric": task.metric,
        "precision": precision,
        "examples": results["examples"],
        "scores_by_rate": {f"{each:g}": found for each, found in scores.items()},
        "learning_rate": rate,
        "scores": scores[rate],
        "test": results["best"].get("test", {}).get(task.metric),
    }


def scores_by_rate(settings: Sequence[Mapping[str, Any]], metric: str) -> dict[float, list[float]]:
    """The validation score of each seed's best epoch, from the settings of a `results.json`."""
    return {
        setting["learning_rate"]: [run["epochs"][run["epoch"] - 1][metric] for run in setting["runs"]]
        for setting in settings
    }


def best_rate(scores: Mapping[Any, Sequence[float]]) -> Any:
    """The rate with the highest median, the first if several are equal."""
    return max(scores, key=lambda rate: statistics.median(scores[rate]))


def is_above(ours: Sequence[float], other: Sequence[float]) -> bool:
    """Whether all seeds of ours are above all of the other's: their ranges do not overlap."""
    return min(ours) > max(other)


def difference(values: Mapping[int, float], base: Mapping[int, float]) -> str:
    """The mean difference over the seeds that both have, and whether all values of both lie among each other; one
    value has no spread. Empty if they have no seed in common.
    """
    seeds = sorted(values.keys() & base.keys())
    if not seeds:
        return ""
    ours, others = [*values.values()], [*base.values()]
    one = ", one seed" if len(seeds) == 1 else ""
    among = len(ours) + len(others) > 2 and not is_above(ours, others) and not is_above(others, ours)
    mean = statistics.fmean(values[seed] - base[seed] for seed in seeds)
    return f"{mean:+.3f}{one}{', inside the spread' if among else ''}"


def command_of(module: str, options: argparse.Namespace, **written: str) -> str:
    """The study's command without the machine's paths; `written` are options that are not written as their values."""
    words = [f"python -m {module}"]
    for name, value in vars(options).items():
        if value in (None, "") or name in ("parts", "results"):
            continue
        words.append(f"--{name} {written.get(name) or _written(value)}")
    return " ".join(words)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    if isinstance(value, Path):
        return value.name
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))


def recipe_name() -> str:
    """A short name of all that `--recipe fast` sets, another one for other values."""
    recipe = RECIPES["fast"]
    widths = {str(width): values for width, values in recipe.optimizer_params.items()}
    return fingerprint_of([recipe.options, widths, read_json(recipe.deepspeed_config)])


def fingerprint_of(value: Any) -> str:
    """Of JSON values, and paths by their names."""
    text = json.dumps(value, sort_keys=True, default=lambda path: path.name)
    return xxhash.xxh3_64_hexdigest(text.encode())


def seconds_line(seconds: Mapping[str, float]) -> str:
    """A report's last line: what the kinds of parts took."""
    each = ", ".join(f"{name} {total:,.0f}" for name, total in seconds.items())
    return f"Seconds by the clock, of the calls that finished the parts, with other work on the machine: {each}."


def beside(results: Path, ending: str) -> Path:
    """The file of a report beside the folder of its results."""
    return results.with_name(results.name + ending)
