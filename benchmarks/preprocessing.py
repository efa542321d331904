"""Compare `preprocess shard`, with each tokenizer backend and one worker, with the usual recipe on the same text.

    python -m benchmarks.preprocessing [--corpus FILE.jsonl|FILE.txt] [--tokenizer DIR] [--description TEXT]

CPU-seconds are medians over the repetitions and cover whole processes, their start and children included. Every run
writes a new output. The slow contenders may get only the beginning of the text. Writes a Markdown table with the
hardware, the versions and the commit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.environment import REPOSITORY, cpu_model, publish, python_path, versions
from ds_roberta.data.manifest import SPLITS, Manifest

EXAMPLE_COPIES = 10
USUAL = "datasets.map + group_texts"
GIGATOKEN, REFERENCE = "preprocess shard, gigatoken", "preprocess shard, huggingface"
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": python_path(),
    "TOKENIZERS_PARALLELISM": "false",
}


class Run(NamedTuple):
    cpu_seconds: float
    peak_bytes: int
    disk_bytes: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="one file (default: examples/corpus, repeated)")
    parser.add_argument("--tokenizer", type=Path, help="a folder (default: 8,192 ids trained on examples/corpus)")
    parser.add_argument("--description", default="examples/corpus, repeated; a tokenizer of 8,192 ids trained on it")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of the fast backend")
    parser.add_argument("--slow_repetitions", type=int, default=3, help="runs of the others, which take minutes")
    parser.add_argument("--slow_megabytes", type=float, help="text given to the others (default: all)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/preprocessing.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = (arguments.corpus or example_corpus(folder)).resolve()
        tokenizer = (arguments.tokenizer or example_tokenizer(folder)).resolve()
        little = folder / f"little{corpus.suffix}"
        little.write_bytes(first_documents(corpus))
        slow = corpus
        if arguments.slow_megabytes is not None:
            slow = folder / f"slow{corpus.suffix}"
            write_beginning(corpus, slow, int(arguments.slow_megabytes * 1e6))
        corpora = {GIGATOKEN: corpus, REFERENCE: slow, USUAL: slow}
        text_bytes = {name: path.stat().st_size for name, path in corpora.items()}
        runs: dict[str, list[Run]] = {name: [] for name in corpora}
        starts: dict[str, list[float]] = {name: [] for name in runs}
        for repetition in range(max(arguments.repetitions, arguments.slow_repetitions)):
            for name, done in runs.items():
                if repetition < (arguments.repetitions if name == GIGATOKEN else arguments.slow_repetitions):
                    done.append(run(name, corpora[name], tokenizer, folder))
                    starts[name].append(run(name, little, tokenizer, folder).cpu_seconds)
                    print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
    lines = [*table(runs, starts, text_bytes), "", *conditions(arguments.description, text_bytes[GIGATOKEN])]
    publish(lines, arguments.output)


def run(name: str, corpus: Path, tokenizer: Path, folder: Path) -> Run:
    """Measure one run in a new process, with its output in a new folder."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        output = Path(temporary) / "output"
        if name == USUAL:
            command = [str(REPOSITORY / "benchmarks/usual_recipe.py"), str(corpus), str(tokenizer), str(output)]
        else:
            command = ["-m", "preprocessing.cli", "shard", "--input", str(corpus), "--tokenizer", str(tokenizer)]
            command += ["--output", str(output), "--workers", "1", "--tokenizer_backend", name.split()[-1]]
        process = subprocess.Popen(
            [sys.executable, *command],
            env=ENVIRONMENT,
            cwd=temporary,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{name} failed: run it on its own to see why: {' '.join(command)}")
        disk = sum(
            path.stat().st_size for path in output.rglob("*") if path.is_file() and path.parent.name != "tokenizer"
        )
        tokens = int(said.split()[-1]) if name == USUAL else sum(map(Manifest.read(output).tokens, SPLITS))
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, disk, tokens)


def table(runs: dict[str, list[Run]], starts: dict[str, list[float]], text_bytes: dict[str, int]) -> list[str]:
    seconds = {name: statistics.median(run.cpu_seconds for run in done) for name, done in runs.items()}
    speeds = {name: text_bytes[name] / seconds[name] / 1e6 for name in runs}
    lines = [
        "# Preparing a corpus: text to token ids on disk",
        "",
        "| | text, MB | MB/CPU-s | × the recipe | start, CPU-s | MB/CPU-s after it | disk, B/token | peak memory, MB "
        "| runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, done in runs.items():
        speed, times = speeds[name], speeds[name] / speeds[USUAL]
        disk = max(run.disk_bytes / run.tokens for run in done)
        peak = max(run.peak_bytes for run in done) / 1e6
        start = statistics.median(starts[name])
        later = text_bytes[name] / (seconds[name] - start) / 1e6
        cells = f"{text_bytes[name] / 1e6:.0f} | {speed:.2f} | {times:.2f} | {start:.2f} | {later:.2f} "
        cells += f"| {disk:.2f} | {peak:.0f} | {len(done)}"
        lines.append(f"| {name} | {cells} |")
    return lines


def conditions(description: str, text_bytes: int) -> list[str]:
    packages = ("tokenizers", "gigatoken", "datasets", "transformers", "pyarrow", "numpy")
    return [
        f"- Text: {description}, {text_bytes / 1e6:.0f} MB.",
        "- One worker. CPU-seconds of whole processes, medians; the start is a run on only the first 20 documents.",
        "- The usual recipe is `benchmarks/usual_recipe.py`, as transformers' `run_mlm`.",
        "- Disk: what a run leaves, except the tokenizer: for the recipe its copy of the text and both caches.",
        f"- {cpu_model()}, {os.cpu_count()} cores. {versions(*packages)}",
    ]


def write_beginning(corpus: Path, target: Path, size: int) -> None:
    """Copy about the first `size` bytes of documents; line by line, as a run's peak memory is never below ours."""
    with corpus.open("rb") as file, target.open("wb") as copy:
        for line in file:
            copy.write(line)
            if copy.tell() >= size and (corpus.suffix == ".jsonl" or line == b"\n"):
                break


def first_documents(corpus: Path) -> bytes:
    """Copy the first documents, so few that a run on them costs little more than its start."""
    border = b"\n" if corpus.suffix == ".jsonl" else b"\n\n"
    with corpus.open("rb") as file:
        return border.join(file.read(1 << 20).split(border)[:20]) + border


def example_corpus(folder: Path) -> Path:
    files = sorted((REPOSITORY / "examples/corpus").glob("*.txt"))
    text = b"\n\n".join(path.read_bytes() for path in files) + b"\n\n"
    (folder / "examples.txt").write_bytes(text * EXAMPLE_COPIES)
    return folder / "examples.txt"


def example_tokenizer(folder: Path) -> Path:
    # In its own process: within this file's folder, `preprocessing` is this file.
    command = [sys.executable, "-m", "preprocessing.cli", "train-tokenizer", "--vocab_size", "8192"]
    command += ["--input", str(REPOSITORY / "examples/corpus"), "--output", str(folder / "tokenizer")]
    subprocess.run(command, env=ENVIRONMENT, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "tokenizer"


if __name__ == "__main__":
    main()
