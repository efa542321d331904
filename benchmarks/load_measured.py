"""Commands whose memory, open files and threads are sampled, and the generator of their texts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.environment import python_path
from benchmarks.studies import WITH_THE_STUDY

MIB = 1 << 20
_SAMPLE_SECONDS = 0.2
_SYLLABLES = ["ba", "do", "ke", "li", "mu", "na", "po", "ri", "sa", "te", "vi", "zo", "an", "er", "in", "st"]
_SENTENCES = 20_000
_DOCUMENTS_AT_ONCE = 500


@dataclass(frozen=True)
class Sample:
    """Of a command's processes together; memory in bytes."""

    seconds: float
    memory: int
    handles: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """A command that has ended."""

    code: int
    output: str
    seconds: float
    samples: Sequence[Sample]

    @property
    def peak(self) -> int:
        """The most anonymous memory, in bytes."""
        return max((sample.memory for sample in self.samples), default=0)


def started(
    words: Sequence[str | Path], folder: Path, name: str, before: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a Python command, perhaps by a program before it; its output goes to NAME.log in the folder."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*WITH_THE_STUDY, *before, sys.executable, *map(str, words)],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def measured(words: Sequence[str | Path], folder: Path, name: str = "command", before: Sequence[str] = ()) -> Measured:
    """Run a Python command to its end, and sample it; see `started`."""
    began = time.monotonic()
    process = started(words, folder, name, before)
    samples = list(sampled(process, _SAMPLE_SECONDS))
    output = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    return Measured(process.wait(), output, time.monotonic() - began, samples)


def sampled(process: subprocess.Popen[bytes], every: float) -> Iterator[Sample]:
    """Samples until a process ends."""
    began, root = time.monotonic(), psutil.Process(process.pid)
    while process.poll() is None:
        try:
            yield _sample([root, *root.children(recursive=True)], time.monotonic() - began)
        except psutil.NoSuchProcess:
            continue
        time.sleep(every)


def _sample(processes: Sequence[psutil.Process], seconds: float) -> Sample:
    memory = handles = threads = 0
    for process in processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            handles += process.num_fds()
        except (OSError, psutil.NoSuchProcess):
            continue
        values = dict(line.split(":", 1) for line in status.splitlines())
        memory += int(values.get("RssAnon", "0 kB").split()[0]) * 1024
        threads += int(values["Threads"])
    return Sample(seconds, memory, handles, threads)


def growth(samples: Sequence[Sample], attribute: str) -> float:
    """The slope per hour of a line through one number of the samples."""
    seconds = [sample.seconds for sample in samples]
    return float(np.polyfit(seconds, [getattr(sample, attribute) for sample in samples], 1)[0]) * 3600


def preprocess(*words: str | Path) -> list[str | Path]:
    return ["-m", "preprocessing.cli", *words]


class Texts:
    """Sentences of made-up words, whose frequencies fall as those of words do; the same for the same seed."""

    def __init__(self, seed: int = 0):
        self._random = np.random.default_rng(seed)
        syllables = self._random.choice(_SYLLABLES, size=(30_000, 4))
        lengths = self._random.integers(1, 5, size=len(syllables))
        self._words = np.array(["".join(row[:length]) for row, length in zip(syllables, lengths, strict=True)])
        weights = 1 / np.arange(2, len(self._words) + 2)
        self._cumulative = np.cumsum(weights / weights.sum())

    def words(self, count: int) -> np.ndarray:
        return self._words[np.searchsorted(self._cumulative, self._random.random(count)).clip(max=len(self._words) - 1)]

    def documents(self, size: int) -> Iterator[bytes]:
        """Documents of 20 sentences with at least `size` bytes together, many at a time, as a `.txt` has them."""
        words = np.array_split(self.words(_SENTENCES * 15), _SENTENCES)
        sentences = [f"{' '.join(each).capitalize()}.".encode() for each in words]
        while size > 0:
            chosen = self._random.integers(0, _SENTENCES, size=(_DOCUMENTS_AT_ONCE, 20)).tolist()
            block = b"\n\n".join(b"\n".join(sentences[index] for index in document) for document in chosen) + b"\n\n"
            yield block
            size -= len(block)

    def write(self, folder: Path, size: int, files: int) -> None:
        """Write documents of `size` bytes into a folder."""
        folder.mkdir()
        for number in range(files):
            with (folder / f"text-{number:03d}.txt").open("wb") as file:
                for block in self.documents(size // files):
                    file.write(block)


def tokenizer(folder: Path) -> Path:
    """Train a tokenizer on 2 MB of text."""
    Texts(1).write(folder / "tokenizer-text", 2_000_000, 1)
    words = preprocess("train-tokenizer", "--input", "tokenizer-text", "--vocab_size", "4096", "--output", "tokenizer")
    must_succeed(measured(words, folder))
    return folder / "tokenizer"


def must_succeed(command: Measured) -> Measured:
    if command.code:
        raise RuntimeError(f"exit code {command.code}: {command.output[-2000:]}")
    return command


def row(tried: str, checks: Mapping[str, bool], shown: str) -> dict[str, object]:
    """A row of the report: it survived if all checks hold; those that do not are named."""
    failed = [name for name, holds in checks.items() if not holds]
    return {"tried": tried, "survived": not failed, "measured": shown + "".join(f"; NOT {name}" for name in failed)}
