"""Where a run starts: from scratch, or from a checkpoint that fits it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_roberta.errors import UserError
from ds_roberta.training import checkpoint, deepspeed_checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import finish_exchanges
from ds_roberta.training.facts import check_identity, completed_identity, run_identity
from ds_roberta.training.settings import Run

if TYPE_CHECKING:
    from ds_roberta.training.engine import Engine


@dataclass(frozen=True)
class Start:
    """The state that a run starts from, and the checkpoint that has it: portable, DeepSpeed's own, or neither."""

    state: TrainState
    checkpoint: Path | None = None
    deepspeed_checkpoint: Path | None = None

    @property
    def is_fresh(self) -> bool:
        return self.checkpoint is None and self.deepspeed_checkpoint is None

    def load(self, engine: Engine) -> None:
        """Give the engine the checkpoint's weights and optimizer states, if there is one; all ranks call it."""
        if self.checkpoint is not None:
            checkpoint.load(engine, self.checkpoint)
        elif self.deepspeed_checkpoint is not None:
            deepspeed_checkpoint.load(engine, self.deepspeed_checkpoint, self.state)


def find_start(run: Run) -> Start:
    """The start that `--resume` asks for.

    Raises:
        UserError: the checkpoint belongs to another run, or cannot be resumed from.
    """
    config, ranks, initial_model = run.config, run.ranks, run.initial_model
    identity = run_identity(run)
    allowed = [] if run.options.allow_change is None else run.options.allow_change.split(",")
    folder = config.output_dir / checkpoint.CHECKPOINTS_FOLDER
    ranks.on_main(lambda: finish_exchanges(folder))
    named = None if config.resume == "auto" else Path(config.resume)
    begun_at = None if named is None else _name(named, config.output_dir)
    if begun_at is not None and ranks.on_main(lambda: _beginning(folder)) == begun_at:
        ranks.log(f"this run has already continued from --resume {named}: {folder} has newer checkpoints")
        return find_start(replace(run, config=replace(config, resume="auto")))
    if named is not None and not named.is_dir():
        raise UserError(f"--resume {config.resume!r} is not a folder: name a checkpoint's folder, or use 'auto'")
    in_deepspeeds_layout = None if named is None else deepspeed_checkpoint.find(named)
    path = in_deepspeeds_layout or ranks.on_main(lambda: checkpoint.choose(config.resume, folder))
    if path is None:
        check_identity(folder, identity, identity, allowed)
        learned = initial_model.learned_positions if initial_model else 0
        return Start(TrainState(identity, learned_positions=learned, eval_sequences=config.eval_sequences))
    if run.budget:
        raise UserError(
            f"--{' --'.join(run.budget)} fixes the steps when a run starts, but this one resumes from {str(path)!r}: "
            "give --max_steps"
        )
    if in_deepspeeds_layout:
        state = deepspeed_checkpoint.read_state(path, ranks.world_size, run.deepspeed.zero_stage, run.precision)
    else:
        state = checkpoint.read_state(path)
    if begun_at is not None:
        ranks.on_main(lambda: _check_none_is_newer(folder, state.global_step))
        state.begin_at(begun_at, is_own=not Path(begun_at).is_absolute())
    with checkpoint.errors_of_the_state(path):
        state.identity = completed_identity(state.identity)
        changes = check_identity(path, state.identity, identity, allowed)
    for change in changes:
        ranks.log(f"allowed change: {path}: {change}")
    if state.continue_as(identity, config.eval_sequences):
        ranks.log(
            "from here on, held-out losses are of other sequences or masks: only a later checkpoint can be the best"
        )
    if state.global_step > config.schedule.max_steps:
        raise UserError(
            f"{str(path)!r} is at step {state.global_step}, beyond --max_steps {config.schedule.max_steps}: raise it"
        )
    ranks.log(f"resuming from {path}, step {state.global_step} of {config.schedule.max_steps}")
    return Start(state, deepspeed_checkpoint=path) if in_deepspeeds_layout else Start(state, checkpoint=path)


def _name(named: Path, output_dir: Path) -> str:
    """A checkpoint's path: within the run's folder if it is there, which may be moved; else absolute."""
    path, output_dir = named.resolve(), output_dir.resolve()
    return str(path.relative_to(output_dir) if path.is_relative_to(output_dir) else path)


def _beginning(folder: Path) -> str | None:
    """Where `--resume` began the run of the newest checkpoint that can be read; it is verified only when loaded."""
    for step in checkpoint.saved_steps(folder):
        with suppress(UserError):
            return checkpoint.read_state(checkpoint.step_folder(folder, step)).resumed_from
    return None


def _check_none_is_newer(folder: Path, global_step: int) -> None:
    """Raise `UserError` if a folder has newer checkpoints than the one that `--resume` names, of another beginning."""
    newer = [step for step in checkpoint.saved_steps(folder) if step > global_step]
    if newer:
        raise UserError(
            f"{str(folder)!r} has checkpoints, the last of step {newer[0]}, that did not begin at the one of step "
            f"{global_step} that --resume names: move them away, choose another --output_dir, or continue from the "
            "newest with --resume auto"
        )
