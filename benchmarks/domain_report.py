"""The tables and the picture of `benchmarks.domain`, from what is finished."""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from benchmarks.domain_texts import is_large
from benchmarks.environment import cpu_model, versions
from benchmarks.studies import best_rate, command_of, difference, seconds_line
from ds_roberta.files import atomic_path

if TYPE_CHECKING:
    from benchmarks.domain import Case

KINDS = ("domain", "general")
TOKENIZERS = {"own": "the model's own tokenizer", "new": "the new tokenizer"}
HEAD = (
    "| | million tokens | CPU-seconds of steps | domain, nats per masked token | general, nats per masked token "
    "| domain, nats per byte | general, nats per byte | task, accuracy (its learning rate) |"
)
BESIDE = "| | compared with | domain, nats per byte | general, nats per byte | task, accuracy |"
Found = Mapping[str, Mapping[str, Any]]


def per_byte(options: argparse.Namespace, case: Case, kind: str, found: Found) -> dict[int, float]:
    """By seed, as far as they are finished."""
    return {seed: found[name]["per_byte"][kind] for seed in options.seeds if (name := case.losses(seed)) in found}


def accuracies(options: argparse.Namespace, case: Case, found: Found) -> tuple[str, dict[int, float]]:
    """The learning rate with the best median over the seeds, and the accuracy of each seed; none if none is known."""
    names = {seed: f"{case.run(seed)}-task" for seed in options.seeds}
    by_rate = {seed: found[name]["scores_by_rate"] for seed, name in names.items() if name in found}
    if not by_rate:
        return "", {}
    rates = next(iter(by_rate.values()))
    scores = {rate: {seed: each[rate][0] for seed, each in by_rate.items()} for rate in rates}
    rate = best_rate({rate: [*each.values()] for rate, each in scores.items()})
    return rate, scores[rate]


def table(options: argparse.Namespace, cases: Sequence[Case], found: Found) -> Iterator[str]:
    yield HEAD
    yield f"|---|{'---|' * (HEAD.count('|') - 2)}"
    for case in cases:
        runs = [found[name] for name in map(case.run, options.seeds) if name in found]
        evaluated = [found[name]["per_token"] for name in map(case.losses, options.seeds) if name in found]
        rate, scores = accuracies(options, case, found)
        cells = [
            f"{statistics.fmean(run['tokens'] for run in runs) / 1e6:.2f}" if runs else "",
            f"{statistics.fmean(run['step_seconds'] for run in runs):,.0f}" if runs else "",
            *(spread([each[kind]["loss"] for each in evaluated if kind in each]) for kind in KINDS),
            *(spread([*per_byte(options, case, kind, found).values()]) for kind in KINDS),
            f"{spread([*scores.values()])} ({rate})" if scores else "",
        ]
        yield f"| {case.label} | {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """The mean, and the seeds' lowest and highest values if they differ."""
    if not values:
        return ""
    lowest, highest = f"{min(values):.3f}", f"{max(values):.3f}"
    return f"{statistics.fmean(values):.3f}" + ("" if lowest == highest else f" [{lowest}, {highest}]")


def pairs_of(cases: Sequence[Case]) -> Iterator[tuple[Case, Case]]:
    """Rows that are held against each other: all against the model as it was, then both tokenizers with each factor,
    then continued against from scratch."""
    before, *continued, scratch = cases
    yield from ((case, before) for case in (*continued, scratch))
    own, new = continued[::2], continued[1::2]
    yield from zip(new, own, strict=True)
    yield from ((case, scratch) for case in continued)


def comparisons(options: argparse.Namespace, cases: Sequence[Case], found: Found) -> Iterator[str]:
    yield BESIDE
    yield "|---|---|---|---|---|"
    for case, base in pairs_of(cases):
        columns = [tuple(per_byte(options, each, kind, found) for each in (case, base)) for kind in KINDS]
        columns.append(tuple(accuracies(options, each, found)[1] for each in (case, base)))
        cells = [difference(*both) for both in columns]
        if any(cells):
            yield f"| {case.label} | {base.label} | {' | '.join(cells)} |"


def inputs_by_name(inputs: Sequence[str]) -> list[str]:
    """`[NAME=]PATH` each, without the machine's folders."""
    return [re.sub("[^=]*/", "", each) for each in inputs]


def report(options: argparse.Namespace, cases: Sequence[Case], found: Found) -> list[str]:
    commits = sorted({part["commit"] for part in found.values()})
    inputs = " ".join(inputs_by_name(options.input))
    command = command_of("benchmarks.domain", options, input=inputs)
    return [
        "# Continuing on a domain's text",
        "",
        f"{cpu_model()}, one thread. {versions('torch', 'deepspeed', 'transformers')} The parts were measured at "
        f"{', '.join(commits) or 'none'}.",
        "",
        f"`{command}`: each run had {options.max_minutes:g} CPU-minutes. The module's docstring says what is "
        "compared, and how.",
        "",
        *_texts(found),
        *table(options, cases, found),
        "",
        f"Mean and, in brackets, lowest and highest of those seeds of {', '.join(map(str, options.seeds))} that are "
        "finished. Lower losses are better. Nats per masked token compare rows with the same tokenizer only. "
        "Mean differences over the seeds of both, and whether the seeds' values lie among each other:",
        "",
        *comparisons(options, cases, found),
        "",
        _seconds(found),
    ]


def _texts(found: Found) -> Iterator[str]:
    if "texts" not in found:
        return
    texts = found["texts"]
    sizes = "; ".join(
        f"{tokens / 1e6:.2f} million tokens with {TOKENIZERS[name]} ({texts['vocab_size'][name]:,} ids)"
        for name, tokens in texts["tokens"].items()
    )
    documents = " and ".join(f"{count:,} {split}" for split, count in texts["documents"].items())
    passages = " and ".join(f"{count:,} {kind}" for kind, count in texts["passages"].items())
    sources = {source: counts["validation"] for source, counts in texts["task"].items() if is_large(counts)}
    share = max(sources.values()) / sum(sources.values())
    copies = " and ".join(f"{count:,}" for count in texts["near_copies"].values())
    model = "{num_hidden_layers} layers of width {hidden_size}".format(**texts["model"])
    yield (
        f"The model has {model}. The domain has {documents} documents: {sizes}. Nats per byte are of {passages} "
        f"passages; {copies} near copies of training documents were left out before these were found. The task has "
        f"{len(sources)} sources, and an accuracy of {share:.3f} if the answer is always the most frequent:"
    )
    yield ""
    columns = list(next(iter(texts["task"].values())))
    yield f"| source | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for source, counts in texts["task"].items():
        label = source if source in sources else f"{source} (left out)"
        yield f"| {label} | {' | '.join(f'{count:,}' for count in counts.values())} |"
    yield ""


def _seconds(found: Found) -> str:
    seconds: Counter[str] = Counter()
    for name, part in found.items():
        kind = name.rpartition("-")[2]
        seconds[kind if kind in ("texts", "losses", "task") else "training"] += part["seconds"]
    return seconds_line(seconds)


def picture(options: argparse.Namespace, cases: Sequence[Case], found: Found, output: Path) -> None:
    """Draw what is gained and what is forgotten: a point for each seed, the domain's loss over the general text's."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot(xlabel="general text, nats per byte", ylabel="domain, nats per byte")
    for number, case in enumerate(cases):
        domain, general = ([*per_byte(options, case, kind, found).values()] for kind in KINDS)
        if domain:
            axes.plot(general, domain, "*" if case.name == "before" else "o", color=f"C{number}", label=case.label)
    if axes.lines:
        axes.legend()
        with atomic_path(output) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
