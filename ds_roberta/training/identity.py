"""What a resumed run must share with the one that it goes on from, and what of it may be allowed to change.

A step's places in the stream of sequences follow from its number and the schedules. So where the data, the packing, a
length or the seed changes, the run goes on at the same place of another stream: sequences may come again before all
have come.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError, unknown_key_message

_COUNTED = "the sequences of a step are found by counting batches: some would be repeated or left out"
_FIXED = {
    "model": "the weights are of that architecture; --init_from can begin another run with them",
    "next_sentence_prediction": "the weights have a head for it, or have none",
    "objective": "the weights have its head alone; --init_from can begin another run with the encoder",
    "train_batch_size": _COUNTED,
    "train_batch_size_schedule": _COUNTED,
}
"""Parts of the identity that no resumed run may change, and why; `_CHANGEABLE` ones in them excepted."""
_CHANGEABLE = ("model.hidden_dropout_prob", "model.attention_probs_dropout_prob")


def check_identity(
    checkpoint: Path, saved: dict[str, Any], current: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Compare the identities of the checkpoint's run and of this one.

    Args:
        allowed: names that may differ, dotted ("masking.unit") or of a whole group ("masking").

    Returns:
        A description of each difference, all of them allowed.

    Raises:
        UserError: they differ in something else, which is named; or a name in `allowed` is unknown, or of something
            that can never change.
    """
    before, now = _leaves(saved), _leaves(current)
    groups = {name.split(".")[0] for name in now}
    for name in allowed:
        if name not in now and name not in groups:
            raise UserError(unknown_key_message("name in --allow_change", name, [*groups, *now]))
        if (reason := _why_fixed(name)) is not None:
            raise UserError(f"--allow_change {name}: it can never change in a run: {reason}")
    changes = []
    for name in {**now, **before}:
        if before.get(name) == now.get(name):
            continue
        change = f"its {name} is {before.get(name)!r}, this run's is {now.get(name)!r}"
        reason = _why_fixed(name)
        if reason is None and (name in allowed or name.split(".")[0] in allowed):
            changes.append(change)
            continue
        remedy = f"({reason})" if reason else f"or allow it by --allow_change {name},"
        raise UserError(
            f"cannot resume from {str(checkpoint)!r}: {change}; use the same, {remedy} or another --output_dir to "
            "start anew"
        )
    return changes


def _why_fixed(name: str) -> str | None:
    return None if name in _CHANGEABLE else _FIXED.get(name.split(".")[0])


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested objects by their dotted names."""
    leaves = {}
    for name, value in tree.items():
        leaves.update(_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return leaves
