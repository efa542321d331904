"""The table and the picture of `benchmarks.evening`, from the parts that are finished, and what is kept of the run."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, cpu_model, versions
from benchmarks.evening_evaluation import EVERYTHING
from benchmarks.evening_texts import PAIRS
from benchmarks.studies import command_of, execute, is_above, seconds_line
from benchmarks.time_to_loss_report import Curve, Point, plot
from ds_roberta.data.shards import Corpus
from ds_roberta.files import read_json, write_text
from ds_roberta.model.export import MODEL_CARD
from ds_roberta.training.metrics import CONFIG_NAME, METRICS_NAME, read_metrics

NAMES = {"ours": "ours", "trainer": "the Trainer", "untrained": "untrained"}
OTHERS = ("trainer", "untrained")
NATS, PAIRS_ACCURACY, SST2_ACCURACY = 0.8, 0.58, 0.78
"""The bars, as `benchmarks.evening` says."""
STEPS_OF_A_ROW = 100
"""Of the steps in the kept metrics, one in so many."""
Found = Mapping[str, Mapping[str, Any]]


def keep_record(options: argparse.Namespace, lock: int) -> dict[str, Any]:
    """Copy what is worth keeping from the run's folder: settings, some rows of the metrics, the card, plots."""
    run, record = (options.results / read_json(options.results / "ours.json")["hf"]).parent, options.results / "record"
    record.mkdir(exist_ok=True)
    settings = (run / CONFIG_NAME).read_text(encoding="utf-8")
    for folder in (options.results, options.data_dir.parent):  # where they were on this machine says nothing
        settings = settings.replace(f"{folder}/", "")
    write_text(record / CONFIG_NAME, settings)
    shutil.copyfile(run / "hf" / MODEL_CARD, record / "model_card.md")
    rows, _ = read_metrics(run / METRICS_NAME)
    few = [row for row in rows if "eval_loss" in row or row["global_step"] % STEPS_OF_A_ROW == 0]
    write_text(record / METRICS_NAME, "".join(json.dumps(row) + "\n" for row in few))
    page = run / "report.html"
    execute([sys.executable, str(REPOSITORY / "launch/report.py"), str(run), "--output", str(page)], lock)
    for plot_file in sorted((page.parent / f"{page.stem}_plots").glob("*.png")):
        shutil.copyfile(plot_file, record / plot_file.name)
    return {"files": sorted(path.name for path in record.iterdir())}


def picture(found: Found, output: Path) -> None:
    """Draw the held-out loss over CPU time of the models that were trained."""
    curves = {
        NAMES[name]: [Curve([Point(*point) for point in found[name]["points"]], found[name]["lines"], "")]
        for name in ("ours", "trainer")
        if name in found
    }
    if curves:
        plot(curves, output)


def report(options: argparse.Namespace, tasks: list[str], found: Found) -> list[str]:
    corpus = Corpus.open(options.data_dir)
    sources = [EVERYTHING, *corpus.manifest.sources("validation")]
    commits = sorted({part["commit"] for part in found.values()})
    stretches = ",".join(f"{stretch.share:g}:{stretch.processes}" for stretch in options.stretches)
    command = command_of("benchmarks.evening", options, stretches=stretches)
    dropout = "the model's own dropout" if options.finetune_dropout is None else f"dropout {options.finetune_dropout:g}"
    return [
        "# An evening's run",
        "",
        f"{cpu_model()}, one thread. {versions('torch', 'deepspeed', 'transformers')} The parts were measured at "
        f"{', '.join(commits) or 'none'}.",
        "",
        f"`{command}`: {options.model}, {corpus.manifest.tokenizer.vocab_size:,} ids, sequences of "
        f"{options.max_seq_length} tokens, {corpus.manifest.tokens('train') / 1e6:.1f} million tokens of text. The "
        "module's docstring says what is compared, and what the bars are.",
        "",
        *_pretraining(found),
        "",
        "| | " + " | ".join(NAMES.values()) + " | |",
        "|---|---|---|---|---|",
        *(row for source in sources for row in _held_out_row(source, found)),
        *_pair_rows(found),
        *(row for task in tasks for row in _task_row(task, found)),
        "",
        f"Held-out loss in nats per masked token. Pairs: accuracy; fine-tuned tasks: mean, and all seeds, on the "
        f"validation split, {options.num_train_epochs} epochs on at most {options.max_train_samples:,} examples at the "
        f"best of {', '.join(f'{rate:g}' for rate in options.finetune_learning_rates)}, with {dropout}; "
        "in brackets the test split's.",
        "",
        *_bars(tasks, found),
        "",
        *_overlap(found),
        *_starts(found),
        _seconds(tasks, found),
    ]


def _pretraining(found: Found) -> Iterator[str]:
    yield "| pretraining | CPU-seconds of steps | CPU-seconds in all | million tokens | last held-out loss |"
    yield "|---|---|---|---|---|"
    for name in ("ours", "trainer"):
        if name in found:
            seconds, tokens, loss = found[name]["points"][-1]
            every = f"{found[name]['cpu_seconds']:,.0f}" if name == "ours" else ""
            rate = f" at {found[name]['learning_rate']:g}" if name == "trainer" else ""
            yield f"| {NAMES[name]}{rate} | {seconds:,.0f} | {every} | {tokens / 1e6:.1f} | {loss:.3f} |"


def _held_out_row(source: str, found: Found) -> Iterator[str]:
    losses = {name: found[f"{name}-held-out"][source]["loss"] for name in NAMES if f"{name}-held-out" in found}
    cells = [f"{losses[name]:.3f}" if name in losses else "" for name in NAMES]
    difference = f"{losses['ours'] - losses['trainer']:+.3f}" if {"ours", "trainer"} <= losses.keys() else ""
    yield f"| held-out loss, {source} | {' | '.join(cells)} | {difference} |"


def _pair_rows(found: Found) -> Iterator[str]:
    there = {name: found[f"{name}-{PAIRS}"] for name in NAMES if f"{name}-{PAIRS}" in found}
    if not there:
        return
    first = next(iter(there.values()))
    rows = {f"pairs, all {first['pairs']:,}": {name: each["accuracy"] for name, each in there.items()}}
    for phenomenon in first["phenomena"]:
        label = phenomenon.replace("_", " ")
        rows[f"pairs, {label}"] = {name: each["phenomena"][phenomenon] for name, each in there.items()}
    for label, accuracies in rows.items():
        cells = [f"{accuracies[name]:.1%}" if name in accuracies else "" for name in NAMES]
        yield f"| {label} | {' | '.join(cells)} | |"


def _task_row(task: str, found: Found) -> Iterator[str]:
    there = {name: found[f"{name}-{task}"] for name in NAMES if f"{name}-{task}" in found}
    if not there:
        return
    cells = []
    for name in NAMES:
        cell = ""
        if name in there:
            scores, test = there[name]["scores"], there[name]["test"]
            cell = f"{statistics.fmean(scores):.1%}: {', '.join(f'{score:.1%}' for score in scores)}"
            cell += "" if test is None else f" ({test:.1%})"
        cells.append(cell)
    first = next(iter(there.values()))
    examples = ", ".join(f"{count:,} {split}" for split, count in first["examples"].items())
    label = f"{task}, {first['metric'].replace('_', ' ')} ({examples}; {first['precision']})"
    yield f"| {label} | {' | '.join(cells)} | {_verdict(task, found)} |"


def _verdict(task: str, found: Found) -> str:
    if any(f"{name}-{task}" not in found for name in NAMES):
        return ""
    scores = {name: found[f"{name}-{task}"]["scores"] for name in NAMES}
    above = [NAMES[other] for other in OTHERS if is_above(scores["ours"], scores[other])]
    below = [NAMES[other] for other in OTHERS if is_above(scores[other], scores["ours"])]
    verdicts = [f"{where} {' and '.join(names)}" for where, names in (("above", above), ("below", below)) if names]
    return ", ".join(verdicts) or "within the spread"


def _bars(tasks: list[str], found: Found) -> Iterator[str]:
    yield "| bar | measured | passed |"
    yield "|---|---|---|"
    for bar, measured, passed in bars(tasks, found):
        yield f"| {bar} | {measured} | {'yes' if passed else 'no'} |"


def bars(tasks: list[str], found: Found) -> Iterator[tuple[str, str, bool]]:
    """Each bar that can be judged so far, what was measured, and whether it passed."""
    if all(f"{name}-held-out" in found for name in ("ours", "trainer")):
        losses = {name: found[f"{name}-held-out"][EVERYTHING]["loss"] for name in ("ours", "trainer")}
        less = losses["trainer"] - losses["ours"]
        yield f"held-out loss below the Trainer's by {NATS} nats", f"{less:.3f}", less >= NATS
    if all(f"{name}-{PAIRS}" in found for name in NAMES):
        pairs = {name: found[f"{name}-{PAIRS}"] for name in NAMES}
        accuracy = pairs["ours"]["accuracy"]
        for other in OTHERS:
            more, error = difference(accuracy, pairs[other]["accuracy"], pairs[other]["pairs"])
            measured = f"{more:+.1%}, one is {error:.1%}"
            yield f"pairs above {NAMES[other]} by two standard errors", measured, more > 2 * error
        yield f"pairs at least {PAIRS_ACCURACY:.0%}", f"{accuracy:.1%}", accuracy >= PAIRS_ACCURACY
    if all(f"{name}-{task}" in found for name in NAMES for task in tasks):
        for other in OTHERS:
            above = [is_above(found[f"ours-{task}"]["scores"], found[f"{other}-{task}"]["scores"]) for task in tasks]
            measured = f"{sum(above)} of {len(tasks)}"
            yield f"every task above {NAMES[other]} outside the spread", measured, all(above)
    if "ours-sst2" in found:
        mean = statistics.fmean(found["ours-sst2"]["scores"])
        yield f"SST-2 at least {SST2_ACCURACY:.0%}", f"{mean:.1%}", mean >= SST2_ACCURACY


def difference(ours: float, other: float, pairs: int) -> tuple[float, float]:
    """The difference of two accuracies on so many pairs, and its standard error as of independent samples."""
    return ours - other, math.sqrt((ours * (1 - ours) + other * (1 - other)) / pairs)


def _overlap(found: Found) -> Iterator[str]:
    if "overlap" not in found:
        return
    overlap = found["overlap"]
    yield (
        f"Rows that overlap the training text, and were left out ({overlap['cpu_seconds']:,.0f} CPU-seconds to find "
        "them), of all rows, some of which are too short to be compared:"
    )
    yield ""
    yield "| table | rows | overlapping | too short |"
    yield "|---|---|---|---|"
    for name, counts in overlap["tables"].items():
        yield f"| {name} | " + " | ".join(f"{count:,}" for count in counts.values()) + " |"
    yield ""


def _starts(found: Found) -> Iterator[str]:
    if "ours" not in found:
        return
    yield "Every start of ours:"
    yield ""
    yield "| processes | from step | to step | CPU-seconds, of all processes | ended by |"
    yield "|---|---|---|---|---|"
    for start in found["ours"]["starts"]:
        steps = f"{start['from_step']:,} | {start['last_step']:,}"
        yield f"| {start['processes']} | {steps} | {start['cpu_seconds']:,.0f} | {start['end']} |"
    yield ""


def _seconds(tasks: list[str], found: Found) -> str:
    seconds: Counter[str] = Counter()
    for name, part in found.items():
        measure = name.partition("-")[2]
        seconds["fine-tuning" if measure in tasks else measure or name] += part["seconds"]
    return seconds_line(seconds)
