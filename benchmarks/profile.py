"""Show where a step's time goes: by stage, by operator, and the share in which training waits.

    python -m benchmarks.profile [--model base --max_seq_length 512]                   # on random data
    python -m benchmarks.profile --data_dir data/corpus --deepspeed_config ds_configs/zero2.json
    torchrun --nproc_per_node 2 -m benchmarks.profile                                  # or: deepspeed --module …

The run is the real one, `ds_roberta.training.run.pretrain`, in a temporary folder; its parts are wrapped from here.
Some steps are timed by stage. One more is taken under torch's profiler, separately because it would disturb the timing:
on a CPU its records force large copies into fresh memory. Rank 0 writes a Markdown page with the hardware, the versions
and the commit.
"""

from __future__ import annotations

import os

# As in launch/pretrain.py; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.throughput_case import write_data
from ds_roberta.command_line import ArgumentParser, run_command
from ds_roberta.config import PRESETS, IntervalConfig, PackingConfig
from ds_roberta.data.loader import MicroBatch, TrainLoader
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError
from ds_roberta.process import leave
from ds_roberta.training import run
from ds_roberta.training.checkpoint_writer import CheckpointWriter
from ds_roberta.training.compilation import compiled_graphs
from ds_roberta.training.device import init_distributed, on_gpu
from ds_roberta.training.engine import Engine
from ds_roberta.training.metrics import CONFIG_NAME, METRICS_NAME
from ds_roberta.training.settings import pretrain_options
from ds_roberta.training.trainer import Trainer

WAIT, FORWARD, BACKWARD, REDUCTION, OPTIMIZER, SAVE, REST = STAGES = (
    "waiting for data",
    "forward",
    "backward",
    "reduction",
    "optimizer",
    "save",
    "the rest",
)
STALLS = (WAIT, SAVE)
WARM_UP = 1
STEP_TOKENS, GPU_STEP_TOKENS = 8_192, 262_144


@dataclass(frozen=True)
class Times:
    """Seconds of the wall clock, and CPU-seconds of all threads of the process."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, number: float) -> Times:
        return Times(self.wall / number, self.cpu / number)


class StageClock:
    """Measures each stage's own time, without that of the stages within it. Time in no stage counts as the rest."""

    def __init__(self, now: Callable[[], Times]):
        self._now, self._open, self._since = now, [REST], now()
        self._times: dict[str, Times] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def take(self) -> dict[str, Times]:
        """Return the times since the last call."""
        self._lap()
        times, self._times = self._times, {}
        return times

    def _lap(self) -> None:
        now = self._now()
        name = self._open[-1]
        self._times[name] = self._times.get(name, Times()) + (now - self._since)
        self._since = now


def now() -> Times:
    """Wait until the device has finished its work, and return the time."""
    if on_gpu():
        torch.cuda.synchronize()
    return Times(time.perf_counter(), time.process_time())


class Probe:
    """Wraps the parts of a run while its `attached` block lasts.

    Attributes:
        steps: for each timed step, its times by stage.
        operators: the operators of the step after those, on rank 0.
    """

    def __init__(self, timed_steps: int, ranks: Ranks):
        self.steps: list[dict[str, Times]] = []
        self.operators: torch.profiler.profile | None = None
        self._timed_steps, self._ranks, self._clock = timed_steps, ranks, StageClock(now)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        stages: list[tuple[type, str, str]] = [
            (Engine, "_forward", FORWARD),
            (DeepSpeedEngine, "backward", BACKWARD),
            (DeepSpeedEngine, "allreduce_gradients", REDUCTION),
            (Engine, "step", OPTIMIZER),
            (CheckpointWriter, "save", SAVE),
            (CheckpointWriter, "poll", SAVE),
            (CheckpointWriter, "finish", SAVE),
        ]
        wraps: list[tuple[type, str, Callable[..., Any]]] = [
            (owner, name, functools.partial(self._timed, stage)) for owner, name, stage in stages
        ]
        wraps += [
            (Engine, "accumulation", self._accumulation),
            (TrainLoader, "steps", self._steps),
            (Trainer, "train_step", self._train_step),
        ]
        with contextlib.ExitStack() as patches:
            for owner, name, wrap in wraps:
                patches.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
            yield

    def _timed(self, stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._clock.stage(stage):
                return method(*arguments, **keywords)

        return call

    def _accumulation(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Gradients that are reduced once for all micro-steps are reduced at the end of the block."""

        @contextlib.contextmanager
        def accumulation(engine: Engine) -> Iterator[None]:
            with contextlib.ExitStack() as block:
                block.enter_context(method(engine))
                yield
                with self._clock.stage(REDUCTION):
                    block.close()

        return accumulation

    def _steps(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A step lasts from the request for its data to the request for the next step's."""

        def steps(*arguments: Any) -> Generator[list[MicroBatch], None, None]:
            with contextlib.closing(method(*arguments)) as inner:
                self._clock.take()
                for number in range(WARM_UP + self._timed_steps + 1):
                    with self._clock.stage(WAIT):
                        micro_batches = next(inner)
                    yield micro_batches
                    times = self._clock.take()
                    if WARM_UP <= number < WARM_UP + self._timed_steps:
                        self.steps.append(times)

        return steps

    def _train_step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(trainer: Trainer, *arguments: Any) -> Any:
            if trainer.state.global_step < WARM_UP + self._timed_steps or not self._ranks.is_main:
                return method(trainer, *arguments)
            with torch.profiler.profile() as self.operators:  # profiles the CPU, and CUDA if there is a GPU
                return method(trainer, *arguments)

        return train_step


def main(arguments: argparse.Namespace) -> int:
    ranks = init_distributed()
    length = arguments.max_seq_length or PRESETS[arguments.model].max_seq_length
    tokens = (GPU_STEP_TOKENS if on_gpu() else STEP_TOKENS) * ranks.world_size
    batch = arguments.train_batch_size or max(tokens // length, ranks.world_size)
    folder = Path(ranks.on_main(lambda: tempfile.mkdtemp(dir=arguments.folder)))
    try:
        ranks.on_main(lambda: prepare(arguments, folder, length, batch))
        steps = WARM_UP + arguments.steps + 1
        options = pretrain_options(
            deepspeed_config=folder / "deepspeed.json",
            data_dir=arguments.data_dir or folder / "data",
            output_dir=folder / "run",
            model=arguments.model,
            max_seq_length=length,
            packing=PackingConfig.format if arguments.data_dir else "contiguous",
            max_steps=steps,
            save_interval=steps // 2 + 1,  # one save, in the middle
            eval_interval=steps,
            eval_sequences=1,
            loss_spike="off",
            train_batch_size=batch,
        )
        probe = Probe(arguments.steps, ranks)
        # This process has joined the others already.
        with mock.patch.object(run, "init_distributed", return_value=ranks), probe.attached():
            code = run.pretrain(options)
        if ranks.is_main and code == 0:
            publish(lines(arguments, probe, options.output_dir, ranks), arguments.output)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return code


def prepare(arguments: argparse.Namespace, folder: Path, length: int, batch: int) -> None:
    """Write the run's DeepSpeed JSON into `folder`, and random data if the user gave none."""
    try:
        settings = json.loads(arguments.deepspeed_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --deepspeed_config {str(arguments.deepspeed_config)!r}: {error}") from error
    if arguments.micro_batch_size:
        settings["train_micro_batch_size_per_gpu"] = arguments.micro_batch_size
    (folder / "deepspeed.json").write_text(json.dumps(settings), encoding="utf-8")
    if arguments.data_dir is None:
        (folder / "data").mkdir()
        write_data(folder / "data", length, 2 * batch)


def mean_step(steps: Sequence[dict[str, Times]], save_interval: int) -> dict[str, Times]:
    """Return the times by stage of the mean step, in the order of `STAGES`.

    Args:
        steps: the timed steps, which include one save.
        save_interval: number of steps over which the time of a save is spread.
    """
    sums = {stage: sum((step.get(stage, Times()) for step in steps), Times()) for stage in STAGES}
    return {stage: sums[stage] / (save_interval if stage == SAVE else len(steps)) for stage in STAGES}


def shares(times: dict[str, Times]) -> dict[str, float]:
    """Return each stage's share of the wall clock time; the shares sum to one."""
    whole = sum(each.wall for each in times.values())
    return {stage: each.wall / whole for stage, each in times.items()}


def lines(arguments: argparse.Namespace, probe: Probe, output_dir: Path, ranks: Ranks) -> Iterator[str]:
    """Yield the lines of the report."""
    record = json.loads((output_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (output_dir / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    timed = [row for row in rows if "loss" in row and WARM_UP < row["global_step"] <= WARM_UP + len(probe.steps)]
    times = mean_step(probe.steps, arguments.save_interval)
    share = shares(times)
    whole = sum(times.values(), Times())
    model, plan, precision = record["run"]["model_name"], record["batches"][0], record["precision"]
    yield f"# Profile: where a step's time goes ({model}, {record['run']['packing']['max_seq_length']} tokens)"
    yield ""
    yield "| stage | wall | share | CPU |"
    yield "|---|---|---|---|"
    for stage in STAGES:
        yield f"| {stage} | {times[stage].wall:.4f} s | {share[stage]:.2%} | {times[stage].cpu:.4f} s |"
    yield f"| step | {whole.wall:.4f} s | {sum(share.values()):.2%} | {whole.cpu:.4f} s |"
    yield ""
    yield (
        f"**Stall share: {sum(share[stage] for stage in STALLS):.2%}** of a step ({WAIT} {share[WAIT]:.2%}, standing "
        f"still for a {SAVE} {share[SAVE]:.2%})."
    )
    yield ""
    mean = {name: sum(row[name] for row in timed) / len(timed) for name in ("tokens_per_second", "mfu")}
    yield (
        f"{mean['tokens_per_second']:,.0f} tokens/s, MFU {mean['mfu']:.1%} of a peak of "
        f"{record['peak']['flops_per_second'] / 1e12:,.3g} TFLOP/s ({record['peak']['source']}). A step is "
        f"{plan['train_batch_size']} sequences in micro-batches of {plan['micro_batch_size']}, {ranks.world_size} "
        f"process(es), {precision}, ZeRO stage {record['deepspeed']['zero_optimization']['stage']}, "
        f"{compiled_graphs()} graph(s) by torch.compile, "
        f"{'data of ' + arguments.data_dir.name if arguments.data_dir else 'full sequences of random ids'}."
    )
    yield ""
    yield (
        f"The mean of {len(probe.steps)} step(s) of rank 0 after {WARM_UP} of warm-up, without the profiler; a stage's "
        "own time, without the stages within it"
        f"{', after waiting for the GPU at its start and end, so that nothing overlaps' if on_gpu() else ''}. *CPU*: "
        "of all threads of the process, those of the loader and the checkpoint's writer among them. "
        f"*{SAVE.capitalize()}*: {times[SAVE].wall * arguments.save_interval:.3f} s in which the loop stood still for "
        f"one save, over {arguments.save_interval:,} steps. *{REDUCTION.capitalize()}*: the gradient's; what stage 3 "
        f"gathers is in the stages that wait for it. *{REST.capitalize()}*: the loop, metrics, agreement of processes."
    )
    yield ""
    assert probe.operators is not None
    yield from operator_table(operator_times(probe.operators), arguments.top)
    yield ""
    yield "One more step of rank 0 under torch's profiler, which slows small operators and fresh memory on a CPU."
    yield ""
    device = f"{torch.cuda.get_device_name()}, " if on_gpu() else ""
    yield (
        f"{device}{cpu_model()}, {torch.get_num_threads()} thread(s) a process, load average {os.getloadavg()[0]:.1f}. "
        f"{versions('torch', 'deepspeed')}"
    )


def operator_times(profile: torch.profiler.profile) -> dict[str, tuple[int, float]]:
    """Return each operator's number of calls and its own seconds: those of its kernels on a GPU, otherwise those of the
    CPU."""
    return {
        event.key: (event.count, (event.self_device_time_total if on_gpu() else event.self_cpu_time_total) / 1e6)
        for event in profile.key_averages()
        # Kernels have entries of their own in addition to those of their operators.
        if event.device_type == torch.autograd.DeviceType.CPU
    }


def operator_table(operators: dict[str, tuple[int, float]], top: int) -> Iterator[str]:
    """Yield a Markdown table of the `top` operators that take the most time, and of all others together."""
    ordered = sorted(operators.items(), key=lambda item: -item[1][1])
    whole = sum(seconds for _, seconds in operators.values())
    yield "| operator | calls | own time | share |"
    yield "|---|---|---|---|"
    others = ("others", (sum(calls for _, (calls, _) in ordered[top:]), sum(own for _, (_, own) in ordered[top:])))
    for name, (calls, seconds) in [*ordered[:top], others]:
        yield f"| {name} | {calls:,} | {seconds:.4f} s | {seconds / whole:.1%} |"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="base", choices=list(PRESETS))
    parser.add_argument("--max_seq_length", type=int, help="(default: the model's)")
    parser.add_argument("--data_dir", type=Path, help="folder made by 'preprocess shard' (default: random ids)")
    parser.add_argument("--deepspeed_config", type=Path, default=REPOSITORY / "ds_configs/zero1.json")
    parser.add_argument(
        "--train_batch_size", type=int, help="(default: 8,192 tokens a process on a CPU, 262,144 on a GPU)"
    )
    parser.add_argument("--micro_batch_size", type=int, help="(default: as the JSON says)")
    parser.add_argument("--steps", type=int, default=3, help="steps timed by stage (default: %(default)s)")
    parser.add_argument(
        "--save_interval",
        type=int,
        default=IntervalConfig.save_interval,
        help="steps over which the time of a save is spread (default: %(default)s)",
    )
    parser.add_argument("--top", type=int, default=15, help="number of operators to show (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the run's checkpoints go (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/profile.md")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()
    for name in ("steps", "save_interval", "top"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    return arguments


if __name__ == "__main__":
    parsed = parse_arguments()
    run_command(lambda: main(parsed), leave)
