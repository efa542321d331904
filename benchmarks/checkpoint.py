"""What a checkpoint costs training: how long the loop stands still, and how much slower steps are during the save.

    python -m benchmarks.checkpoint

The same process saves in two ways: it waits for the save, as if there were no thread, or it takes steps until the save
is complete. Writes a Markdown table with the hardware, the versions and the commit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; the second core is left to the writer

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.accumulation import random_micro_batch
from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.loader import example_corpus
from benchmarks.throughput_case import VOCABULARY
from ds_roberta.config import PRESETS, IntervalConfig, model_config
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention
from ds_roberta.training.device import choose_precision, init_distributed, on_gpu
from ds_roberta.training.engine import Engine

SEQUENCES = 2


@dataclass(frozen=True)
class Costs:
    """Seconds of one save; `slower` is how much longer the steps taken during the save lasted than other steps."""

    waited: float
    stalled: float
    slower: float
    written: float
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "base"], choices=list(PRESETS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/checkpoint.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        publish(lines(arguments.models, arguments.repetitions, Path(folder)), arguments.output)


def lines(models: list[str], repetitions: int, folder: Path) -> Iterator[str]:
    """Yield the lines of the report."""
    ranks = init_distributed()
    tokenizer = example_corpus(folder) / TOKENIZER_FOLDER
    interval = IntervalConfig.save_interval
    yield "# Checkpoints: what a save costs training"
    yield ""
    yield "| model | state of the process | waited for | loop stands still | steps meanwhile, in all | writing | step |"
    yield "|---|---|---|---|---|---|---|"
    shares = []
    for name in models:
        config = DeepSpeedConfig.read(REPOSITORY / "ds_configs/zero2.json")
        precision = choose_precision(config)
        length = PRESETS[name].max_seq_length
        engine = Engine(
            MaskedLM(model_config(name, VOCABULARY, length)), config.resolved(precision, on_gpu()), ranks, 0
        )
        step = step_of(engine, length)
        steps = [timed(step) for _ in range(5)]
        seconds = statistics.median(steps)
        costs = [measure(engine, step, seconds, tokenizer, folder / "run") for _ in range(repetitions)]
        waited, stalled, slower, written = (
            statistics.median(getattr(cost, field) for cost in costs)
            for field in ("waited", "stalled", "slower", "written")
        )
        yield (
            f"| {name} | {costs[0].bytes / 1e6:,.0f} MB | {waited:.2f} s | {stalled:.2f} s | {slower:+.2f} s | "
            f"{written:.2f} s | {seconds:.2f} s ({min(steps):.2f} to {max(steps):.2f}) |"
        )
        shares.append(
            f"{name} {waited / (interval * seconds):.3%} waited for, {stalled / (interval * seconds):.3%} in the loop"
        )
    yield ""
    yield (
        f"Medians of {repetitions} saves of each kind, in turn in one process. *Waited for*: from the start of the "
        "save until it is complete, without training meanwhile. *Loop stands still*: the copy into host memory and the "
        "completion of a save written during training. *Steps meanwhile*: how much longer these steps took "
        "than as many others. *Writing*: serialising, syncing and checksums, with nothing else running."
    )
    yield ""
    yield (
        f"A step here is {SEQUENCES} sequences of the model's length, far fewer than the recipe's 8,192; even so, of "
        f"the time between two saves at the default {interval:,} steps a save takes: {'; '.join(shares)}."
    )
    yield ""
    yield (
        f"{cpu_model()}, {torch.get_num_threads()} thread, load average {os.getloadavg()[0]:.1f}, one process, "
        f"{precision}, ZeRO stage {engine.zero_stage}. {versions('torch', 'deepspeed', 'safetensors')}"
    )


def step_of(engine: Engine, length: int) -> Callable[[], None]:
    """Return a function that takes one training step on `SEQUENCES` random sequences."""
    micro_batch = random_micro_batch(length, SEQUENCES)

    def step() -> None:
        with engine.accumulation():
            engine.forward_backward(micro_batch, micro_batch.counts, 0, 0, last=True)
        engine.step(1e-5)

    return step


def measure(engine: Engine, step: Callable[[], None], step_seconds: float, tokenizer: Path, folder: Path) -> Costs:
    """Measure one save that the loop waits for, then one during which it takes steps."""
    with CheckpointWriter(engine, tokenizer, folder, Retention(1), lambda _: None) as writer:
        copied = timed(lambda: writer.save(TrainState({}, 1)))
        written = timed(writer.finish)
        stalled = timed(lambda: writer.save(TrainState({}, 2)))
        slower = 0.0
        while not (folder / "global_step2").exists():
            slower += timed(step) - step_seconds
            stalled += timed(writer.poll)
    (path,) = folder.glob("global_step*")  # the first was removed
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return Costs(copied + written, stalled, slower, written, size)


def timed(function: Callable[[], object]) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
