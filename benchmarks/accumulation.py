"""What the engine adds to a micro-step, compared with a plain loop over the same model and micro-batches.

    python -m benchmarks.accumulation

Processes joined by gloo hold both, and take a step of each in turn. The plain loop does the least that gives the same
numbers: a backward pass per micro-step into fp32 sums, one all-reduce per step, torch's fused AdamW on fp32 weights.
Writes a Markdown table with the hardware, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.environment import REPOSITORY, cpu_model, publish, python_path, versions
from benchmarks.throughput_case import VOCABULARY
from benchmarks.throughput_contenders import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY
from ds_roberta.command_line import positive
from ds_roberta.config import PRESETS, MaskingConfig, model_config
from ds_roberta.data.loader import Counts, MicroBatch
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.process import leave

if TYPE_CHECKING:
    from ds_roberta.training.engine import Engine

STAGES = (1, 2, 3)
Step = Callable[[], tuple[float, float]]
"""A function that takes a step and returns the CPU-seconds of its micro-steps and of the whole step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=list(PRESETS))
    parser.add_argument("--max_seq_length", type=int, help="default: the model's")
    parser.add_argument("--micro_batch_tokens", type=positive, default=2_048)
    parser.add_argument("--micro_steps", type=positive, default=64, help="at least 2")
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/accumulation.md")
    arguments = parser.parse_args()
    if arguments.micro_steps < 2:
        parser.error("--micro_steps 1: give at least 2, as the last one also reduces the gradients")
    length = arguments.max_seq_length or PRESETS[arguments.model].max_seq_length
    if arguments.micro_batch_tokens < length:
        parser.error(
            f"--micro_batch_tokens {arguments.micro_batch_tokens} is less than a sequence's {length}: give more"
        )
    if "RANK" in os.environ:
        measure(arguments)
    publish(lines(arguments), arguments.output)


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    load = os.getloadavg()[0]
    yield "# Accumulation: what the engine adds to a micro-step"
    yield ""
    yield "| ZeRO stage | plain loop, micro-step | engine, micro-step | overhead | the whole step |"
    yield "|---|---|---|---|---|"
    for stage in STAGES:
        rounds = run_processes(stage, arguments)
        plain, engine = ([each[name] for each in rounds] for name in ("plain", "engine"))
        micro_steps = [mine[0] / theirs[0] - 1 for mine, theirs in zip(engine, plain, strict=True)]
        whole = [mine[1] / theirs[1] - 1 for mine, theirs in zip(engine, plain, strict=True)]
        yield (
            f"| {stage} | {milliseconds(plain, arguments)} | {milliseconds(engine, arguments)} "
            f"| {percent(micro_steps)} | {percent(whole)} |"
        )
    length = arguments.max_seq_length or PRESETS[arguments.model].max_seq_length
    yield ""
    yield (
        f"{arguments.model} at {length} tokens, micro-batches of {arguments.micro_batch_tokens} tokens, bf16, "
        f"{arguments.processes} processes of one thread, {arguments.micro_steps} micro-steps a step. CPU-seconds of "
        f"all processes; medians of {arguments.rounds} rounds (lowest to highest), in each of which both take a step. "
        "*The whole step*: with the reduction and the optimizer."
    )
    yield ""
    yield f"{cpu_model()}, load average {load:.1f} before. {versions('torch', 'deepspeed')}"


def milliseconds(rounds: list[tuple[float, float]], arguments: argparse.Namespace) -> str:
    return f"{statistics.median(each[0] for each in rounds) / arguments.micro_steps * 1e3:.1f} ms"


def percent(shares: list[float]) -> str:
    return f"{statistics.median(shares):+.1%} ({min(shares):+.1%} to {max(shares):+.1%})"


def run_processes(stage: int, arguments: argparse.Namespace) -> list[dict[str, tuple[float, float]]]:
    """Measure the rounds of a ZeRO stage in new processes."""
    with tempfile.NamedTemporaryFile() as results:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(arguments.processes), "-m", "benchmarks.accumulation"),
            *sys.argv[1:],
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ZERO_STAGE": str(stage),
            "RESULTS": results.name,
            "PYTHONPATH": python_path(),
        }
        subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
        return json.load(results)


def measure(arguments: argparse.Namespace) -> None:
    """Run one process's part: warm up, take the rounds, exit."""
    from ds_roberta.training.device import init_distributed, on_gpu
    from ds_roberta.training.engine import Engine

    ranks = init_distributed()
    stage = int(os.environ["ZERO_STAGE"])
    length = arguments.max_seq_length or PRESETS[arguments.model].max_seq_length
    config = model_config(arguments.model, VOCABULARY, length)
    torch.manual_seed(0)
    model = MaskedLM(config)
    plain_model = MaskedLM(config)
    settings = DeepSpeedConfig.read(REPOSITORY / f"ds_configs/zero{stage}.json", 1, LEARNING_RATE)
    engine = Engine(model, settings.resolved("bf16", on_gpu()), ranks, 0)
    batches = [random_micro_batch(length, arguments.micro_batch_tokens // length) for _ in range(arguments.micro_steps)]
    steps = {"plain": plain_loop(plain_model.bfloat16(), batches), "engine": engine_loop(engine, batches)}
    for step in steps.values():
        step()
    rounds = []
    for _ in range(arguments.rounds):
        taken = {}
        for name, step in steps.items():
            ranks.barrier()
            taken[name] = ranks.sum(*step())
        rounds.append(taken)
    if ranks.is_main:
        Path(os.environ["RESULTS"]).write_text(json.dumps(rounds), encoding="utf-8")
    leave(0)


def random_micro_batch(length: int, sequences: int) -> MicroBatch:
    tokens = sequences * length
    masked = int(tokens * MaskingConfig.mlm_probability)
    return MicroBatch(
        torch.randint(4, VOCABULARY, (sequences, length)),
        None,
        torch.randperm(tokens)[:masked].sort().values,
        torch.randint(4, VOCABULARY, (masked,)),
        tokens,
        sequences,
    )


def engine_loop(engine: Engine, batches: list[MicroBatch]) -> Step:
    counts = Counts.total([batch.counts for batch in batches], engine.ranks)

    def step() -> tuple[float, float]:
        began = time.process_time()
        with engine.accumulation():
            for number, batch in enumerate(batches):
                engine.forward_backward(batch, counts, 0, number, number == len(batches) - 1)
                if number == len(batches) - 2:
                    # At stage 1 the last micro-step includes the reduction.
                    micro_steps = (time.process_time() - began) * len(batches) / (len(batches) - 1)
        engine.step(LEARNING_RATE)
        return micro_steps, time.process_time() - began

    return step


def plain_loop(model: nn.Module, batches: list[MicroBatch]) -> Step:
    parameters: list[torch.Tensor] = list(model.parameters())
    weights: list[torch.Tensor] = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, fused=True)
    masked = sum(len(batch.labels) for batch in batches) * dist.get_world_size()

    def step() -> tuple[float, float]:
        began = time.process_time()
        for number, batch in enumerate(batches):
            (model(batch)["loss"] / masked).backward()
            if number == len(batches) - 2:
                micro_steps = (time.process_time() - began) * len(batches) / (len(batches) - 1)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for weight, gradient in zip(weights, flat.split(sizes), strict=True):
            weight.grad = gradient.view_as(weight)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)
        for parameter in parameters:
            parameter.grad = None
        return micro_steps, time.process_time() - began

    return step


if __name__ == "__main__":
    main()
