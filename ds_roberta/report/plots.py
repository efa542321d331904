"""The plots of a report: a metric over the steps, with a line for each run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_roberta.errors import UserError
from ds_roberta.report.runs import Run, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Metric:
    """A column of `metrics.jsonl` to show.

    Attributes:
        best: chooses the best of several values; None if no value is better than another.
        log: draw on a logarithmic axis if the values differ much.
        precision: the only one in which the metric is informative; None for all.
        of_some: only some objectives have it, so it is not reported as missing from a run.
        has_lines: draw the lines to compare it with, which count models give.
        over: the x axis: steps, or for `loss_by_position` positions in the sequence.
    """

    column: str
    title: str
    unit: str
    best: Callable[[Sequence[float]], float] | None = None
    log: bool = False
    percent: bool = False
    precision: str | None = None
    of_some: bool = False
    has_lines: bool = False
    over: str = "step"

    def of(self, run: Run) -> Series | None:
        """The run's values, or None if it has none."""
        if not self.applies_to(run):
            return None
        return run.loss_by_position if self.over == "position" else run.series(self.column)

    def applies_to(self, run: Run) -> bool:
        return self.precision is None or run.setting("precision") == self.precision

    def is_expected(self, run: Run) -> bool:
        return self.applies_to(run) and not self.of_some


METRICS = (
    Metric("loss", "Loss", "nats per labelled token", best=min),
    Metric("eval_loss", "Held-out loss", "nats per labelled token", best=min, has_lines=True),
    Metric("mlm_loss", "Loss of masked tokens from their own places", "nats per masked token", best=min, of_some=True),
    Metric("bow_loss", "Loss of masked tokens from the first token", "nats per masked token", best=min, of_some=True),
    Metric("nsp_loss", "Loss of next sentence prediction", "nats per pair", best=min, of_some=True),
    Metric("loss_by_position", "Held-out loss by position", "nats per masked token", over="position"),
    Metric("eval_detection_f1", "Replaced tokens found, held out", "F1", best=max, of_some=True),
    Metric("eval_nsp_accuracy", "Next sentence prediction, held out", "accuracy", best=max, percent=True, of_some=True),
    Metric("learning_rate", "Learning rate", "learning rate"),
    Metric("muon_lr", "Muon's learning rate", "learning rate", of_some=True),
    Metric("grad_norm", "Gradient norm", "gradient norm", log=True),
    Metric("loss_scale", "Loss scale", "loss scale", log=True, precision="fp16"),
    Metric("tokens_per_second", "Tokens per second", "tokens/s", best=max),
    Metric("mfu", "Model FLOPs utilisation", "share of the peak", best=max, percent=True),
    Metric("data_wait_share", "Waiting for data", "share of the step", percent=True),
    Metric("memory_gb", "Memory of the first process", "GB"),
)

# Okabe and Ito's colours, which colour-blind people can distinguish too; https://jfly.uni-koeln.de/color/
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
WIDTH_INCHES, HEIGHT_INCHES, LEGEND_ROW_INCHES = 5.2, 3.2, 0.22  # small, so that letters are legible on a phone
DOTS_PER_INCH = 160
MARKED_POINTS = 30
LOG_FROM_RATIO = 100  # below, a logarithmic axis has hardly a number at it
LONGEST_LABEL = 48
LINES = {"unigram_loss": ("Unigram line", (0, (6, 3))), "neighbour_loss": ("Neighbour line", (0, (2, 2)))}
"""The titles of the lines that count models give, and their dashes, by their columns."""
LINE_COLOUR = "#666666"


def draw(runs: Sequence[Run], metric: Metric) -> Figure:
    """A figure with a line for each run that has the metric; a run has the same colour in every figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise UserError("the report needs matplotlib: pip install 'ds_roberta[plot]'") from error
    shown = [(index, run, series) for index, run in enumerate(runs) if (series := metric.of(run))]
    references = _references([run for _, run, _ in shown]) if metric.has_lines else []
    height = HEIGHT_INCHES + LEGEND_ROW_INCHES * (len(shown) + len(references))
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for index, _, series in shown:
        axes.plot(
            series.steps,
            series.values,
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)],
            linewidth=1.4,
            marker="o" if len(series.steps) <= MARKED_POINTS else "",
            markersize=3.5,
            alpha=0.85,
        )
    for reference in references:
        axes.axhline(reference.loss, color=LINE_COLOUR, linestyle=LINES[reference.column][1], linewidth=1)
    axes.set(title=metric.title, xlabel="global_step" if metric.over == "step" else metric.over, ylabel=metric.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    values = [value for _, _, series in shown for value in series.values if math.isfinite(value)]
    if metric.log and 0 < LOG_FROM_RATIO * min(values) <= max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    if metric.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    labels = [*(run.name for _, run, _ in shown), *(reference.label for reference in references)]
    legend = figure.legend(axes.lines, list(map(_label, labels)), loc="outside lower left", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a run's name is a letter
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG image whose bytes depend only on its content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def describe(runs: Sequence[Run], metric: Metric) -> str:
    """A text description of the plot of `metric`, for readers who cannot see it."""
    sentences = [f"{metric.title.removesuffix(f' by {metric.over}')} by {metric.over}."]
    for run in runs:
        if series := metric.of(run):
            first, last = (f"{show(metric, series.values[i])} at {metric.over} {series.steps[i]}" for i in (0, -1))
            finite = [value for value in series.values if math.isfinite(value)]
            limits = f"between {show(metric, min(finite))} and {show(metric, max(finite))}"
            sentences.append(f"{run.name}: from {first} to {last}, {limits}.")
    if metric.has_lines:
        sentences += [f"{reference.label}." for reference in _references(runs)]
    return " ".join(sentences)


def best(metric: Metric, series: Series) -> tuple[int, float] | None:
    """The step and value of the metric's best finite value, the first of equals; None if no value is best."""
    if metric.best is None:
        return None
    value = metric.best([value for value in series.values if math.isfinite(value)])
    return series.steps[series.values.index(value)], value


def show(metric: Metric, value: float) -> str:
    """A value in the metric's form, to four digits."""
    if not math.isfinite(value):
        return "not finite"
    if metric.percent:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class _Reference:
    """A line to compare losses with: its column in `metrics.jsonl`, its loss, its label."""

    column: str
    loss: float
    label: str


def _references(runs: Sequence[Run]) -> list[_Reference]:
    """The runs' lines, those of equal loss once; a label names the runs unless all of them share it."""
    found: dict[tuple[str, float], list[str]] = {}
    for column in LINES:
        for run in runs:
            if series := run.series(column):
                found.setdefault((column, series.values[-1]), []).append(run.name)
    return [
        _Reference(
            column,
            loss,
            f"{LINES[column][0]} {loss:.3f}" + ("" if len(names) == len(runs) else f" of {', '.join(names)}"),
        )
        for (column, loss), names in found.items()
    ]


def _label(name: str) -> str:
    """The name for a legend, without its middle if it is long."""
    if len(name) <= LONGEST_LABEL:
        return name
    half = (LONGEST_LABEL - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
