"""Where a run starts: from scratch, or from a checkpoint that fits it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError
from ds_roberta.files import json_fingerprint
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
    in_deepspeeds_layout = None if config.resume == "auto" else deepspeed_checkpoint.find(Path(config.resume))
    ranks.on_main(lambda: finish_exchanges(folder))
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
    if config.resume != "auto":
        with checkpoint.errors_of_the_state(path):
            named, is_own = json_fingerprint(asdict(state)), path.resolve().is_relative_to(config.output_dir.resolve())
        if _has_gone_on(ranks, folder, state, named, is_own):
            ranks.log(f"this run has gone on from --resume {config.resume} before: {folder} has newer checkpoints")
            return find_start(replace(run, config=replace(config, resume="auto")))
        state.resumed_from = named
        if not is_own and state.best_step != state.global_step:
            state.best_eval_loss = state.best_step = None  # that checkpoint is not in this folder
    with checkpoint.errors_of_the_state(path):
        state.identity = completed_identity(state.identity)
        changes = check_identity(path, state.identity, identity, allowed)
    for change in changes:
        ranks.log(f"allowed change: {path}: {change}")
    if state.continue_as(identity, config.eval_sequences):
        ranks.log("held-out losses are of other sequences or masks from here on: only a later checkpoint can be best")
    if state.global_step > config.schedule.max_steps:
        raise UserError(
            f"{str(path)!r} is at step {state.global_step}, beyond --max_steps {config.schedule.max_steps}: raise it"
        )
    ranks.log(f"resuming from {path}, step {state.global_step} of {config.schedule.max_steps}")
    return Start(state, deepspeed_checkpoint=path) if in_deepspeeds_layout else Start(state, checkpoint=path)


def _has_gone_on(ranks: Ranks, folder: Path, state: TrainState, named: str, is_own: bool) -> bool:
    """Whether a run in this folder has begun at the checkpoint that `--resume` names, and has saved since.

    Args:
        state: the checkpoint's.
        named: its fingerprint.
        is_own: whether the checkpoint is in the run's own folder.

    Raises:
        UserError: the folder has newer checkpoints of which it is not known.
    """
    saved = [step for step in checkpoint.saved_steps(folder) if step >= state.global_step + is_own]
    if not saved:
        return False
    newest = ranks.on_main(lambda: checkpoint.choose("auto", folder))
    if newest is not None and checkpoint.read_state(newest).resumed_from == named:
        return True
    raise UserError(
        f"{str(folder)!r} has checkpoints that did not begin at the one that --resume names, {saved[0]} the last step "
        "of them: move them away, choose another --output_dir, or continue from the newest with --resume auto"
    )
