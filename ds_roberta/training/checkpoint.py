"""Checkpoints: one portable format for every ZeRO stage, precision and number of processes.

    global_stepN/state-RRRRR-of-WWWWW.safetensors   fp32 weights, exp_avg and exp_avg_sq by parameter name
    global_stepN/train_state.json                   the numbers of `TrainState`
    global_stepN/tokenizer/                         so that a checkpoint exports by itself
    global_stepN/manifest.json                      size and checksum of every other file

A checkpoint is written beside its place, synced, and renamed as a whole: it is complete or it does not exist under
its name. `latest` then names it. There is no pickle, so nothing in a folder can run code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from ds_roberta.data.stages import TRAIN_STATE_NAME
from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, file_checksum, sync_directory, sync_file, write_json

if TYPE_CHECKING:  # the format is read without DeepSpeed
    from ds_roberta.training.engine import Engine

FORMAT_VERSION = 1
CHECKPOINTS_FOLDER = "checkpoints"
LATEST_NAME = "latest"
TRAINED_TENSORS = ("weight", "exp_avg", "exp_avg_sq")
"""What is stored of a parameter, as `KEY.NAME`."""
_NAME_PATTERN = re.compile(r"global_step(\d+)")
_MANIFEST_NAME, TOKENIZER_FOLDER = "manifest.json", "tokenizer"


@dataclass
class TrainState:
    """All of a run's state besides weights and moments.

    Attributes:
        identity: what a resumed run must share, by name: model, data, tokenizer, packing, source weights, masking,
            seed, stages, shape of the learning rate.
        global_step: optimizer steps taken, those that fp16 skipped included.
        skipped_steps: steps that fp16 skipped.
        consumed_tokens: tokens trained on, padding not counted.
        loss_scaler: the numbers of fp16's dynamic loss scaler.
        recent_losses: of the last steps, by which a spike of the loss is told.
        loss_spikes: steps whose loss was one, those that were rolled back included.
        skipped_places: what the run passes over after such a step, each with the fields of `data.stages.SkippedPlaces`.
    """

    identity: dict[str, Any]
    global_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    loss_scaler: dict[str, float] = field(default_factory=dict)
    recent_losses: list[float] = field(default_factory=list)
    loss_spikes: int = 0
    skipped_places: list[dict[str, int]] = field(default_factory=list)


def save(engine: Engine, state: TrainState, tokenizer_folder: Path, folder: Path, keep_last: int) -> Path:
    """Write the checkpoint of `state.global_step` into `folder`; all ranks call it and share the writing.

    Raises:
        UserError: it could not be written (a full disk, for example); earlier checkpoints are untouched.
    """
    ranks = engine.ranks
    target = folder / f"global_step{state.global_step}"
    temporary = folder / f".{target.name}.tmp"
    tensors = _own_tensors(engine)
    problem: OSError | safetensors.SafetensorError | None = None
    if ranks.is_main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = error
    ranks.barrier()
    written: dict[str, dict[str, Any]] = {}
    if tensors and problem is None:
        name = f"state-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"
        try:
            safetensors.torch.save_file(tensors, temporary / name)
            sync_file(temporary / name)
            written[name] = _file_entry(temporary / name)
        except (OSError, safetensors.SafetensorError) as error:
            problem = error
    entries = ranks.gather(written)
    # Only when every rank has written its part may the whole appear under its name.
    if not ranks.any(problem is not None) and ranks.is_main:
        try:
            _complete(temporary, target, state, tokenizer_folder, {k: v for entry in entries for k, v in entry.items()})
        except OSError as error:
            problem = error
    if ranks.any(problem is not None):
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        problems = [text for text in ranks.gather(str(problem) if problem else None) if text]
        raise UserError(f"cannot write the checkpoint {str(target)!r}: {problems[0]}; earlier checkpoints are intact")
    if ranks.is_main:
        _remove_old(folder, keep_last, state.global_step)
    return target


def _complete(
    temporary: Path, target: Path, state: TrainState, tokenizer_folder: Path, entries: dict[str, dict[str, Any]]
) -> None:
    write_json(temporary / TRAIN_STATE_NAME, {"format_version": FORMAT_VERSION, **asdict(state)})
    shutil.copytree(tokenizer_folder, temporary / TOKENIZER_FOLDER)
    for path in (temporary / TRAIN_STATE_NAME, *sorted((temporary / TOKENIZER_FOLDER).iterdir())):
        sync_file(path)
        entries[str(path.relative_to(temporary))] = _file_entry(path)
    write_json(temporary / _MANIFEST_NAME, {"format_version": FORMAT_VERSION, "files": entries})
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync_directory(target.parent)
    with atomic_path(target.parent / LATEST_NAME) as latest:
        latest.write_text(target.name + "\n", encoding="utf-8")


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "checksum": file_checksum(path)}


def _remove_old(folder: Path, keep_last: int, saved_step: int) -> None:
    for step in saved_steps(folder)[keep_last:]:
        if step != saved_step:  # it is not the newest in a run that went on from an older checkpoint
            shutil.rmtree(folder / f"global_step{step}", ignore_errors=True)


def saved_steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint folder, the newest first."""
    matches = (_NAME_PATTERN.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def verify(checkpoint: Path) -> None:
    """Raise `UserError` unless every file of a checkpoint has the size and checksum that its manifest names."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST_NAME).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
    except FileNotFoundError as error:
        raise UserError(
            f"{str(checkpoint)!r} is no checkpoint of this program ({_MANIFEST_NAME} is missing): name a folder "
            f"{CHECKPOINTS_FOLDER}/global_stepN of a run"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the manifest of the checkpoint {str(checkpoint)!r} is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {str(checkpoint)!r} has format version {version}, this program reads {FORMAT_VERSION}"
        )
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"the checkpoint file {str(path)!r} is missing")
        try:
            is_whole = _file_entry(path) == entry
        except OSError as error:
            raise UserError(f"cannot read the checkpoint file {str(path)!r}: {error.strerror}") from error
        if not is_whole:
            raise UserError(f"the checkpoint file {str(path)!r} is damaged: the manifest has another size or checksum")
    if unlisted := {path.name for path in checkpoint.glob("state-*.safetensors")} - set(files):
        raise UserError(f"the manifest of the checkpoint {str(checkpoint)!r} does not name its file {min(unlisted)!r}")


def choose(resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from, verified: with "auto" the newest good one, or None; else the one named.

    Raises:
        UserError: the one named is missing or damaged; or, with "auto", there are some and none is good.
    """
    if resume != "auto":
        verify(Path(resume))
        return Path(resume)
    steps = saved_steps(folder)
    for step in steps:
        candidate = folder / f"global_step{step}"
        try:
            verify(candidate)
        except UserError as error:
            logger.warning(f"passed over a checkpoint: {error}")
            continue
        return candidate
    if steps:
        raise UserError(f"no checkpoint in {str(folder)!r} is complete: move them away to start anew")
    return None


def newest(folder: Path) -> Path:
    """The newest good checkpoint of a run's folder, verified; or the folder itself where it is a checkpoint.

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


def read_state(checkpoint: Path) -> TrainState:
    content = json.loads((checkpoint / TRAIN_STATE_NAME).read_text(encoding="utf-8"))
    return TrainState(**{entry.name: content[entry.name] for entry in fields(TrainState) if entry.name in content})


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights by parameter name."""
    return {name: file.get_tensor(key) for key, name, file in _stored(checkpoint) if key == f"weight.{name}"}


def load(engine: Engine, checkpoint: Path) -> TrainState:
    """Put a verified checkpoint into an engine of any ZeRO stage, precision and world size, on all ranks."""
    state = read_state(checkpoint)
    files = {key: file for key, _, file in _stored(checkpoint)}
    for name, parameter in engine.module.named_parameters():
        engine.set_tensors(
            parameter, {key: files[f"{key}.{name}"].get_tensor(f"{key}.{name}") for key in TRAINED_TENSORS}
        )
    engine.applied_steps = state.global_step - state.skipped_steps
    engine.loss_scaler_state = state.loss_scaler
    return state


def _stored(checkpoint: Path) -> Iterator[tuple[str, str, Any]]:
    """Key, parameter name and open file of every stored tensor."""
    for path in sorted(checkpoint.glob("state-*.safetensors")):
        file = safetensors.safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118 - not a dict
            yield key, key.split(".", 1)[1], file


def _own_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's share of weights and moments, full and fp32 on the CPU; a collective call at ZeRO stages 1 to 3."""
    loads = [0] * engine.ranks.world_size
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        owner = loads.index(min(loads))
        loads[owner] += getattr(parameter, "ds_numel", parameter.numel())
        for key, value in engine.full_tensors(parameter).items():
            if owner == engine.ranks.rank:
                tensors[f"{key}.{name}"] = value.detach().float().cpu().clone()
    return tensors
