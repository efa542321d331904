"""The checkpoints of transformers' Trainer in an interrupted run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from ds_roberta.errors import UserError
from ds_roberta.files import load_json

TRAINER_STATE = "trainer_state.json"  # the last file that Trainer writes to a checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed, since Trainer counts them."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((load_json((path / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return max(whole)[1] if whole else None


def check_processes(checkpoint: Path, world_size: int) -> None:
    """Raise `UserError` if DeepSpeed divided the optimizer's states among another number of processes."""
    parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if parts not in (0, world_size):
        raise UserError(
            f"{str(checkpoint)!r} was saved by {parts} processes, and with DeepSpeed {world_size} cannot continue it: "
            f"start {parts}, or remove {str(checkpoint.parents[1])!r} to begin that run again"
        )
