"""A budget instead of steps: `--max_tokens` and `--max_minutes` fix `max_steps`.

They do so once, when a run starts: by the tokens of its packed sequences, or by the speed of rehearsed steps, which
change nothing in the training. The steps are kept in the run's plan.json, written before the first step; from then on
the run is one that was given that `--max_steps`, and a resume goes on with the same.
"""

from __future__ import annotations

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_roberta.config import Stage
from ds_roberta.data.loader import HeldOutSample, MicroBatch
from ds_roberta.errors import UserError
from ds_roberta.files import json_fingerprint, load_json, write_json
from ds_roberta.options import require_positive, require_positive_number
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER, saved_steps
from ds_roberta.training.compilation import compiled_graphs
from ds_roberta.training.facts import run_identity
from ds_roberta.training.micro_batch import batch_plans
from ds_roberta.training.run_data import RunData, make_loaders
from ds_roberta.training.settings import Run, run_config
from ds_roberta.training.start import Start

if TYPE_CHECKING:
    from ds_roberta.training.engine import Engine

PLAN_NAME = "plan.json"
UNPLANNED_STEPS = 1 << 30
"""`max_steps` until it is fixed: more than a schedule reaches, and enough that its percents are steps of their own."""
_SAMPLE_SEQUENCES = 65_536
_MOST_STEPS = 1 << 40
_MEASURED_SHARE, _LEAST_SECONDS, _MOST_SECONDS = 0.03, 3.0, 30.0
"""How long steps of each length and batch, and the evaluation, are measured: a share of the budget, within bounds."""
_FIXED_SECONDS = 10.0
_FIXED_SECONDS_PER_PARAMETER = 1e-7
"""For what is not measured: the imports before a run's settings are read, the last save and the export."""


def budget_of(options: Namespace) -> dict[str, float]:
    """The budget that is given, by its option's name; empty if `max_steps` is not to be fixed.

    Raises:
        UserError: more than one of the options that say where a run ends is given, or one is not positive.
    """
    names = ("max_steps", "max_tokens", "max_minutes")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in given)} each say where the run ends: give one of them")
    given.pop("max_steps", None)
    for name, value in given.items():
        (require_positive if name == "max_tokens" else require_positive_number)(f"--{name}", value)
    return given


def with_max_steps(run: Run, max_steps: int) -> Run:
    """The run as if `--max_steps` had been given."""
    from ds_roberta.training.device import on_gpu  # the rest of the module needs no DeepSpeed

    options = Namespace(**{**vars(run.options), "max_steps": max_steps})
    config = run_config(options, run.corpus, run.deepspeed.train_batch_size, on_gpu(), run.initial_model)
    return replace(run, options=options, config=config, budget={})


def with_kept_plan(run: Run) -> Run:
    """The run with the steps that an earlier start fixed, if there are any for this budget.

    Raises:
        UserError: the run was planned for another budget, or plan.json is damaged.
    """
    if not run.budget:
        return run
    settings, folder = _fingerprint(run), run.config.output_dir
    max_steps = run.ranks.on_main(lambda: _kept_steps(folder, run.budget, settings))
    if max_steps is None:
        return run
    run.ranks.log(f"{_as_option(run.budget)}: {max_steps:,} steps, as planned before ({folder / PLAN_NAME})")
    return with_max_steps(run, max_steps)


def fix_steps(run: Run, start: Start, data: RunData, engine: Engine, micro_batch_sizes: Mapping[int, int]) -> Run:
    """The run with the steps that its budget allows, which are written into its folder; all ranks call it.

    Raises:
        UserError: the budget is too small.
    """
    if not run.budget:
        return run
    option, folder = _as_option(run.budget), run.config.output_dir
    if "max_tokens" in run.budget:
        tokens = {length: _mean_tokens(data, length) for length in data.train}
        per_step = {_shape(stage): tokens[stage.max_seq_length] * stage.train_batch_size for stage in run.config.stages}
        if (least := _of_a_step(run.config.stages[0], per_step)) > run.budget["max_tokens"]:
            raise UserError(f"{option} is less than the {least:,.0f} tokens of a step: give more")
        max_steps = _fitting_steps(run, run.budget["max_tokens"], per_step)
        reason = ", ".join(f"{each:.1f} tokens in a sequence of up to {length}" for length, each in tokens.items())
    else:
        max_steps, reason = _steps_within_minutes(run, data, engine, micro_batch_sizes)
    planned = with_max_steps(run, max_steps)
    plan = {"budget": run.budget, "max_steps": max_steps, "run": _fingerprint(run)}
    run.ranks.on_main(lambda: write_json(folder / PLAN_NAME, plan))
    run.ranks.log(f"{option}: {max_steps:,} steps ({reason}), kept in {folder / PLAN_NAME}")
    start.state.identity = run_identity(planned)
    return planned


def steps_within(budget: float, cost: Callable[[int], float]) -> int:
    """The most steps that cost no more than `budget`, at least 1 and below `_MOST_STEPS`.

    Args:
        cost: what a run costs by its number of steps, with which it rises.
    """
    too_many = 1
    while too_many < _MOST_STEPS and cost(too_many) <= budget:
        too_many *= 2
    fitting = too_many // 2
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if cost(middle) <= budget:
            fitting = middle
        else:
            too_many = middle
    return max(1, fitting)


def evaluations(max_steps: int, eval_interval: int) -> int:
    """How often a run evaluates: before the first step, at each multiple of the interval, and after the last step."""
    return 1 + -(-max_steps // eval_interval)


def _fitting_steps(
    run: Run, budget: float, per_step: Mapping[tuple[int, int], float], per_evaluation: float = 0.0
) -> int:
    """As `steps_within`, by the cost of a step of each stage's length and batch, and of an evaluation."""

    def cost(max_steps: int) -> float:
        try:
            stages = with_max_steps(run, max_steps).config.stages
        except UserError:  # too few for a schedule
            return 0.0
        ends = [*(stage.first_step for stage in stages[1:]), max_steps]
        steps = sum(
            (end - stage.first_step) * _of_a_step(stage, per_step) for stage, end in zip(stages, ends, strict=True)
        )
        return steps + per_evaluation * evaluations(max_steps, run.config.intervals.eval_interval)

    steps = steps_within(budget, cost)
    try:
        with_max_steps(run, steps)
    except UserError as error:
        raise UserError(f"{_as_option(run.budget)} allows at most {steps} steps: {error}") from error
    return steps


def _of_a_step(stage: Stage, per_step: Mapping[tuple[int, int], float]) -> float:
    """The cost of a step: its shape's, or in proportion to that of the nearest batch of its length, as in a run whose
    schedules change in another order than in one of `UNPLANNED_STEPS`.
    """
    length, size = _shape(stage)
    nearest = min((batch for of, batch in per_step if of == length), key=lambda batch: abs(batch - size))
    return per_step[length, nearest] * size / nearest


def _mean_tokens(data: RunData, length: int) -> float:
    """The mean number of a sequence's tokens, padding excluded, over the first sequences of the run."""
    packed, order = data.train[length], data.orders[length]
    sequences = order.sequences(np.arange(min(len(packed), _SAMPLE_SEQUENCES)))
    return float(packed.lengths(sequences).mean()) + 2


def _steps_within_minutes(
    run: Run, data: RunData, engine: Engine, micro_batch_sizes: Mapping[int, int]
) -> tuple[int, str]:
    """The steps that `--max_minutes` allows from the start of this process on, and what was measured."""
    config, ranks, minutes = run.config, run.ranks, run.budget["max_minutes"]
    seconds = min(max(_MEASURED_SHARE * 60 * minutes, _LEAST_SECONDS), _MOST_SECONDS)
    plans = batch_plans(config.stages, micro_batch_sizes, ranks.world_size)
    loader, held_out = make_loaders(run, data, plans, engine.module.masker, engine.device.type != "cpu")
    ends = [*(stage.first_step for stage in config.stages[1:]), config.schedule.max_steps]
    per_step = {}
    for stage, end in zip(config.stages, ends, strict=True):
        if _shape(stage) in per_step:
            continue
        step = (stage.first_step + end) // 2  # of the stage's mean share of masks
        middle = loader.level(step, loader.micro_batches(step), ranks)
        per_step[_shape(stage)] = ranks.broadcast(_seconds_per_step(engine, middle, seconds))
    per_evaluation = 0.0 if held_out is None else _seconds_per_evaluation(engine, held_out, seconds)
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters())
    fixed = _FIXED_SECONDS + parameters * _FIXED_SECONDS_PER_PARAMETER + time.perf_counter() - run.began
    left = 60 * minutes - ranks.broadcast(fixed)
    least = max(per_step.values()) + evaluations(1, config.intervals.eval_interval) * per_evaluation
    measured = ", ".join(f"{each:.3g} s a step at {length} tokens" for (length, _), each in per_step.items())
    measured += f", {per_evaluation:.3g} s an evaluation" if held_out else ""
    if left < least:
        raise UserError(
            f"--max_minutes {minutes:g} is too short: the start and the end take {60 * minutes - left:.0f} s, beside "
            f"{measured}: give more minutes, a smaller --model or batch, or fewer --eval_sequences"
        )
    return _fitting_steps(run, left, per_step, per_evaluation), measured


def _seconds_per_step(engine: Engine, micro_batches: list[MicroBatch], seconds: float) -> float:
    """The time of an optimizer step on these micro-batches, rehearsed for about `seconds`; a collective call.

    Of a step that would take longer, only some of the micro-steps are taken.
    """
    first = micro_batches[:1]
    engine.rehearse(*first, *micro_batches[-1:])  # prepares memory and kernels; only the last one may have empty places
    one = engine.ranks.broadcast(_timed(lambda: engine.rehearse(*first)))
    taken = min(len(micro_batches), max(2, int(seconds / one)))
    some = micro_batches[:taken]
    rounds = max(2, int(seconds / (one * taken)))

    def rehearse() -> None:
        for _ in range(rounds):
            engine.rehearse(*some)

    whole = _timed(rehearse) / rounds
    if taken == len(micro_batches):
        return whole
    return whole + (len(micro_batches) - taken) * (whole - one) / (taken - 1)


def _seconds_per_evaluation(engine: Engine, held_out: HeldOutSample, seconds: float) -> float:
    """The time of an evaluation, of whose micro-batches some are tried, for about `seconds`; a collective call."""

    def timed(micro_batches: int) -> float:
        numbers = itertools.count()
        return _timed(lambda: held_out.evaluate(engine.evaluate, lambda: next(numbers) >= micro_batches))

    timed(1)
    taken = engine.ranks.broadcast(min(held_out.micro_batches, max(1, int(seconds / timed(1)))))
    graphs, spent = compiled_graphs(), timed(taken)
    if engine.ranks.any(compiled_graphs() > graphs):  # micro-batches with empty places, for which it compiles only once
        spent = timed(taken)
    return engine.ranks.broadcast(spent * held_out.micro_batches / taken)


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _shape(stage: Stage) -> tuple[int, int]:
    return stage.max_seq_length, stage.train_batch_size


def _as_option(budget: Mapping[str, float]) -> str:
    return " ".join(f"--{name} {value:g}" if value < 1e6 else f"--{name} {value:.0f}" for name, value in budget.items())


def _fingerprint(run: Run) -> str:
    """Of what the plan was made for: the unplanned run's identity."""
    return json_fingerprint(run_identity(run))


def _kept_steps(folder: Path, budget: Mapping[str, float], settings: str) -> int | None:
    """The steps in the folder's plan; None without one, or with another run's that never began."""
    path = folder / PLAN_NAME
    if not path.exists():
        return None
    try:
        plan = load_json(path.read_text(encoding="utf-8"))
        kept, max_steps, made_for = plan["budget"], int(plan["max_steps"]), plan["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error!r}): give the run's steps by --max_steps") from error
    has_begun = bool(saved_steps(folder / CHECKPOINTS_FOLDER))
    if not has_begun and (made_for, kept) != (settings, budget):
        return None
    if kept != budget:
        raise UserError(
            f"the run in {str(folder)!r} was planned by {_as_option(kept)} ({max_steps} steps), not by "
            f"{_as_option(budget)}: give the same, or --max_steps for another end"
        )
    return max_steps
