"""Checkpoints: one portable format for every ZeRO stage, precision and number of processes.

    global_stepN/state-RRRRR-of-WWWWW.safetensors   fp32 weights and moments as KEY.NAME, by parameter name:
                                                    exp_avg and exp_avg_sq, or Muon's momentum_buffer
    global_stepN/train_state.json                   the numbers of `TrainState`
    global_stepN/tokenizer/                         so that a checkpoint can be exported on its own
    global_stepN/manifest.json                      size and checksum of every other file

A checkpoint is complete or it does not exist under its name (`checkpoint_writer`). `latest` names the newest, `best`
the one with the lowest held-out loss. There is no pickle, so nothing in a folder can run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from ds_roberta.data.stages import TRAIN_STATE_NAME, SkippedPlaces
from ds_roberta.errors import UserError
from ds_roberta.files import file_checksum, is_within, load_json
from ds_roberta.model.weights import first_not_finite
from ds_roberta.process import logger

if TYPE_CHECKING:  # the format is read without DeepSpeed
    from ds_roberta.data.loader import Counts
    from ds_roberta.training.engine import Engine

FORMAT_VERSION = 1
CHECKPOINTS_FOLDER = "checkpoints"
LATEST_NAME, BEST_NAME = "latest", "best"
_NAME_PATTERN = re.compile(r"global_step(\d+)")
MANIFEST_NAME = "manifest.json"


_OF_THE_HELD_OUT_SAMPLE = ("data", "tokenizer", "packing", "masking", "attention")
"""Names in a run's identity that its held-out losses depend on, besides the model."""


@dataclass
class TrainState:
    """All of a run's state besides weights and moments.

    Attributes:
        identity: what a resumed run must share, by name: model, data, tokenizer, packing, source weights, masking,
            seed, stages, shape of the learning rate.
        global_step: optimizer steps taken, including those that fp16 skipped.
        skipped_steps: steps that fp16 skipped.
        consumed_tokens: tokens trained on, padding not counted.
        loss_scaler: the numbers of fp16's dynamic loss scaler.
        best_eval_loss: the lowest held-out loss after a step, in nats; None before the first evaluation.
        best_step: the step at which it was measured.
        recent_losses: the losses of the last steps, with which a new loss is compared to find spikes.
        loss_spikes: the number of steps with a loss spike, including steps that were rolled back.
        skipped_places: what the run skips after such a step.
        lines: the held-out losses of `data.count_models` by their names; empty if the run has none to compare with.
        recent_evaluations: step and held-out loss of the evaluations that a later one may be compared with.
        plateau: the kind of the last plateau of the held-out loss that was reported.
        learned_positions: the learned positions of the model that the run started from; 0 if it started from scratch.
        eval_sequences: how many held-out sequences the losses are of at most; 0 in an earlier version's checkpoint.
        resumed_from: the checkpoint that `--resume` named last, by its path: within the run's folder if it is there,
            else absolute; None if none was named.
    """

    identity: dict[str, Any]
    global_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    loss_scaler: dict[str, float] = field(default_factory=dict)
    best_eval_loss: float | None = None
    best_step: int | None = None
    recent_losses: list[float] = field(default_factory=list)
    loss_spikes: int = 0
    skipped_places: list[SkippedPlaces] = field(default_factory=list)
    lines: dict[str, float] = field(default_factory=dict)
    recent_evaluations: list[list[float]] = field(default_factory=list)
    plateau: str | None = None
    learned_positions: int = 0
    eval_sequences: int = 0
    resumed_from: str | None = None

    def continue_as(self, identity: dict[str, Any], eval_sequences: int) -> bool:
        """Continue as the state of a run with these. If its held-out losses are of other sequences or masks, the
        earlier ones are forgotten; returns whether they are.
        """
        of_others = self.eval_sequences not in (0, eval_sequences) or any(
            self.identity.get(name) != identity.get(name) for name in _OF_THE_HELD_OUT_SAMPLE
        )
        self.identity, self.eval_sequences = identity, eval_sequences
        if of_others:
            self.best_eval_loss = self.best_step = self.plateau = None
            self.lines, self.recent_evaluations = {}, []
        return of_others

    def begin_at(self, name: str | None, is_own: bool) -> None:
        """Be the state with which a run begins at a checkpoint, `resumed_from`. One of another folder's is not the best
        of this one.
        """
        self.resumed_from = name
        if not is_own:
            self.best_eval_loss = self.best_step = None

    def count_step(self, counts: Counts, skipped: bool) -> None:
        """Count an optimizer step on a batch of `counts`."""
        self.global_step += 1
        self.skipped_steps += skipped
        self.consumed_samples += int(counts.sequences)
        self.consumed_tokens += int(counts.tokens)

    @property
    def trained_length(self) -> int:
        """Tokens of the longest sequences so far, for which the model has learned positions."""
        last = self.identity["packing"]["max_seq_length"]
        schedule = self.identity.get("max_seq_length_schedule", f"0:{last}")
        stages = (map(int, stage.split(":")) for stage in schedule.split(","))
        lengths = (length for first, length in stages if first < max(self.global_step, 1))
        return max(self.learned_positions, *lengths)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"global_step{step}"


def file_entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "checksum": file_checksum(path)}


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, the newest first."""
    matches = (_NAME_PATTERN.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def verify(checkpoint: Path) -> None:
    """Raise `UserError` unless all files have the sizes and checksums of the manifest, and all tensors are finite."""
    try:
        manifest = load_json((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        files = dict(manifest["files"]) if version == FORMAT_VERSION else {}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{str(checkpoint)!r} is not a checkpoint of this program ({MANIFEST_NAME} is missing): name a folder "
            f"{CHECKPOINTS_FOLDER}/global_stepN of a run"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the manifest of the checkpoint {str(checkpoint)!r} is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {str(checkpoint)!r} has format version {version}, but this program reads {FORMAT_VERSION}"
        )
    for name, entry in files.items():
        path = checkpoint / name
        if not is_within(name):
            raise UserError(f"the manifest of the checkpoint {str(checkpoint)!r} names {name!r}, outside of it")
        if not path.is_file():
            raise UserError(f"the checkpoint file {str(path)!r} is missing")
        try:
            is_whole = file_entry(path) == entry
        except OSError as error:
            raise UserError(f"cannot read the checkpoint file {str(path)!r}: {error.strerror}") from error
        if not is_whole:
            raise UserError(f"the checkpoint file {str(path)!r} is damaged: the manifest has another size or checksum")
    if unlisted := {path.name for path in checkpoint.glob("state-*.safetensors")} - set(files):
        raise UserError(f"the manifest of the checkpoint {str(checkpoint)!r} does not name its file {min(unlisted)!r}")
    key = first_not_finite((key, file.get_tensor(key)) for key, _, file in _stored(checkpoint))
    if key is not None:
        raise UserError(
            f"the training of the checkpoint {str(checkpoint)!r} had diverged: {key!r} is not finite; resume from an "
            "earlier one"
        )


def choose(resume: str, folder: Path) -> Path | None:
    """The checkpoint to resume from, verified: with "auto" the newest good one, or None; else the one named.

    Raises:
        UserError: the one named is missing or damaged; or, with "auto", there are some but none is good.
    """
    if resume != "auto":
        verify(Path(resume))
        return Path(resume)
    steps = saved_steps(folder)
    for step in steps:
        candidate = step_folder(folder, step)
        try:
            verify(candidate)
        except UserError as error:
            logger.warning(f"skipped a checkpoint: {error}")
            continue
        return candidate
    if steps:
        raise UserError(f"no checkpoint in {str(folder)!r} is complete: move them away to start over")
    return None


def newest(folder: Path) -> Path:
    """The newest good checkpoint of a run's folder, verified; or the folder itself if it is a checkpoint.

    Raises:
        UserError: there is none.
    """
    if (folder / CHECKPOINTS_FOLDER).is_dir():
        path = choose("auto", folder / CHECKPOINTS_FOLDER)
        if path is None:
            raise UserError(f"no checkpoint in {str(folder / CHECKPOINTS_FOLDER)!r}")
        return path
    verify(folder)
    return folder


def best(folder: Path) -> Path:
    """The checkpoint of a run's folder that had the lowest held-out loss, verified.

    Raises:
        UserError: there is none, it is damaged, or `best` and the newest checkpoint do not agree on the step.
    """
    name = folder / CHECKPOINTS_FOLDER / BEST_NAME
    try:
        found = name.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(
            f"cannot read {str(name)!r} ({error.strerror}): a run writes it after its first evaluation; give its folder"
        ) from error
    if not _NAME_PATTERN.fullmatch(found):
        raise UserError(f"{str(name)!r} has {found!r}, not the name of a checkpoint beside it: write that")
    path = name.with_name(found)
    verify(path)
    step = read_state(newest(folder)).best_step
    if found != f"global_step{step}":
        raise UserError(
            f"{str(name)!r} names {found!r}, but in the newest checkpoint the best step is {step}: the file is damaged "
            "or was not written before a kill; start the run again, or name a checkpoint's folder"
        )
    return path


def read_state(checkpoint: Path) -> TrainState:
    """The state in a checkpoint. Its values are not checked: what uses them does so within `errors_of_the_state`.

    Raises:
        UserError: it cannot be read.
    """
    with errors_of_the_state(checkpoint):
        return state_from(load_json((checkpoint / TRAIN_STATE_NAME).read_text(encoding="utf-8")))


@contextmanager
def errors_of_the_state(checkpoint: Path) -> Iterator[None]:
    """Turn what a wrong value in a checkpoint's state leads to into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {str(checkpoint)!r} is damaged ({error!r}): choose another") from error


def state_from(content: dict[str, Any]) -> TrainState:
    """The reverse of `asdict`; fields that an earlier version did not store get their defaults.

    Raises:
        TypeError: there is no identity, a count is not a whole number, or a field has another form.
    """
    state = TrainState(**{entry.name: content[entry.name] for entry in fields(TrainState) if entry.name in content})
    state.skipped_places = [SkippedPlaces(**entry) for entry in content.get("skipped_places", [])]
    for entry in fields(TrainState):
        if entry.type == "int" and type(getattr(state, entry.name)) is not int:
            raise TypeError(f"{entry.name} is {getattr(state, entry.name)!r}")
    if not isinstance(state.identity, dict):
        raise TypeError(f"identity is {state.identity!r}")
    return state


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights by parameter name."""
    return {name: file.get_tensor(key) for key, name, file in _stored(checkpoint) if key == f"weight.{name}"}


def load(engine: Engine, checkpoint: Path) -> TrainState:
    """Load a verified checkpoint into an engine of any ZeRO stage, precision and world size, on all ranks."""
    state = read_state(checkpoint)
    stored: dict[str, dict[str, Any]] = {}
    for key, name, file in _stored(checkpoint):
        stored.setdefault(name, {})[key] = file
    for name, parameter in engine.module.named_parameters():
        engine.set_tensors(
            parameter, {key.split(".", 1)[0]: file.get_tensor(key) for key, file in stored[name].items()}
        )
    engine.applied_steps = state.global_step - state.skipped_steps
    engine.loss_scaler_state = state.loss_scaler
    return state


def _stored(checkpoint: Path) -> Iterator[tuple[str, str, Any]]:
    """Key, parameter name and open file of every stored tensor. Raises `UserError` if a file cannot be read."""
    for path in sorted(checkpoint.glob("state-*.safetensors")):
        try:
            file = safetensors.safe_open(path, framework="pt")
            keys = list(file.keys())
            names = [key.split(".", 1)[1] for key in keys]
        except (OSError, IndexError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read the checkpoint file {str(path)!r} ({error}): choose another") from error
        yield from ((key, name, file) for key, name in zip(keys, names, strict=True))
