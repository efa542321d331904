"""The stages of a run, and which places of an order a step draws when length and number of sequences change.

Each length has its own order. A step draws the places that follow those of earlier steps at the same length. The
number of these follows from the stages in closed form, so any step can be located directly.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_roberta.config import PackingConfig, Stage, step_number
from ds_roberta.errors import UserError
from ds_roberta.files import load_json
from ds_roberta.options import require_positive

TRAIN_STATE_NAME = "train_state.json"
"""The file of a checkpoint that holds `TrainState`."""


@dataclass(frozen=True)
class SkippedPlaces:
    """Places `first_place … end_place - 1` of a length's order that steps from `global_step` on skip."""

    global_step: int
    max_seq_length: int
    first_place: int
    end_place: int


def make_stages(
    max_seq_length: int,
    train_batch_size: int,
    max_seq_length_schedule: str | None = None,
    train_batch_size_schedule: str | None = None,
    max_steps: int | None = None,
) -> tuple[Stage, ...]:
    """The stages of a run, from its two schedules if given.

    Args:
        max_steps: what percents in a schedule refer to; None if they are refused.

    Raises:
        UserError: a schedule is malformed, or does not end with the value given separately.
    """
    require_positive("--train_batch_size", train_batch_size)
    lengths = _parse_schedule("max_seq_length", max_seq_length_schedule, max_seq_length, max_steps)
    sizes = _parse_schedule("train_batch_size", train_batch_size_schedule, train_batch_size, max_steps)
    for _, length in lengths:
        PackingConfig(length)
        if length > max_seq_length:
            raise UserError(
                f"--max_seq_length_schedule must not exceed --max_seq_length ({max_seq_length}), which the model is "
                f"made for; got {length}"
            )
    for _, size in sizes:
        if size % sizes[0][1]:
            raise UserError(
                f"every size in --train_batch_size_schedule must be a multiple of the first ({sizes[0][1]}), got {size}"
            )
    first_steps = sorted({step for step, _ in (*lengths, *sizes)})
    return tuple(Stage(step, _value_at(lengths, step), _value_at(sizes, step)) for step in first_steps)


def schedule_text(stages: tuple[Stage, ...], name: str) -> str:
    """The schedule of a stage's field in the form `make_stages` reads: its values and where each begins."""
    values = [(stage.first_step, getattr(stage, name)) for stage in stages]
    changes = [pair for index, pair in enumerate(values) if not index or values[index - 1][1] != pair[1]]
    return ",".join(f"{step}:{value}" for step, value in changes)


def _parse_schedule(name: str, text: str | None, last: int, max_steps: int | None) -> list[tuple[int, int]]:
    """Steps and values of `STEP:VALUE,…`, or the one value for all steps if there is no schedule."""
    if text is None:
        return [(0, last)]
    pair = r"\d+(\.\d+%|%|):\d+"
    if not re.fullmatch(f"{pair}(,{pair})*", text):
        raise UserError(
            f"--{name}_schedule must be STEP:VALUE pairs such as 0:128,9000:512 or 0:128,90%:512, got {text!r}"
        )
    if "%" in text and max_steps is None:
        raise UserError(
            f"--{name}_schedule needs steps here, not percents, got {text!r}: the run's config.json has them (stages)"
        )
    words = [pair.split(":") for pair in text.split(",")]
    if late := [step for step, _ in words if step.endswith("%") and float(step[:-1]) >= 100]:
        raise UserError(f"a percent in --{name}_schedule must be below 100, where the run ends, got {late[0]}")
    pairs = [(step_number(f"--{name}_schedule", step, max_steps or 0), int(value)) for step, value in words]
    steps = [step for step, _ in pairs]
    if steps[0] != 0 or steps != sorted(set(steps)):
        resolved = f" (steps {', '.join(map(str, steps))} of {max_steps})" if "%" in text else ""
        raise UserError(f"the steps of --{name}_schedule must start at 0 and increase, got {text!r}{resolved}")
    for _, value in pairs:
        require_positive(f"each value of --{name}_schedule", value)
    if pairs[-1][1] != last:
        raise UserError(f"--{name}_schedule must end with the run's {name} ({last}), got {text!r}")
    return pairs


def _value_at(pairs: list[tuple[int, int]], step: int) -> int:
    return [value for first, value in pairs if first <= step][-1]


def stage_number(stages: Sequence[Stage], step: int) -> int:
    """The index of the stage of a step, counted from 0."""
    return bisect_right(stages, step, key=lambda stage: stage.first_step) - 1


def places_used(stages: Sequence[Stage], max_seq_length: int, step: int, skipped: Sequence[SkippedPlaces] = ()) -> int:
    """How many places of a length's order the first `step` steps drew or skipped.

    It is the first place of global batch `step` (counted from 0) if that batch has this length.
    """
    ends = [*(stage.first_step for stage in stages[1:]), math.inf]
    drawn = sum(
        max(0, int(min(step, end)) - stage.first_step) * stage.train_batch_size
        for stage, end in zip(stages, ends, strict=True)
        if stage.max_seq_length == max_seq_length
    )
    return drawn + sum(
        skip.end_place - skip.first_place
        for skip in skipped
        if skip.max_seq_length == max_seq_length and skip.global_step <= step
    )


def skip(
    stages: Sequence[Stage],
    global_step: int,
    skipped: Sequence[SkippedPlaces],
    spiked_step: int,
    skipped_until_then: Sequence[SkippedPlaces],
) -> list[SkippedPlaces]:
    """All places that a run skips after going back to `global_step`, including those drawn since that step.

    Args:
        global_step: number of steps taken at the state that the run goes back to.
        skipped: the places that this state already skips.
        spiked_step: number of steps taken until now.
        skipped_until_then: the places skipped until now.
    """
    new = []
    for length in sorted({stage.max_seq_length for stage in stages}):
        first = places_used(stages, length, global_step, skipped)
        end = places_used(stages, length, spiked_step, skipped_until_then)
        if end > first:
            new.append(SkippedPlaces(global_step, length, first, end))
    return [*skipped, *new]


def read_skipped(checkpoint: Path) -> list[SkippedPlaces]:
    """What the run of a checkpoint skips, from its `train_state.json`.

    Raises:
        UserError: the folder is not a checkpoint.
    """
    try:
        state = load_json((checkpoint / TRAIN_STATE_NAME).read_text(encoding="utf-8"))
        return [SkippedPlaces(**entry) for entry in state["skipped_places"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {TRAIN_STATE_NAME} of the checkpoint {str(checkpoint)!r} ({error!r}): name a folder "
            "checkpoints/global_stepN of the run"
        ) from error
