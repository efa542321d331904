"""Loads far above the usual, and whether memory, files and results stay as promised.

    python -m benchmarks.load --folder /scratch
    python -m benchmarks.load --folder /scratch --parts corpus,tasks --gigabytes 0.5

The parts; all text comes from a seeded generator:

- `corpus`: `preprocess shard` on a corpus and on a tenth of it. Memory must be the same: at most a quarter and 64 MiB
  more for the whole.
- `shards`: prepared data in many shards is verified, opened and trained on, with at most 256 open files.
- `documents`: very many tiny documents, with `--dedup exact`; each must be in the account.
- `long-document`: one document of very many bytes among others, as text, compressed text, JSON lines and CSV: it is
  rejected, named and counted, the others are kept, and memory is that of a job without it, up to 64 MiB.
- `tasks`: array tasks on one output, all at the same time; one of them puts the output into place, with the bytes that
  one process writes.
- `soak`: a long pretraining. After the first half, its memory, open files and threads must not grow, and its folder
  must hold no more files than its checkpoints explain. Growth is the slope of a line through the samples.

Memory is anonymous memory (`RssAnon`), the peak over samples of the sum over a command's processes: pages of mapped
files are the system's cache. Each part is kept in the folder of results as soon as it is finished, and the same command
again goes on, after a kill too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.load_preprocessing import array_tasks, constant_memory, long_document, tiny_documents
from benchmarks.load_training import many_shards, soak
from benchmarks.studies import Item, beside, finish_all, parts_of, same_settings
from ds_roberta.command_line import ArgumentParser, positive, positive_number, run_command

PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "corpus": constant_memory,
    "shards": many_shards,
    "documents": tiny_documents,
    "long-document": long_document,
    "tasks": array_tasks,
    "soak": soak,
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to try (default: %(default)s)")
    parser.add_argument("--gigabytes", type=positive_number, default=5.0, help="of the corpus")
    parser.add_argument("--shards", type=positive, default=10_000)
    parser.add_argument("--documents", type=positive, default=1_000_000)
    parser.add_argument("--long_gigabytes", type=positive_number, default=1.0, help="of the long document")
    parser.add_argument("--tasks", type=positive, default=64)
    parser.add_argument("--minutes", type=positive_number, default=60.0, help="of the long pretraining")
    parser.add_argument("--workers", type=positive, default=2, help="of `preprocess shard`")
    parser.add_argument("--folder", type=Path, help="for texts and shards, two bytes a byte of the corpus")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks/results/load")
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # for the commands that this runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    run_command(lambda: study(parser.parse_args()))


def study(options: argparse.Namespace) -> None:
    options.results = options.results.resolve()
    parts = parts_of(options.parts, tuple(PARTS))
    kept = ("gigabytes", "shards", "documents", "long_gigabytes", "tasks", "minutes", "workers")
    same_settings(options.results, {f"--{name}": getattr(options, name) for name in kept}, "results")
    output = beside(options.results, ".md")
    finish_all(options.results, items(options), parts, lambda found: publish(report(options, found), output))


def items(options: argparse.Namespace) -> Iterator[Item]:
    for name, measure in PARTS.items():
        yield Item(name, name, (), partial(_in_a_folder, options, measure))


def _in_a_folder(
    options: argparse.Namespace, measure: Callable[[argparse.Namespace, Path], dict[str, Any]], _: int
) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="load-", dir=options.folder)).resolve()
    try:
        return measure(options, folder)
    finally:
        shutil.rmtree(folder)


def report(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[str]:
    """Each part has `rows`: what was tried, whether it survived, and what was measured."""
    yield "# Load"
    yield ""
    yield "How each is tried, and what counts as survived: `python -m benchmarks.load --help`."
    yield ""
    yield "| part | tried | survived | lost | measured |"
    yield "|---|---|---|---|---|"
    rows = [(part, row) for part, result in found.items() for row in result["rows"]]
    for part, row in rows:
        yield f"| {part} | {row['tried']} | {int(row['survived'])} | {int(not row['survived'])} | {row['measured']} |"
    survived = sum(row["survived"] for _, row in rows)
    yield f"| all | {len(rows)} | {survived} | {len(rows) - survived} | |"
    yield ""
    minutes = sum(result["seconds"] for result in found.values()) / 60
    commits = ", ".join(sorted({result["commit"] for result in found.values()}))
    yield (
        f"{minutes:.0f} minutes, with `--workers {options.workers}`, on {cpu_model()} with {os.cpu_count()} cores; "
        f"measured at commit {commits}. "
        + (versions("torch", "deepspeed", "tokenizers", "gigatoken", "pyarrow", "numpy"))
    )


if __name__ == "__main__":
    main()
