"""Compare our trainer with its peers on the same model, data, batch, threads and allocator, in tokens per second.

    python -m benchmarks.throughput                            # on random ids
    python -m benchmarks.throughput --data_dir data/corpus     # real text with its padding, which is not counted

Every contender runs in its own process (`benchmarks.throughput_contenders`). On a CPU they come in pairs, in the order
given: the two of a pair take turns in each round, and the next pair follows; on a GPU they come one by one. After each
round the Markdown table so far is written, with the hardware, the versions and the commit. Needs `accelerate` for
transformers' Trainer and a C++ compiler for torch.compile; a row that lacks one says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import REPOSITORY, cpu_model, python_path, versions
from benchmarks.throughput_case import Case, write_data, write_rows
from benchmarks.throughput_contenders import CONTENDERS, PEAK, as_json
from ds_roberta.config import PRESETS, SPECIAL_TOKENS_PER_SEQUENCE, MaskingConfig, PackingConfig
from ds_roberta.data.manifest import TRAIN_SPLIT
from ds_roberta.data.packing import build_index
from ds_roberta.data.shards import Corpus
from ds_roberta.files import write_text
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.peak import data_sheet_rate

MICRO_BATCH_TOKENS = {"nano": 4_096, "tiny": 2_048, "small": 2_048, "base": 2_048, "large": 1_024}
"""On a CPU: few enough for two peers to fit into 24 GB, and for the slowest to take less than a minute per step."""
GPU_MICRO_BATCH_TOKENS = 16_384
GPU_STEPS = 20
"""Enough for a round on a GPU to take seconds."""
SEQUENCES, ROWS = 512, 8_192  # at least, of random ids; at most, of a user's text for peers
OURS = "ours-bf16"
DEFAULT_CONTENDERS = [
    name for name in CONTENDERS if "eager" not in name and (not name.startswith("ours") or name in (OURS, "ours-fp32"))
]


@dataclass(frozen=True)
class Measured:
    """The cost of some steps. `seconds` is the device's time: of all threads on CPUs, between events on a GPU.

    `graphs` is the number of graphs that torch.compile had made by then.
    """

    tokens: int
    seconds: float
    wall: float
    peak_bytes: int
    graphs: int


@dataclass(frozen=True)
class Outcome:
    """A contender's rounds, or the reason why it has none."""

    name: str
    rounds: tuple[Measured, ...] = ()
    unavailable: str = ""


class Contender:
    """A process that trains a given number of steps."""

    def __init__(self, name: str, case: Case, threads: int):
        self.name, self.unavailable = name, ""
        self._log = Path(case.folder) / f"{name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": f"{case.folder}/inductor",
            "PYTHONPATH": python_path(),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.throughput_contenders", name, as_json(case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def take(self, steps: int) -> dict[str, Any]:
        """Order a number of steps, and return the process's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def warm_up(self) -> None:
        """Take the first step, which creates the optimizer's states and compiles."""
        self.unavailable = self.take(1).get("unavailable", "")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        type=model_size,
        default=["tiny", "small", "base"],
        help=f"{', '.join(PRESETS)}, or LAYERSxHIDDENxHEADS such as 8x384x6",
    )
    parser.add_argument("--max_seq_length", nargs="+", type=int, help="length of each model (default: the presets')")
    parser.add_argument("--micro_batch_tokens", type=int, help="of all contenders (default: by the model)")
    parser.add_argument("--micro_steps", type=int, default=2, help="micro-steps per step (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=GPU_STEPS if torch.cuda.is_available() else 1,
        help="steps timed in each round (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", default=DEFAULT_CONTENDERS, choices=list(CONTENDERS))
    parser.add_argument("--data_dir", type=Path, help="made by 'preprocess shard' (default: full rows of random ids)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/throughput.md")
    arguments = parser.parse_args()
    lengths = arguments.max_seq_length or [
        PRESETS[model].max_seq_length for model in arguments.model if model in PRESETS
    ]
    if len(lengths) != len(arguments.model):
        parser.error(f"--max_seq_length needs {len(arguments.model)} values, one for each --model")
    loads, report = [os.getloadavg()[0]], ""
    peaks: list[float] = []
    tables: list[str] = []
    for model, length in zip(arguments.model, lengths, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            tokens = arguments.micro_batch_tokens
            if tokens is None:
                tokens = GPU_MICRO_BATCH_TOKENS if torch.cuda.is_available() else MICRO_BATCH_TOKENS.get(model, 2_048)
            case = prepare(model, length, max(1, tokens // length), arguments, Path(folder))
            flops = MaskedLM.flops_per_token(case.config, length, masked_share(case))
            for outcomes, peak in measure(case, arguments):
                loads.append(os.getloadavg()[0])
                of_model = section(case, outcomes, flops, peak)
                # After each round: a run takes minutes, and may be interrupted.
                report = "\n".join(lines(arguments, [*tables, *of_model], [*peaks, peak], loads)) + "\n"
                write_text(arguments.output, report)
        tables += of_model
        peaks.append(peak)
    print(report)


def prepare(model: str, length: int, micro_batch_size: int, arguments: argparse.Namespace, folder: Path) -> Case:
    """Make the case that all contenders train; write random data into `folder`, or index the user's data."""
    data, rows = arguments.data_dir or folder / "data", ROWS
    case = Case(model, length, micro_batch_size, arguments.micro_steps, str(folder), str(data))
    if arguments.data_dir is None:
        rows = max(SEQUENCES, 4 * case.train_batch_size)
        data.mkdir()
        write_data(data, length, rows)
    else:
        corpus = Corpus.open(data)
        case = replace(case, packing=PackingConfig.format, vocab_size=corpus.manifest.tokenizer.vocab_size)
        build_index(corpus, TRAIN_SPLIT, PackingConfig(length, case.packing))
    return replace(case, filled=write_rows(case, rows))


def masked_share(case: Case) -> float:
    """Return the share of the tokens that are masked."""
    return MaskingConfig.mlm_probability * (1 - SPECIAL_TOKENS_PER_SEQUENCE / (case.max_seq_length * case.filled))


def section(case: Case, outcomes: Sequence[Outcome], flops: float, peak: float) -> list[str]:
    """Yield a model's part of the report."""
    what = "full sequences of random ids"
    if case.packing != "contiguous":
        what = f"text of {Path(case.data).name}: {case.filled:.1%} of the places hold tokens, the rest is padding"
    return [
        f"## {case.model}, {case.max_seq_length} tokens",
        "",
        f"A step is {case.micro_batch_size} sequences x {case.micro_steps} micro-steps, {what}; a vocabulary of "
        f"{case.vocab_size:,}, {flops / 1e6:,.0f} MFLOP of useful work a token.",
        "",
        *table(outcomes, flops, peak, data_sheet()),
        "",
    ]


def model_size(text: str) -> str:
    """Check a preset's name or a size, for argparse."""
    if text in PRESETS:
        return text
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if size is None or int(size[2]) % int(size[3]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(PRESETS)}, and not LAYERSxHIDDENxHEADS with HEADS dividing HIDDEN"
        )
    return text


def lines(
    arguments: argparse.Namespace, tables: Sequence[str], peaks: Sequence[float], loads: Sequence[float]
) -> Iterator[str]:
    """Yield the lines of the report.

    Args:
        peaks: FLOP/s of the device, measured along with each table.
        loads: load averages before and after each table was measured.
    """
    on_gpu = torch.cuda.is_available()
    second = "second of the GPU" if on_gpu else "CPU-second"
    yield "# Throughput: ds_roberta and its peers"
    yield ""
    yield from tables
    yield (
        f"Medians of {arguments.rounds} rounds of {arguments.steps} step(s) after one of warm-up, with the lowest and "
        f"highest; contenders come {'one by one' if on_gpu else 'in pairs, which take turns'}. *Device*: tokens per "
        f"{second}{'' if on_gpu else ', all threads'}. *Useful*: the work of the model as `flops_per_token` counts it, "
        f"the vocabulary at masked tokens only, whatever else a contender computes. *Utilisation*: its share of "
        f"the largest rate of bf16 matrix products measured in the same run "
        f"({' and '.join(f'{peak / 1e9:,.0f}' for peak in peaks)} GFLOP/s), for fp32 too. *Memory*: the highest "
        f"{'allocated on the GPU' if on_gpu else 'resident set of the process'}. *Graphs*: those of torch.compile."
        + (f" *MFU*: the share of the {rate / 1e12:,.0f} TFLOP/s of the data sheet." if (rate := data_sheet()) else "")
    )
    yield ""
    yield (
        "All: RobertaForMaskedLM's architecture, dropout 0.1, 15% masked, micro-batches of the same size, AdamW, no "
        "clipping, glibc's malloc set to keep freed memory. Padding is never counted as tokens."
    )
    yield ""
    device = f"{torch.cuda.get_device_name()}, " if on_gpu else ""
    yield (
        f"{device}{cpu_model()}, {arguments.threads} thread{'s' if arguments.threads > 1 else ''} each, load average "
        f"{' to '.join(f'{load:.1f}' for load in (min(loads), max(loads)))}. "
        f"{versions('torch', 'transformers', 'accelerate', 'datasets', 'deepspeed')}"
    )


def data_sheet() -> float | None:
    """Return the GPU's peak by its data sheet, if there is a GPU and it is known."""
    return data_sheet_rate(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def alive() -> int:
    """Return how many contenders are alive at a time; on a CPU they take turns, so that they meet the same noise."""
    return 1 if torch.cuda.is_available() else 2


def measure(case: Case, arguments: argparse.Namespace) -> Iterator[tuple[list[Outcome], float]]:
    """After each round, yield all contenders' rounds so far and the device's peak in FLOP/s.

    They would not all fit into memory at once, so they come in groups, each with a process that measures the peak.
    """
    outcomes: list[Outcome] = []
    peaks = []
    for first in range(0, len(arguments.contenders), alive()):
        names = [*arguments.contenders[first : first + alive()], PEAK]
        processes = [Contender(name, case, arguments.threads) for name in names]
        *trainers, peak = processes
        try:
            with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // arguments.threads)) as side_by_side:
                list(side_by_side.map(Contender.warm_up, processes))
            rounds: dict[str, list[Measured]] = {trainer.name: [] for trainer in trainers}
            for _ in range(arguments.rounds):
                peaks.append(peak.take(1)["peak_flops"])
                for trainer in trainers:
                    if not trainer.unavailable:
                        rounds[trainer.name].append(Measured(**trainer.take(arguments.steps)))
                        print(case.model, trainer.name, rounds[trainer.name][-1], file=sys.stderr, flush=True)
                of_group = [Outcome(each.name, tuple(rounds[each.name]), each.unavailable) for each in trainers]
                yield [*outcomes, *of_group], max(peaks)
        finally:
            for process in processes:
                process.close()
        outcomes += of_group


def table(
    outcomes: Sequence[Outcome], flops: float, peak_flops: float, data_sheet_flops: float | None = None
) -> Iterator[str]:
    """Yield a Markdown table, for `flops` per token and a device with `peak_flops` per second.

    `data_sheet_flops` is the device's peak by its data sheet, if that is known. The last column says how many times as
    many tokens our trainer processes in bf16.
    """
    rates = {
        outcome.name: [each.tokens / each.seconds for each in outcome.rounds] for outcome in outcomes if outcome.rounds
    }
    columns = ["trainer", "precision", "tokens/s, device", "tokens/s, wall", "useful GFLOP/s", "utilisation"]
    columns += [*(["MFU"] if data_sheet_flops else []), "memory", "graphs", "ours in bf16 is"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for outcome in outcomes:
        description, precision, _ = CONTENDERS[outcome.name]
        if outcome.name not in rates:
            cells = [description, precision, outcome.unavailable]
            yield f"| {' | '.join(cells + [''] * (len(columns) - len(cells)))} |"
            continue
        rate = statistics.median(rates[outcome.name])
        wall = statistics.median(each.tokens / each.wall for each in outcome.rounds)
        memory, graphs = max(each.peak_bytes for each in outcome.rounds), outcome.rounds[-1].graphs
        compared = ""
        if OURS in rates and outcome.name != OURS:
            compared = f"{statistics.median(rates[OURS]) / rate:.2f}x"
        cells = [
            description,
            precision,
            f"{rate:,.0f} ({min(rates[outcome.name]):,.0f} to {max(rates[outcome.name]):,.0f})",
            f"{wall:,.0f}",
            f"{rate * flops / 1e9:,.1f}",
            *(f"{rate * flops / peak:.1%}" for peak in (peak_flops, data_sheet_flops) if peak),
            f"{memory / 1e9:.1f} GB",
            str(graphs),
            compared,
        ]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
