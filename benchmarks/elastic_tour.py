"""Continue one pretraining on 2, 3, 1 and 4 processes, and compare its losses with those of an unbroken run on one.

    python -m benchmarks.elastic_tour

SIGUSR1 to one process ends each part of the tour; the same command continues on the next number of processes. AdamW and
Muon are tried, on a CPU, with a batch that 3 and 4 do not divide. Data and masks do not depend on how a step is divided
among processes; dropout does, as each process draws its own, so it is 0. Everything is fp32, Muon's Newton-Schulz too:
the runs take the CPU for one without bf16 instructions, since in bf16 it amplifies the rounding of sums (losses then
differ by up to 1e-3).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.fault_injection_targets import BATCHES, Ground, targets
from benchmarks.interrupted import run_to_its_end, running
from ds_roberta.command_line import ArgumentParser, positive, run_command
from ds_roberta.errors import UserError
from ds_roberta.files import read_json, write_json
from ds_roberta.process import STOPPED_EXIT_CODE
from ds_roberta.training.metrics import METRICS_NAME, read_metrics

PROCESSES = (2, 3, 1, 4)
CONFIGS = {"AdamW": "zero2.json", "Muon": "fast.json"}
TOLERANCE = 1e-5
SECONDS_BETWEEN_LOOKS = 0.02
WITHOUT_BF16 = """import runpy, sys, torch
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")"""


@dataclass(frozen=True)
class Tour:
    """The losses of a tour and of the unbroken run, by step; `first_steps` of the parts, with their processes."""

    first_steps: Mapping[int, int]
    losses: Mapping[int, float]
    unbroken: Mapping[int, float]

    def differences(self) -> list[float]:
        """By how much each step's loss differs; infinite for a step that only one of the runs has."""
        steps = sorted({*self.losses, *self.unbroken})
        missing = float("inf")
        return [abs(self.losses.get(step, missing) - self.unbroken.get(step, -missing)) for step in steps]

    def row(self, optimizer: str) -> str:
        parts = ", ".join(f"{processes} from step {first}" for processes, first in self.first_steps.items())
        differences = self.differences()
        lost = sum(not difference <= TOLERANCE for difference in differences)
        tried = len(differences)
        return f"| {optimizer} | {parts} | {tried} | {max(differences):.1e} | {tried - lost} | {lost} |"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=positive, default=40)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/elastic_tour.md")
    run_command(lambda: study(parser.parse_args()))


def study(options: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="elastic_tour-") as folder:
        known = targets(1)
        ground = Ground(Path(folder).resolve(), known, REPOSITORY / "ds_configs/zero2.json")
        ground.unbroken(known["preprocessing"])
        tours = {}
        for optimizer, name in CONFIGS.items():
            place = ground.copy(known["pretraining"], optimizer)
            content = read_json(REPOSITORY / "ds_configs" / name)
            write_json(place / "deepspeed.json", {**content, **BATCHES, "bf16": {"enabled": False}})
            tours[optimizer] = tour(known["pretraining"].words, place, options.max_steps, optimizer)
    publish(report(options, tours), options.output)
    return int(any(not max(each.differences()) <= TOLERANCE for each in tours.values()))


def tour(words: Sequence[str], folder: Path, max_steps: int, optimizer: str) -> Tour:
    """Make the unbroken run and the tour in a folder.

    Raises:
        UserError: a run failed, or did not stop when asked to.
    """
    words = [sys.executable, "-c", WITHOUT_BF16, *words[1:], "--max_steps", str(max_steps), "--train_batch_size", "26"]
    words += ["--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--output_dir"]
    print(f"{optimizer}: the unbroken run", flush=True)
    run_to_its_end([*words, "unbroken"], folder)
    first_steps: dict[int, int] = {}
    for part, processes in enumerate(PROCESSES, 1):
        first_steps[processes] = _last_step(folder / "tour") + 1
        print(f"{optimizer}: {processes} processes from step {first_steps[processes]}", flush=True)
        if part == len(PROCESSES):
            run_to_its_end([*words, "tour"], folder, processes)
            break
        with running([*words, "tour"], folder, processes) as run:
            while run.is_alive() and _last_step(folder / "tour") < part * max_steps // len(PROCESSES):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            run.processes[-1].send_signal(signal.SIGUSR1)
            codes = run.wait()
            if any(code != STOPPED_EXIT_CODE for code in codes):
                raise UserError(f"exit codes {codes} after SIGUSR1: … {run.last_words()}")
    return Tour(first_steps, _losses(folder / "tour"), _losses(folder / "unbroken"))


def _losses(output: Path) -> dict[int, float]:
    """The loss of each step so far, in nats."""
    if not (output / METRICS_NAME).exists():
        return {}
    rows, _ = read_metrics(output / METRICS_NAME)
    return {row["global_step"]: row["loss"] for row in rows if "loss" in row}


def _last_step(output: Path) -> int:
    return max(_losses(output), default=0)


def report(options: argparse.Namespace, tours: Mapping[str, Tour]) -> Iterator[str]:
    yield "# An elastic tour"
    yield ""
    turns = ", ".join(map(str, PROCESSES))
    yield f"`python -m benchmarks.elastic_tour --max_steps {options.max_steps}`: one run on"
    yield f"{turns} processes in turn, and an unbroken one on a single process, in fp32 and without dropout."
    yield f"Tried: steps; survived: those whose losses, in nats, differ by at most {TOLERANCE:g}."
    yield ""
    yield "| optimizer | processes | tried | largest difference | survived | lost |"
    yield "|---|---|---|---|---|---|"
    yield from (each.row(optimizer) for optimizer, each in tours.items())
    yield ""
    yield f"{cpu_model()}. {versions('torch', 'deepspeed')}"


if __name__ == "__main__":
    main()
