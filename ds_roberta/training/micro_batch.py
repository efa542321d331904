"""`"train_micro_batch_size_per_gpu": "auto"`: the size of a micro-batch, found in the running process.

On a GPU it is the largest that fits: forward and backward passes of full sequences are tried while everything that
training keeps there is in place. On a CPU, where memory is not the limit, it is the fastest of a few. The size found is
kept in the run's folder and in the user's cache, with everything it depends on as the key: a run that resumes under the
same conditions must get the same micro-batch to be bit-identical to an uninterrupted one.

A trial uses a twin of the model that DeepSpeed does not know, so it makes no collective calls: a process that runs out
of memory leaves no other waiting, and DeepSpeed's state needs no repair.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_roberta.config import MaskingConfig, ModelConfig, Stage
from ds_roberta.data.loader import MicroBatch
from ds_roberta.data.masking import Masker
from ds_roberta.errors import UserError
from ds_roberta.files import json_fingerprint, load_json, write_json
from ds_roberta.model.objectives import Objective

if TYPE_CHECKING:  # sizes are computed without DeepSpeed
    from ds_roberta.training.engine import Engine

FINDINGS_NAME = "micro_batch.json"
MEMORY_SHARE = 0.9
"""Share of a GPU's free memory that a micro-batch may fill; the rest is for fragments and uneven micro-batches."""
CPU_TOKENS = 4_096
"""Tokens of a micro-batch on a CPU if no other size is faster."""
_CPU_CANDIDATES = (1_024, 2_048, CPU_TOKENS, 8_192, 16_384)
_CPU_SECONDS = 3.0
_CPU_ROUNDS = 3
_CPU_TIE = 0.95
"""Another size must take less than this share of the default's time, so that noise does not decide."""
_MORE_MICRO_STEPS = 1 / 8
"""Extra micro-steps allowed, as a share of the fewest possible: smaller ones leave fewer empty places."""
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


@dataclass(frozen=True)
class BatchPlan:
    """A step of exactly `train_batch_size` sequences on `world_size` processes."""

    train_batch_size: int
    micro_batch_size: int
    world_size: int

    @classmethod
    def fit(cls, train_batch_size: int, largest_micro_batch_size: int, world_size: int) -> BatchPlan:
        """The plan that computes the fewest rows, including empty places; among equals, with the fewest micro-steps.

        Micro-batches are up to the given size, and micro-steps at most an eighth more than with that size: without
        that bound a prime share would be computed one row at a time, at a fraction of the speed.
        """
        share = -(-train_batch_size // world_size)
        fewest = -(-share // largest_micro_batch_size)
        most = int(fewest * (1 + _MORE_MICRO_STEPS))
        sizes = range(-(-share // most), min(largest_micro_batch_size, share) + 1)
        plans = [cls(train_batch_size, size, world_size) for size in sizes]
        return min(plans, key=lambda plan: (plan.empty_places, plan.accumulation_steps, plan.micro_batch_size))

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps of a step, the same on every process."""
        share = -(-self.train_batch_size // self.world_size)
        return -(-share // self.micro_batch_size)

    @property
    def empty_places(self) -> int:
        """Places of the last micro-batches that hold no sequence, over all processes."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size - self.train_batch_size

    def __str__(self) -> str:
        empty = f" - {self.empty_places} empty places" if self.empty_places else ""
        return (
            f"{self.train_batch_size} sequences a step = {self.micro_batch_size} (micro-batch) x "
            f"{self.accumulation_steps} (accumulation) x {self.world_size} (processes){empty}"
        )


def batch_plans(stages: Sequence[Stage], largest_micro_batches: Mapping[int, int], world_size: int) -> list[BatchPlan]:
    """How each stage's batch is divided, given the largest micro-batch of each length."""
    return [
        BatchPlan.fit(stage.train_batch_size, largest_micro_batches[stage.max_seq_length], world_size)
        for stage in stages
    ]


def find_micro_batch_size(
    engine: Engine, trial: Trial, conditions: dict[str, Any], limit: int, run_folders: Sequence[Path]
) -> int:
    """The micro-batch size to train with, the same on all ranks; all call it.

    Args:
        conditions: from `finding_conditions`.
        limit: the largest useful size.
        run_folders: the run's, where the finding is written, then others that may have it.

    Raises:
        UserError: not even one sequence fits into the memory.
    """
    ranks = engine.ranks
    key = json_fingerprint(conditions)
    paths = [folder / FINDINGS_NAME for folder in (*run_folders, user_cache())]
    on_gpu = engine.device.type != "cpu"
    size, path = ranks.on_main(lambda: _known_size(paths, key, limit))
    # Another process may have taken memory of the GPU since.
    if size is not None and not (on_gpu and ranks.any(not trial.fits(size))):
        ranks.log(f"micro-batches of up to {size} sequences, as found before ({path})")
    else:
        started = time.perf_counter()
        size = largest_size(engine, trial, limit) if on_gpu else fastest_size(engine, trial, limit)
        kind = f"the most that fit into {MEMORY_SHARE:.0%} of the free memory" if on_gpu else "the fastest here"
        ranks.log(f"micro-batches of up to {size} sequences: {kind}, found in {time.perf_counter() - started:.1f} s")
    finding = {"micro_batch_size": size, "conditions": conditions}

    def remember() -> None:
        _remember(paths[0], key, finding)
        with suppress(OSError):  # a home that is not writable costs the next run a few seconds
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            _remember(paths[-1], key, finding)

    ranks.on_main(remember)
    return size


def finding_conditions(
    engine: Engine,
    model: ModelConfig,
    max_seq_length: int,
    masking: MaskingConfig,
    precision: str,
    limit: int,
    objective: str,
) -> dict[str, Any]:
    """All that a finding depends on, as JSON; a collective call."""
    return {
        # The default of a setting that earlier versions did not have is left out, so that their findings stay valid.
        "model": {name: value for name, value in asdict(model).items() if (name, value) != ("hidden_act", "gelu")},
        "objective": objective,
        "max_seq_length": max_seq_length,
        "mlm_probability": masking.largest_probability,
        "precision": precision,
        "zero_optimization": engine.config.get("zero_optimization", {}),
        **{name: engine.config[name] for name in ("activation_checkpointing",) if name in engine.config},
        "limit": limit,
        "devices": sorted(set(engine.ranks.gather(_describe(engine.device)))),
        "world_size": engine.ranks.world_size,
        "torch": torch.__version__,
        "deepspeed": engine.deepspeed_version,
    }


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory} bytes"


def largest_size(engine: Engine, trial: Trial, limit: int) -> int:
    """The largest size of 1 … `limit` that fits on every rank."""
    size = engine.ranks.min(largest_fitting(trial.fits, limit))
    if size == 0:
        raise UserError(
            f"not even one sequence of {trial.max_seq_length} tokens fits into {MEMORY_SHARE:.0%} of the GPU's free "
            "memory: free the GPU, recompute layers (activation_checkpointing.number_checkpoints in the JSON), or "
            "choose a smaller --model or --max_seq_length"
        )
    return size


def largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """The largest of 1 … `limit` that fits, 0 for none, by doubling and then halving the interval."""
    fitting, too_large = 0, limit + 1
    while too_large - fitting > 1:
        doubling = too_large > limit
        size = min(max(1, 2 * fitting), limit) if doubling else (fitting + too_large) // 2
        if fits(size):
            fitting = size
        else:
            too_large = size
    return fitting


def fastest_size(engine: Engine, trial: Trial, limit: int) -> int:
    """The fastest of a few sizes on a CPU: `CPU_TOKENS` unless another is clearly faster, on all ranks together."""
    default, *others = [min(limit, max(1, tokens // trial.max_seq_length)) for tokens in (CPU_TOKENS, *_CPU_CANDIDATES)]
    sizes = sorted({default, *others})
    if len(sizes) == 1:
        return default
    engine.ranks.barrier()  # they share the processor in training, too
    seconds = dict(zip(sizes, engine.ranks.sum(*seconds_per_sequence(trial.run, sizes)), strict=True))
    fastest = min(sizes, key=seconds.__getitem__)
    return fastest if seconds[fastest] < _CPU_TIE * seconds[default] < math.inf else default


def seconds_per_sequence(
    run: Callable[[int], object], sizes: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The shortest measured time of each size, infinite for one that would exceed the time limit.

    Args:
        run: computes one micro-batch of the given size.
        sizes: ascending.
    """
    started = clock()
    run(sizes[0])
    expected = (clock() - started) / sizes[0]
    seconds = [math.inf] * len(sizes)
    for _ in range(_CPU_ROUNDS):
        for index, size in enumerate(sizes):
            before = clock()
            if before - started + expected * size > _CPU_SECONDS:
                continue
            run(size)
            seconds[index] = min(seconds[index], (clock() - before) / size)
    return seconds


class Trial:
    """Forward and backward passes of full sequences, outside DeepSpeed; nothing in the training changes.

    Args:
        make_model: makes another model like the engine's.
    """

    def __init__(
        self, engine: Engine, make_model: Callable[[], Objective], max_seq_length: int, masking: MaskingConfig
    ):
        self.max_seq_length = max_seq_length
        self._engine, self._make_model, self._masking, self._device = engine, make_model, masking, engine.device
        self._capacity = math.inf
        if self._device.type != "cpu":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self._device)
            free += torch.cuda.memory_reserved(self._device)
            self._capacity = MEMORY_SHARE * (free - engine.bucket_bytes)

    @cached_property
    def _model(self) -> Objective:
        """The twin, made at the first trial: if the size is known already, a CPU needs none."""
        return self._engine.twin(self._make_model)

    def run(self, size: int) -> None:
        """Take one micro-step with `size` sequences."""
        batch = full_micro_batch(size, self.max_seq_length, self._masking, self._model.masker).to(self._device)
        self._model.weigh(self._model(batch), batch.counts).backward()

    def fits(self, size: int) -> bool:
        """Whether a micro-step of `size` sequences stays within the memory it may fill."""
        on_gpu = self._device.type != "cpu"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            self.run(size)
            fitting = not on_gpu or torch.cuda.max_memory_allocated(self._device) <= self._capacity
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fitting = False
        if on_gpu:  # only here are the exception's frames gone and their memory free
            torch.cuda.empty_cache()
        return fitting


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, as PyTorch, cuBLAS or the CPU's allocator report it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def full_micro_batch(
    size: int, max_seq_length: int, masking: MaskingConfig, masker: type[Masker] = Masker
) -> MicroBatch:
    """Unpadded sequences, but with a padding mask, and with the most labelled tokens that the run will have."""
    masked = math.ceil(masker.largest_share(masking) * max_seq_length)
    positions = torch.arange(size)[:, None] * max_seq_length + torch.arange(masked)
    return MicroBatch(
        input_ids=torch.zeros(size, max_seq_length, dtype=torch.int64),
        attention_mask=torch.ones(size, max_seq_length, dtype=torch.bool),
        masked_positions=positions.flatten(),
        labels=torch.zeros(size * masked, dtype=torch.int64),
        tokens=size * max_seq_length,
        sequences=size,
        next_sentence_labels=torch.zeros(size, dtype=torch.int64),
    )


def user_cache() -> Path:
    """Where findings are kept for the user's other runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ds_roberta"


def _known_size(paths: Sequence[Path], key: str, limit: int) -> tuple[int | None, str]:
    """The size kept under `key` in the first file that has it, and the file."""
    for path in paths:
        finding = _findings(path).get(key)
        size = finding.get("micro_batch_size") if isinstance(finding, dict) else None
        if isinstance(size, int) and 1 <= size <= limit:
            return size, str(path)
    return None, ""


def _remember(path: Path, key: str, finding: dict[str, Any]) -> None:
    findings = _findings(path)
    if findings.get(key) != finding:
        write_json(path, {**findings, key: finding})


def _findings(path: Path) -> dict[str, Any]:
    """The content of a file of findings; empty if it is missing or damaged, so that sizes are found again."""
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
