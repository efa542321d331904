"""The table and the picture of `benchmarks.time_to_loss`, from the curves that are finished."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.environment import cpu_model, versions
from ds_roberta.data.shards import Corpus
from ds_roberta.files import atomic_path


class Point(NamedTuple):
    seconds: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Curve:
    """What a run gave: its points, the losses by counting alone (none from the Trainer), and the commit it ran at."""

    points: list[Point]
    lines: dict[str, float]
    commit: str


def report(options: argparse.Namespace, rows: dict[str, list[Curve | None]]) -> list[str]:
    *_, (longest,) = rows.values()
    head = "| | CPU-seconds | million tokens | held-out loss, by seed | the Trainer's time to the worst of these | "
    table = [f"{head}time to the Trainer's last loss |", "|---|---|---|---|---|---|"]
    for name, curves in rows.items():
        there = [curve.points for curve in curves if curve]
        losses = ", ".join(f"{curve.points[-1].loss:.3f}" if curve else "missing" for curve in curves)
        if not there:
            table.append(f"| {name} | | | {losses} | | |")
            continue
        seconds = statistics.fmean(points[-1].seconds for points in there)
        tokens = statistics.fmean(points[-1].tokens for points in there)
        compared = ["", ""]
        if longest and name.startswith("ours"):
            compared = list(against(there, seconds, longest.points))
        table.append(f"| {name} | {seconds:,.0f} | {tokens / 1e6:.1f} | {losses} | {' | '.join(compared)} |")
    found = [curve for curves in rows.values() for curve in curves if curve]
    vocabulary = Corpus.open(options.data_dir).manifest.tokenizer.vocab_size
    lines = next((curve.lines for curve in found if curve.lines), None)
    counted = " The held-out loss is {unigram_loss:.3f} from the frequencies of tokens and {neighbour_loss:.3f} from "
    counted = (counted + "counts of neighbours.").format(**lines) if lines else ""
    return [
        "# Held-out loss over CPU time",
        "",
        f"{cpu_model()}, one thread. {versions('torch', 'deepspeed', 'transformers')} The curves were measured at "
        f"{', '.join(sorted({curve.commit for curve in found})) or 'none'}.",
        "",
        f"{options.model} on {options.data_dir.name}, {vocabulary:,} ids, {options.max_seq_length} tokens.{counted} "
        "CPU-seconds of optimizer steps. Seconds and tokens are means over the seeds; *times ours* is by that mean. A "
        "loss is reached at the first evaluation that shows it. All curves are in the picture beside this table.",
        "",
        *table,
    ]


def against(ours: Sequence[Sequence[Point]], seconds: float, longest: Sequence[Point]) -> Iterator[str]:
    """The Trainer's time to the worst of our last losses, and our slowest seed's to the Trainer's last loss.

    Args:
        seconds: what our seeds took, the mean.
    """

    def reached(points: Sequence[Point], loss: float) -> float:
        return next((point.seconds for point in points if point.loss <= loss), math.inf)

    theirs, last = reached(longest, max(points[-1].loss for points in ours)), longest[-1]
    yield (
        f"{theirs:,.0f} s, {theirs / seconds:.1f} times ours" if theirs < math.inf else
        f"not in {last.seconds:,.0f} s, {last.seconds / seconds:.1f} times ours"
    )  # fmt: skip
    sooner = max(reached(points, last.loss) for points in ours)
    yield f"{sooner:,.0f} s of its {last.seconds:,.0f}" if sooner < math.inf else f"not in {seconds:,.0f} s"


def plot(rows: Mapping[str, Sequence[Curve | None]], output: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot(
        xlabel="CPU-seconds of optimizer steps", ylabel="held-out loss, nats per masked token"
    )
    lines: dict[str, float] = {}
    for number, (name, curves) in enumerate(rows.items()):
        label = name.replace("`", "")
        for curve in filter(None, curves):
            axes.plot([p.seconds for p in curve.points], [p.loss for p in curve.points], f"C{number}", label=label)
            lines, label = lines or curve.lines, "_"  # matplotlib leaves such a label out of the legend
    for name, loss in lines.items():
        axes.axhline(loss, color="gray", linestyle="--", linewidth=1)
        label, place = name.replace("_loss", " line"), (0.99, loss)
        axes.annotate(label, place, xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    axes.legend()
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
