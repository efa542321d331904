"""Writing checkpoints while training continues.

The training loop does what the processes must do together: it copies weights and moments into host memory, and, at the
end of the first step after every process has written its file, it renames the folder, which makes the checkpoint
visible. In between, a thread in each process serialises, syncs and checksums its share, without communication.

Files are written into `.global_stepN.tmp` next to the final folder, which is renamed as a whole: a kill at any moment
leaves the earlier checkpoints as they were, and at worst a hidden folder that the next start removes.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.stages import TRAIN_STATE_NAME
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError, disk_refusal
from ds_roberta.files import (
    exchange,
    finish_exchange,
    honour_umask,
    remove_leftovers,
    sync_directory,
    sync_file,
    write_json,
    write_text,
)
from ds_roberta.lease import Lease
from ds_roberta.model.weights import first_not_finite
from ds_roberta.process import logger
from ds_roberta.training.checkpoint import (
    BEST_NAME,
    FORMAT_VERSION,
    LATEST_NAME,
    MANIFEST_NAME,
    TrainState,
    file_entry,
    saved_steps,
    step_folder,
)
from ds_roberta.training.loss_spikes import LossSpike

if TYPE_CHECKING:  # the format is written without DeepSpeed
    from ds_roberta.training.engine import Engine

FileEntries = dict[str, dict[str, Any]]
"""Size and checksum of files by their path within a checkpoint."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, every multiple of `keep_every` steps, and the best."""

    keep_last: int
    keep_every: int | None = None

    def removable(self, steps: list[int], state: TrainState) -> list[int]:
        """Which of the saved `steps` (newest first) may be removed now that `state` is saved."""
        return [
            step
            for step in steps[self.keep_last :]
            # The one just saved is not the newest in a run that continued from an older checkpoint.
            if step not in (state.global_step, state.best_step)
            and not (self.keep_every and step % self.keep_every == 0)
        ]


@dataclass(frozen=True)
class _Save:
    state: TrainState
    target: Path
    share: Future[FileEntries]
    """Resolves to this process's files once they are on the disk."""


class CheckpointWriter:
    """Writes checkpoints into `folder`, one at a time; all ranks call its methods at the same points.

    A context manager: a block that ends normally waits for the save in flight. After an exception it waits only for
    this process's thread, because the other ranks may be elsewhere; the checkpoint in flight is then discarded.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer_folder: Path,
        folder: Path,
        retention: Retention,
        say: Callable[[str], object] | None = None,
        lease: Lease | None = None,
    ):
        self._engine, self._tokenizer_folder, self._folder = engine, tokenizer_folder, folder
        self._ranks: Ranks = engine.ranks
        self._retention, self._say, self._lease = retention, say or self._ranks.log, lease
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: _Save | None = None
        self.saved_step = 0
        """The step of the last checkpoint that this writer completed; 0 for none."""

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        try:
            if kind is None or (failed and self._ranks.world_size == 1):
                self.finish()
        finally:
            self._thread.shutdown(wait=kind is None or failed)  # a second Ctrl-C waits for nothing

    def save(self, state: TrainState) -> Path:
        """Copy weights, moments and `state`, and begin to write them; first wait for the previous save.

        Returns:
            Where the checkpoint will be when it is complete.

        Raises:
            UserError: this or the previous save could not be written (a full disk, for example), or rank 0 has lost its
                lease.
            LossSpike: a weight or moment is not finite; nothing is written.
        """
        self.finish()
        target = step_folder(self._folder, state.global_step)
        state, tensors = deepcopy(state), own_tensors(self._engine)
        for key in filter(None, self._ranks.gather(first_not_finite(tensors.items()))):
            raise LossSpike(f"{key!r} after step {state.global_step} is not finite", state.global_step)
        self._ranks.on_main(lambda: self._begin(target))
        share = self._thread.submit(self._write_share, state, tensors, temporary_folder(target))
        self._in_flight = _Save(state, target, share)
        return target

    def poll(self) -> None:
        """Complete the save in flight if every rank has written its share; call between any two steps.

        Raises:
            UserError: a rank could not write it, or rank 0 could not complete it or has lost its lease; earlier
                checkpoints are untouched.
        """
        if self._in_flight is None or self._ranks.any(not self._in_flight.share.done()):
            return
        save, self._in_flight = self._in_flight, None
        problem = save.share.exception()
        if not (problem is None or isinstance(problem, OSError) or disk_refusal(problem)):
            raise problem
        entries = self._ranks.gather(save.share.result() if problem is None else {})
        problems = [text for text in self._ranks.gather(problem and str(problem)) if text is not None]
        self._ranks.on_main(lambda: self._complete(save, entries, problems))
        self.saved_step = save.state.global_step
        self._say(f"saved {save.target}")

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and complete it; raises as `poll`."""
        if self._in_flight is not None:
            wait([self._in_flight.share])
            self.poll()

    def _begin(self, target: Path) -> None:
        if self._lease:
            self._lease.check()
        begin(target)

    def _write_share(self, state: TrainState, tensors: dict[str, torch.Tensor], temporary: Path) -> FileEntries:
        """Write this rank's files durably, in the thread; rank 0 also writes the shared ones."""
        paths = []
        if tensors:
            name = f"state-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
            safetensors.torch.save_file(tensors, temporary / name)
            paths.append(temporary / name)
        if self._ranks.is_main:
            write_json(temporary / TRAIN_STATE_NAME, {"format_version": FORMAT_VERSION, **asdict(state)})
            (temporary / TOKENIZER_FOLDER).mkdir()
            for file in self._tokenizer_folder.iterdir():
                shutil.copyfile(file, temporary / TOKENIZER_FOLDER / file.name)
            paths += [temporary / TRAIN_STATE_NAME, *sorted((temporary / TOKENIZER_FOLDER).iterdir())]
            sync_directory(temporary / TOKENIZER_FOLDER)
        honour_umask(paths)
        for path in paths:
            sync_file(path)
        return {str(path.relative_to(temporary)): file_entry(path) for path in paths}

    def _complete(self, save: _Save, entries: list[FileEntries], problems: list[str]) -> None:
        """Rename the checkpoint to its final name, or remove what was written; called on rank 0."""
        if self._lease:
            self._lease.check()
        temporary = temporary_folder(save.target)
        with errors_of_saving(save.target):
            if problems:
                raise OSError(problems[0])
            files = {name: entry for share in entries for name, entry in share.items()}
            write_json(temporary / MANIFEST_NAME, {"format_version": FORMAT_VERSION, "files": files})
            put_in_place(save.target)
            if save.state.best_step == save.state.global_step:
                write_pointer(self._folder, BEST_NAME, save.target)
        removable = self._retention.removable(saved_steps(self._folder), save.state)
        self._thread.submit(remove, self._folder, removable)


@contextmanager
def errors_of_saving(target: Path) -> Iterator[None]:
    """Turn an `OSError` into a `UserError`, and remove what was written for `target`."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(temporary_folder(target), ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {str(target)!r}: {error}; earlier checkpoints are intact"
        ) from error


def finish_exchanges(folder: Path) -> None:
    """Put back the checkpoints that a kill took away while they were being replaced."""
    for path in folder.glob(".global_step*.old"):
        finish_exchange(path.with_name(path.stem[1:]))


def clean_up(folder: Path, best_step: int | None, latest_step: int = 0) -> None:
    """Remove what killed runs left unfinished, and make `best` and `latest` name the checkpoints of these steps.

    If there is no checkpoint of `best_step`, there is no `best` afterwards; without one of `latest_step`, `latest` is
    not changed.
    """
    finish_exchanges(folder)
    for path in folder.glob(".global_step*"):
        shutil.rmtree(path)
    remove_leftovers(folder)
    if latest_step in saved_steps(folder):
        write_pointer(folder, LATEST_NAME, step_folder(folder, latest_step))
    if best_step is not None and best_step in saved_steps(folder):
        write_pointer(folder, BEST_NAME, step_folder(folder, best_step))
    else:
        (folder / BEST_NAME).unlink(missing_ok=True)


def temporary_folder(target: Path) -> Path:
    """The folder of a checkpoint until it is complete."""
    return target.with_name(f".{target.name}.tmp")


def begin(target: Path) -> None:
    """Make the empty temporary folder of `target`; raises `UserError` if it cannot."""
    with errors_of_saving(target):
        shutil.rmtree(temporary_folder(target), ignore_errors=True)
        temporary_folder(target).mkdir(parents=True)


def put_in_place(target: Path) -> None:
    """Rename the durable temporary folder to `target`, and make `latest` name it."""
    # The same step may exist already: a stop interrupted its evaluation, which was repeated after the resume.
    exchange(temporary_folder(target), target)
    write_pointer(target.parent, LATEST_NAME, target)


def write_pointer(folder: Path, name: str, target: Path) -> None:
    write_text(folder / name, target.name + "\n")


def remove(folder: Path, steps: list[int]) -> None:
    """Remove the checkpoints of these steps; one that the disk does not let go is named in the log, and stays."""
    for step in steps:
        target = step_folder(folder, step)
        try:
            target.rename(temporary_folder(target))  # a half-removed one would count as damaged
            shutil.rmtree(temporary_folder(target))
        except OSError as error:
            logger.warning(f"cannot remove the checkpoint {str(target)!r}: {error}")


def owners(sizes: Sequence[int], world_size: int) -> list[int]:
    """Which rank writes each parameter: the one that has the fewest elements so far."""
    loads, ranks = [(0, rank) for rank in range(world_size)], []
    for size in sizes:
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, rank))
        ranks.append(rank)
    return ranks


def own_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of this rank's share of weights and moments, full, fp32, on the CPU; collective at ZeRO stages 1 to 3."""
    parameters = dict(engine.module.named_parameters())
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters.values()]
    tensors = {}
    for (name, parameter), owner in zip(parameters.items(), owners(sizes, engine.ranks.world_size), strict=True):
        for key, value in engine.full_tensors(parameter).items():
            if owner == engine.ranks.rank:
                tensors[f"{key}.{name}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    return tensors
