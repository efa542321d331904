"""What counts as a plateau of the held-out loss: a pure function of the evaluations so far and the lines to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ds_roberta.data.count_models import NEIGHBOUR_LOSS, UNIGRAM_LOSS
from ds_roberta.errors import UserError

BELOW_UNIGRAM = 0.15
"""Nats by which a model that learns is soon below the unigram line."""
LEAST_FALL = 0.05
"""Nats by which a loss above the neighbour line falls in a tenth of a run, unless it stalls."""

Evaluation = Sequence[float]
"""A step and the held-out loss after it: two numbers, as JSON keeps them."""


class LossPlateau(UserError):
    """The held-out loss stalls, and the run is to end; its state is good."""


class Plateau(NamedTuple):
    """A plateau that the loss is on.

    Attributes:
        kind: the line that it does not get below.
        problem: a sentence with the numbers.
    """

    kind: str
    problem: str


def remedy(knows_neighbours: bool) -> str:
    """What to try against a plateau.

    Args:
        knows_neighbours: whether the run's heads began by looking at neighbours, or with trained weights.
    """
    recipe = "with --recipe fast, whose heads begin by looking at neighbours, with Muon and more masks"
    return (
        f"try a new run {'with more steps or text' if knows_neighbours else recipe}, or with another learning rate, a "
        "longer warm-up or another batch size: see docs/pretraining.md, 'When the loss does not fall' (--loss_plateau)"
    )


def with_evaluation(evaluations: Sequence[Evaluation], step: int, loss: float, max_steps: int) -> list[list[float]]:
    """The evaluations that later ones are compared with: those of the last tenth of the run, and the one before them.

    An evaluation that a resumed run repeats takes the place of the earlier one.
    """
    kept = [[*each] for each in evaluations if each[0] < step] + [[step, loss]]
    old = sum(_is_tenth_ago(each, step, max_steps) for each in kept)
    return kept[max(old - 1, 0) :]


def find_plateau(evaluations: Sequence[Evaluation], max_steps: int, lines: Mapping[str, float]) -> Plateau | None:
    """The plateau that the last of `evaluations` is on, if any; there is none in the first 30% of a run.

    Args:
        evaluations: from `with_evaluation`, ascending. The last is compared with the newest that is at least a tenth of
            the run older; if there is none, how much the loss fell is not known.
        lines: the losses of `data.count_models`. A loss below the neighbour line may stand still: the learning rate's
            decay ends in that.
    """
    step, loss = evaluations[-1]
    if 10 * step < 3 * max_steps:
        return None
    unigram, neighbour = lines[UNIGRAM_LOSS], lines[NEIGHBOUR_LOSS]
    if loss > unigram - BELOW_UNIGRAM:
        return Plateau(
            UNIGRAM_LOSS,
            f"step {step}: the held-out loss, {loss:.4f}, is not {BELOW_UNIGRAM} below {unigram:.4f}, which the "
            "frequencies of the tokens alone reach",
        )
    earlier = [each for each in evaluations if _is_tenth_ago(each, step, max_steps)]
    if earlier and loss > neighbour and earlier[-1][1] - loss < LEAST_FALL:
        return Plateau(
            NEIGHBOUR_LOSS,
            f"step {step}: the held-out loss, {loss:.4f}, has fallen by less than {LEAST_FALL} since step "
            f"{earlier[-1][0]} ({earlier[-1][1]:.4f}) and is above {neighbour:.4f}, which counts of neighbours reach",
        )
    return None


def _is_tenth_ago(evaluation: Evaluation, step: float, max_steps: int) -> bool:
    return 10 * (step - evaluation[0]) >= max_steps
