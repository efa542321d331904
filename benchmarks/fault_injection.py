"""Kill commands at random moments, start them again, and compare what they write with what unbroken runs wrote.

    python -m benchmarks.fault_injection
    python -m benchmarks.fault_injection --kills 20 --signals 0

The commands are `launch/pretrain.py` on two processes, `preprocess shard`, `launch/export_hf.py`, which replaces an
earlier export, and `launch/finetune.py`, all real and started as a shell does. One run is killed several times, goes on
after each kill by the same command, and at last reaches its end. Then every file that counts must have the bytes of the
unbroken run's: shards, packing index, last checkpoint with weights and moments, exported and fine-tuned model, and all
metrics but times (dropout is on; sequences have 32 tokens, one block of keys, so that a GPU's attention rounds
identically too). Nothing half-written may be left. If anything differs, all kills of the run count as lost, and its
folder is kept.

A moment is drawn in two parts. The tool watches the working folder, every half a millisecond, for the temporary files
of the phase that it aims at: of a save, the index, an export. Once they appear for the n-th time (n is drawn), it waits
for a time between 0 and what the phase took in the unbroken run, and sends SIGKILL to all processes of the command. So
kills fall into phases of milliseconds, too; the files that a kill left say which one it fell into.

With `--signals`, SIGTERM or SIGUSR1 goes to one process of a pretraining or fine-tuning, as schedulers send them: all
must have exited within a minute with code 85 and everything saved.

Each run is kept in the folder of results as soon as it is finished, and the same command again goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.fault_injection_targets import (
    BETWEEN,
    END,
    SAVE,
    START,
    STEP,
    TUNING_SAVE,
    Ground,
    Target,
    differences,
    targets,
    written,
)
from benchmarks.interrupted import Running, Watch, running
from benchmarks.studies import Busy, Item, beside, finish, parts_of, same_settings
from ds_roberta.command_line import ArgumentParser, positive, run_command, whole_number
from ds_roberta.errors import UserError
from ds_roberta.files import read_json
from ds_roberta.process import STOPPED_EXIT_CODE
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER, LATEST_NAME, step_folder
from ds_roberta.training.metrics import METRICS_NAME

KILLS, SIGNALS = "kills", "signals"
SECONDS_TO_LEAVE = 60.0
WHERE = {
    START: "the start",
    STEP: "the steps",
    BETWEEN: "between work units",
    END: "its end",
    "index": "the packing index",
    "save": "a save",
    "export": "the export",
    "unit": "a work unit",
    "publishing": "moving the output into place",
    "writing": "writing the output",
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=whole_number, default=100)
    parser.add_argument("--signals", type=whole_number, default=20)
    parser.add_argument("--targets", default=",".join(targets(1)), help="which commands (default: %(default)s)")
    parser.add_argument("--processes", type=positive, default=2, help="of the pretraining (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--deepspeed_config", type=Path, default=REPOSITORY / "ds_configs/zero2.json")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/fault_injection")
    run_command(lambda: study(parser.parse_args()))


def study(options: argparse.Namespace) -> int:
    results = options.results.resolve()
    known = targets(options.processes)
    chosen = [known[name] for name in parts_of(options.targets, list(known))]
    settings = {"targets": [target.name for target in chosen], "processes": options.processes, "seed": options.seed}
    same_settings(results, {**settings, "deepspeed_config": options.deepspeed_config.name}, "kills")
    with tempfile.TemporaryDirectory(prefix="fault_injection-", ignore_cleanup_errors=True) as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        ground = Ground(Path(folder).resolve(), known, options.deepspeed_config.resolve())
        found = {
            KILLS: list(runs(options, results, KILLS, options.kills, chosen, ground)),
            SIGNALS: list(runs(options, results, SIGNALS, options.signals, [t for t in chosen if t.stops], ground)),
        }
    publish(report(options, found), beside(results, ".md"))
    return int(any(run["lost"] for of_kind in found.values() for run in of_kind))


def runs(
    options: argparse.Namespace, results: Path, kind: str, wanted: int, chosen: Sequence[Target], ground: Ground
) -> Iterator[dict[str, Any]]:
    """The finished runs of a kind, until there are as many kills or signals as wanted; the missing ones are made."""
    number = 0
    while wanted > 0 and chosen:
        target = chosen[number % len(chosen)]
        name = f"{kind}-{number:03d}-{target.name}"
        measure = partial(broken_run, options, results, name, kind, wanted, target, ground)
        try:
            finish(results, Item(kind, name, (), measure))
        except Busy:
            return
        run = read_json(results / f"{name}.json")
        yield run
        wanted -= len(run["landed"])
        number += 1


def broken_run(
    options: argparse.Namespace,
    results: Path,
    name: str,
    kind: str,
    wanted: int,
    target: Target,
    ground: Ground,
    _: int,
) -> dict[str, Any]:
    """Break a run off at most `wanted` times, let it reach its end, and compare it with the unbroken one.

    Returns:
        `landed`, where the kills or signals came, and `lost`, what went wrong; both as texts.

    Raises:
        UserError: the command had always ended before.
    """
    unbroken = ground.unbroken(target)
    folder, moments = ground.copy(target, name), random.Random(f"{options.seed} {name}")
    landed: list[str] = []
    lost: list[str] = []
    act = _kill if kind == KILLS else _send
    aims = target.aimed(wanted) if kind == KILLS else [STEP, SAVE.name] * 3
    for aim in aims:
        if not unbroken.shows(target, aim):
            continue
        if len(landed) == wanted or lost:
            break
        watch = Watch(target.phases, folder)
        with running(target.words, folder, target.processes) as run:
            phase, occurrence, seconds = unbroken.moment(target, aim, moments)
            if phase is None or watch.wait_for(phase, occurrence, run):
                time.sleep(seconds)
            if not run.is_alive():  # it had reached its end before
                lost += _failure(run)
                break
            place, problems = act(run, target, folder, watch, moments)
            landed.append(place)
            lost += problems
            print(f"  aimed at {WHERE[aim]}, landed in {WHERE[landed[-1]]}", flush=True)
    if not landed:
        raise UserError(f"{target.name} ended before any of its {kind}; {'; '.join(lost) or 'is the machine busy?'}")
    if not lost:
        with running(target.words, folder, target.processes) as run:
            lost += _failure(run)
        lost += differences(dict(written(folder, target.outputs)), unbroken.files)
    if lost:
        shutil.move(folder, results / f"{name}-lost")
        print(f"  LOST: {'; '.join(lost)}", flush=True)
    else:
        shutil.rmtree(folder)
    return {"kind": kind, "target": target.name, "landed": landed, "lost": lost}


def _failure(run: Running) -> list[str]:
    codes = run.wait()
    return [f"exit codes {codes}: … {run.last_words()}"] if any(codes) else []


def _kill(run: Running, target: Target, folder: Path, watch: Watch, moments: random.Random) -> tuple[str, list[str]]:
    """Kill a command; return what it was in, by what it left, and no problem."""
    run.kill()
    return _where(target, watch, run), []


def _send(run: Running, target: Target, folder: Path, watch: Watch, moments: random.Random) -> tuple[str, list[str]]:
    """Send a stop signal to one process and wait until all have exited; return what they were in, and what is not as
    promised."""
    number, process = moments.choice([signal.SIGTERM, signal.SIGUSR1]), moments.choice(run.processes)
    place = _where(target, watch, run)
    sent = time.time()
    process.send_signal(number)
    codes = run.wait(SECONDS_TO_LEAVE)
    if any(code != STOPPED_EXIT_CODE for code in codes):
        return place, [f"exit codes {codes} after {number.name}: … {run.last_words()}"]
    return place, [] if everything_is_saved(target, folder, sent) else [f"{number.name}: not everything was saved"]


def _where(target: Target, watch: Watch, run: Running) -> str:
    if (phase := watch.now()) is not None:
        return phase.name
    return target.outside if target.reports and re.search(target.reports, run.printed()) else START


def everything_is_saved(target: Target, folder: Path, sent: float) -> bool:
    """Whether the last step before a stop is in a checkpoint: of a pretraining the last in the metrics, of a
    fine-tuning one that was made after the signal, at `sent` by the system's clock."""
    if target.name != "pretraining":
        states = folder.glob(f"{TUNING_SAVE.pattern}/{TUNING_SAVE.until}")
        return any(path.stat().st_mtime > sent for path in states)
    rows = map(json.loads, (folder / f"run/{METRICS_NAME}").read_text(encoding="utf-8").splitlines())
    checkpoints = folder / f"run/{CHECKPOINTS_FOLDER}"
    last = step_folder(checkpoints, max(row["global_step"] for row in rows))
    return last.is_dir() and (checkpoints / LATEST_NAME).read_text(encoding="utf-8").strip() == last.name


def report(options: argparse.Namespace, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    yield "# Kills and signals"
    yield ""
    processes = f"{options.processes} process{'es' if options.processes > 1 else ''}"
    yield "`python -m benchmarks.fault_injection` breaks real commands off, and starts them again until they end."
    yield "Survived: all that they wrote is bit-identical to an unbroken run's, and nothing half-written is left."
    yield f"Pretraining is on {processes}, with {options.deepspeed_config.name}; the moments' seed is {options.seed}."
    for kind, title in ((KILLS, "SIGKILL to all processes"), (SIGNALS, "SIGTERM or SIGUSR1 to one process")):
        if found[kind]:
            yield ""
            yield f"## {title}"
            yield ""
            if kind == SIGNALS:
                yield f"Survived: also, the last step was saved, and within {SECONDS_TO_LEAVE:.0f} s all processes had"
                yield f"left with code {STOPPED_EXIT_CODE}."
                yield ""
            yield from table(found[kind])
    yield ""
    commits = sorted({run["commit"] for of_kind in found.values() for run in of_kind})
    yield f"{cpu_model()}. Runs of commit {', '.join(commits)}. {versions('torch', 'deepspeed', 'transformers')}"


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    tried: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    for run in found:
        places = Counter((run["target"], place) for place in run["landed"])
        tried += places
        if run["lost"]:
            lost += places
    yield "| command | killed in | tried | survived | lost |"
    yield "|---|---|---|---|---|"
    for (target, place), count in sorted(tried.items()):
        missing = lost[target, place]
        yield f"| {target} | {WHERE[place]} | {count} | {count - missing} | {missing} |"
    total, missing = tried.total(), lost.total()
    yield f"| **all** | | **{total}** | **{total - missing}** | **{missing}** |"


if __name__ == "__main__":
    main()
