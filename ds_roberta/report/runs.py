"""A run as read from its folder: rows of metrics, settings, results; of a fine-tuned model, only results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import read_json, read_json_object, value_at
from ds_roberta.process import logger
from ds_roberta.report.error_analysis import ERROR_ANALYSIS, ErrorAnalysis, read_error_analysis
from ds_roberta.training.metrics import CONFIG_NAME, METRICS_NAME, read_metrics

BY_POSITION = "by_position"  # a key that launch/evaluate.py perplexity writes
RESULTS = "results.json"  # of a fine-tuning
RESULTS_PATTERNS = (RESULTS, "evaluation*.json")
_LARGEST_POSITION = 1 << 31

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Series:
    """A metric of a run over its steps, or over positions in a sequence; a value that was not finite is NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        name: distinguishes it from the other runs of the report.
        rows: the rows of `metrics.jsonl`, each with `global_step`; at least one, but none of a fine-tuning.
        config: `config.json`; empty for a fine-tuning, where it is the model's.
        results: flat keys and values of each results file, by its path in the folder.
        error_analyses: those beside results files, by the same paths.
        loss_by_position: held-out loss at the middles of ranges of positions, from the first file that has it.
        warnings: problems of the folder that are not fatal.
    """

    name: str
    rows: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    results: dict[str, dict[str, Value]]
    warnings: tuple[str, ...]
    error_analyses: dict[str, ErrorAnalysis] = field(default_factory=dict)
    loss_by_position: Series | None = None

    def series(self, metric: str) -> Series | None:
        """The metric at the steps that have it, or None if none has."""
        found = [(row["global_step"], row[metric]) for row in self.rows if metric in row]
        if not any(value is not None and math.isfinite(value) for _, value in found):
            return None
        return Series(
            tuple(step for step, _ in found),
            tuple(float("nan") if value is None else float(value) for _, value in found),
        )

    def setting(self, *path: str | int) -> Any:
        """A value of `config.json` by its keys and indexes, or None if an older run does not have it."""
        return value_at(self.config, path)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read folders of pretraining runs and of fine-tuned models. A run has its folder's name, or its path if several
    have the same name.

    Raises:
        UserError: a folder is given twice or is of neither kind, or one of its files is broken.
    """
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise UserError(f"the run {str(folder)!r} is given {count} times: name each once")
    names = Counter(folder.resolve().name for folder in folders)
    return [
        _read_run(folder, folder.resolve().name if names[folder.resolve().name] == 1 else str(folder))
        for folder in folders
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Value]:
    """A JSON value's scalars by their keys and indexes, joined by dots."""
    found, left = {}, [(prefix, value)]
    while left:  # values may be nested deeper than functions can call themselves
        name, value = left.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += reversed([(f"{name}.{key}" if name else str(key), inner) for key, inner in items])
        else:
            found[name] = value
    return found


def _read_run(folder: Path, name: str) -> Run:
    is_finetuned = (folder / RESULTS).is_file() and not (folder / METRICS_NAME).exists()
    rows, config, warnings = ([], {}, []) if is_finetuned else _read_pretraining(folder, name)
    found = {path.relative_to(folder) for pattern in RESULTS_PATTERNS for path in folder.rglob(pattern)}
    # Hidden folders are of fine-tunings that were killed, or that others have replaced.
    shown = (path for path in found if not any(part.startswith(".") for part in path.parts))
    files = sorted(path for path in shown if (folder / path).is_file())
    contents = {str(path): read_json(folder / path) for path in files}
    by_position = {file: content[BY_POSITION] for file, content in contents.items() if _is_perplexity(content)}
    if len(by_position) > 1:
        first, *others = by_position
        warnings.append(f"the loss by position is that of {first}; not drawn: {', '.join(others)}")
    results = {file: flatten(_in_short(content)) for file, content in contents.items()}
    beside = {file: (folder / file).with_name(ERROR_ANALYSIS) for file in contents if Path(file).name == RESULTS}
    error_analyses = {file: read_error_analysis(path) for file, path in beside.items() if path.is_file()}
    loss_by_position = _loss_by_position(next(iter(by_position.values()))) if by_position else None
    return Run(name, tuple(rows), config, results, tuple(warnings), error_analyses, loss_by_position)


def _read_pretraining(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Rows, settings and warnings."""
    for file in (METRICS_NAME, CONFIG_NAME):
        if not (folder / file).is_file():
            raise UserError(
                f"{str(folder)!r} is not the folder of a run (it has no {file}): give the --output_dir of a "
                "pretraining or a fine-tuning"
            )
    rows, is_cut = read_metrics(folder / METRICS_NAME)
    if not rows:
        raise UserError(f"{str(folder / METRICS_NAME)!r} has no whole row: the run has not taken a step yet")
    warnings = []
    if is_cut:
        warnings.append(f"the last line of {METRICS_NAME} ({len(rows) + 1}) is incomplete and left out")
        logger.warning(f"{name}: {warnings[0]}")
    return rows, read_json_object(folder / CONFIG_NAME, "fix or remove it"), warnings


def _is_perplexity(content: Any) -> bool:
    """Whether `launch/evaluate.py perplexity`, and not another tool, wrote `content`."""
    ranges = content.get(BY_POSITION) if isinstance(content, dict) else None
    return isinstance(ranges, list) and all(map(_is_range, ranges))


def _is_range(value: Any) -> bool:
    if not isinstance(value, dict) or not {"first", "last", "loss"} <= value.keys():
        return False
    is_loss = value["loss"] is None or isinstance(value["loss"], float)
    bounds = value["first"], value["last"]
    return is_loss and all(type(bound) is int and 0 <= bound <= _LARGEST_POSITION for bound in bounds)


def _loss_by_position(ranges: list[dict[str, Any]]) -> Series | None:
    having = [each for each in ranges if each["loss"] is not None]
    if not any(math.isfinite(each["loss"]) for each in having):
        return None
    return Series(
        tuple((each["first"] + each["last"]) // 2 for each in having), tuple(float(each["loss"]) for each in having)
    )


def _in_short(content: Any) -> Any:
    """Results without what is plotted, and without every epoch of every fine-tuning, which would bury the outcome."""
    if _is_perplexity(content):
        return {name: value for name, value in content.items() if name != BY_POSITION}
    if not isinstance(content, dict) or "best" not in content or not isinstance(content.get("settings"), list):
        return content
    if not all(isinstance(each, dict) for each in content["settings"]):
        return content
    settings = [{name: value for name, value in each.items() if name != "runs"} for each in content["settings"]]
    return {**content, "settings": settings}
