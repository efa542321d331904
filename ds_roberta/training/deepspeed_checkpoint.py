"""Checkpoints in DeepSpeed's own layout, optional, for its tools, such as zero_to_fp32.

    deepspeed_checkpoints/global_stepN/   written by DeepSpeed: *_model_states.pt, *_optim_states.pt
    deepspeed_checkpoints/latest          global_stepN

They load only with the same number of processes, ZeRO stage and precision, and have no checksums. They are pickles,
and reading a pickle can run code in it, so read only folders that you trust.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_roberta.errors import UserError
from ds_roberta.training.checkpoint import (
    CHECKPOINTS_FOLDER,
    LATEST_NAME,
    TrainState,
    errors_of_the_state,
    saved_steps,
    state_from,
    step_folder,
)
from ds_roberta.training.checkpoint_writer import (
    Retention,
    begin,
    errors_of_saving,
    put_in_place,
    remove,
    temporary_folder,
)

if TYPE_CHECKING:  # importing this does not import DeepSpeed
    from ds_roberta.training.engine import Engine

FOLDER = "deepspeed_checkpoints"
_MODEL_STATES = "*_model_states.pt"
_STATE_KEY = "ds_roberta_train_state"
# Without a version here, DeepSpeed's ds_to_universal refuses the folder; the model has none of the special parameters
# that the other entries would name.
_UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def save(engine: Engine, state: TrainState, folder: Path, keep_last: int) -> Path:
    """Write the checkpoint of `state.global_step`, atomically; all ranks call it, and it returns when all is written.

    Raises:
        UserError: it could not be written.
    """
    target = step_folder(folder, state.global_step)
    engine.ranks.on_main(lambda: begin(target))
    client_state = {_STATE_KEY: asdict(state), **_UNIVERSAL_INFO}
    problem = engine.save_deepspeed_checkpoint(folder, temporary_folder(target).name, client_state)
    problems = [text for text in engine.ranks.gather(problem) if text]

    def complete() -> None:
        with errors_of_saving(target):
            if problems:
                raise OSError(problems[0])
            put_in_place(target)
        remove(folder, Retention(keep_last).removable(saved_steps(folder), state))

    engine.ranks.on_main(complete)
    return target


def find(path: Path) -> Path | None:
    """The checkpoint that a folder is, or that its `latest` names; None if it does not have this layout."""
    latest = path / LATEST_NAME
    folder = path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path
    return folder if any(folder.glob(_MODEL_STATES)) else None


def read_state(checkpoint: Path, world_size: int, zero_stage: int, precision: str) -> TrainState:
    """The state in a checkpoint, if a run with these settings can load it.

    Raises:
        UserError: it cannot be read, or was not written by this program, or by a run of another kind.
    """
    path = min(checkpoint.glob(_MODEL_STATES))
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read DeepSpeed's checkpoint file {str(path)!r}: {error}") from error
    if _STATE_KEY not in content:
        raise UserError(f"{str(checkpoint)!r} was not written by this program: it has no {_STATE_KEY!r}")
    with errors_of_the_state(checkpoint):
        config = content["ds_config"]
        kinds = {
            "number of processes": (content["dp_world_size"], world_size),
            "ZeRO stage": (config.get("zero_optimization", {}).get("stage", 0), zero_stage),
            "precision": (_precision(config), precision),
        }
        state = state_from(content[_STATE_KEY])
    for name, (saved, current) in kinds.items():
        if saved != current:
            raise UserError(
                f"{str(checkpoint)!r} is in DeepSpeed's layout, which loads only into an unchanged run: its {name} is "
                f"{saved!r}, this run's is {current!r}; use the same, or resume from the portable one in "
                f"{CHECKPOINTS_FOLDER}/, which loads anywhere"
            )
    return state


def _precision(config: dict[str, Any]) -> str:
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")


def load(engine: Engine, checkpoint: Path, state: TrainState) -> None:
    """Load a checkpoint, after `read_state`, into an engine of the same kind; all ranks call it.

    Raises:
        UserError: DeepSpeed cannot load it (a file is missing or damaged).
    """
    engine.load_deepspeed_checkpoint(checkpoint.parent, checkpoint.name)
    engine.applied_steps = state.global_step - state.skipped_steps
    engine.loss_scaler_state = state.loss_scaler
