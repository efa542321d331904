"""The training loader compared with `datasets` and transformers' collator: CPU-seconds on one core, medians.

    python -m benchmarks.loader [--corpus DIR]

Writes a Markdown table with the hardware, the versions and the commit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy and torch are imported

import argparse
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from ds_roberta.config import MASKING_UNITS, MaskingConfig, PackingConfig, Stage
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, Manifest, ShardInfo
from ds_roberta.data.masking import training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import Corpus, write_shard
from ds_roberta.data.words import word_flags
from preprocessing.cli import main as preprocess

LENGTH = 512
BATCH, MICRO_BATCH = 2048, 32
PEER_ROWS = 512
SHARDS = 10_000
LARGE_ORDER, GLOBAL_BATCH = 2_000_000_000, 8192
LATE_STEP = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a data folder (default: made from examples/corpus)")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/loader.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        publish(lines(arguments.corpus or example_corpus(folder), folder, arguments.repetitions), arguments.output)


def lines(corpus_folder: Path, folder: Path, repetitions: int) -> Iterator[str]:
    """Yield the lines of the report."""
    yield "# Loader: gather, mask, collate"
    yield ""
    corpus = Corpus.open(corpus_folder)
    build_index(corpus, TRAIN_SPLIT, PackingConfig(LENGTH))
    ours = {unit: our_loader(corpus, unit) for unit in MASKING_UNITS}
    peers = peer_loaders(corpus, folder)
    speeds: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
    for repetition in range(repetitions):
        for name, load in {**ours, **peers}.items():
            load(repetition)  # untimed: the caches still hold the data of what ran before
            seconds, tokens = cpu_seconds(lambda load=load, step=repetition + 1: load(step))  # type: ignore[misc]
            speeds[name].append(tokens / seconds / 1e6)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    yield f"Sequences of {LENGTH} tokens; million tokens per CPU-second, median of {repetitions} (lowest to highest),"
    yield "all loaders in turn, each timed after an untimed batch."
    yield ""
    yield "| masking | ds_roberta | datasets + DataCollatorForLanguageModeling | ratio |"
    yield "|---|---|---|---|"
    for unit in ours:
        peer = f"peer {unit}"
        theirs = f"{spread(speeds[peer])}" if peer in median else "has none"
        ratio = f"{median[unit] / median[peer]:.0f}x" if peer in median else ""
        yield f"| {unit} | {spread(speeds[unit])} | {theirs} | {ratio} |"
    yield ""
    yield "| what | CPU | wall |"
    yield "|---|---|---|"
    order = SampleOrder(LARGE_ORDER, 0)
    places = np.arange(GLOBAL_BATCH) + 123 * GLOBAL_BATCH
    yield row(
        f"order of a global batch of {GLOBAL_BATCH:,} among {LARGE_ORDER:,} sequences "
        f"(peak memory {peak_mebibytes(lambda: order.sequences(order.lane_order(places))):.1f} MiB)",
        lambda: order.sequences(order.lane_order(places)),
        repetitions * 5,
    )
    for name, chunks in (("tiny", 1), ("200 MB each (their manifest)", 200)):
        many = many_shards(folder / f"many-{chunks}", corpus_folder, chunks)
        yield row(f"opening {SHARDS:,} shards, {name}", lambda many=many: opened(many), 3)  # type: ignore[misc]
    many = folder / "many-1"
    yield row(f"reading a batch of {BATCH:,} from {SHARDS:,} shards just opened", lambda: opened(many)(0), 3)
    for step in (0, LATE_STEP):
        yield row(
            f"opening the corpus (index built) and the first batch of {BATCH:,}, at step {step:,}",
            lambda step=step: opened(corpus_folder)(step),  # type: ignore[misc]
            repetitions,
        )
    yield ""
    yield f"{cpu_model()}, one core. {versions('numpy', 'torch', 'pyarrow', 'datasets', 'transformers')}"
    yield ""
    yield (
        f"The corpus has {corpus.manifest.tokens(TRAIN_SPLIT):,} tokens. Ours: batches of {BATCH:,} in micro-batches "
        f"of {MICRO_BATCH}, order included. Theirs, as run_mlm does: rows of lists with their special_tokens_mask (for "
        f"whole words their offset_mapping too), memory-mapped, drawn at random in batches of {MICRO_BATCH}."
    )


def our_loader(corpus: Corpus, unit: str = "token") -> Callable[[int], int]:
    """Return a function that makes the batch of a step and returns its number of tokens."""
    tokenizer = corpus.manifest.tokenizer
    packed = open_index(corpus, TRAIN_SPLIT, PackingConfig(LENGTH))
    table = None if unit == "token" else word_flags(corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
    masker = training_masker(MaskingConfig(unit=unit), tokenizer, 0, table)
    order = SampleOrder(len(packed), 0)
    collator = Collator(packed, masker, tokenizer, LENGTH)
    loader = TrainLoader([LoaderStage(Stage(0, LENGTH, BATCH), collator, order, MICRO_BATCH)])
    return lambda step: sum(micro_batch.tokens for micro_batch in loader.micro_batches(step))


def peer_loaders(corpus: Corpus, folder: Path) -> dict[str, Callable[[int], int]]:
    """Return such a function for `datasets` rows and transformers' collator, which ignore the step."""
    tokenizer = AutoTokenizer.from_pretrained(corpus.folder / TOKENIZER_FOLDER)
    values = corpus.split(TRAIN_SPLIT).values(0)
    texts = [tokenizer.decode(values[first : first + LENGTH]) for first in range(0, len(values), LENGTH)]
    encoded = tokenizer(
        [text for text, _ in zip(cycle(texts), range(PEER_ROWS), strict=False)],
        truncation=True,
        padding="max_length",
        max_length=LENGTH,
        return_special_tokens_mask=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    columns = {"token": ["input_ids", "special_tokens_mask"]}
    columns["whole-word"] = [*columns["token"], "offset_mapping"]
    loaders: dict[str, Callable[[int], int]] = {}
    for unit, names in columns.items():
        path = folder / f"rows-{unit}"
        # With whole words the collator cannot insert random tokens, so it has less work.
        shares = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if unit == "whole-word" else {}
        collator = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=unit == "whole-word", **shares)
        datasets.Dataset.from_dict({name: encoded[name] for name in names}).save_to_disk(str(path))
        loader = torch.utils.data.DataLoader(
            datasets.load_from_disk(str(path)),
            batch_size=MICRO_BATCH,
            shuffle=True,
            collate_fn=collator,
        )

        def load(_: int, loader: Iterable[Any] = loader) -> int:
            return sum(batch["input_ids"].numel() for batch in loader)

        loaders[f"peer {unit}"] = load
    return loaders


def opened(folder: Path) -> Callable[[int], int]:
    return our_loader(Corpus.open(folder))


def many_shards(folder: Path, like: Path, chunks: int) -> Path:
    """Make a data folder of many shards (one tiny file under many names), each with `chunks` times the checksums."""
    shutil.copytree(like / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
    tokenizer = Corpus.open(like).manifest.tokenizer
    document = np.append(np.full(LENGTH - 2, tokenizer.vocab_size // 2), tokenizer.eos_token_id)
    first = write_shard(folder, TRAIN_SPLIT, 0, [document] * 8, [np.array([LENGTH - 2])] * 8, tokenizer.vocab_size)
    shards = []
    for number in range(SHARDS):
        name = f"{TRAIN_SPLIT}/shard-{number:05d}.arrow"
        if number:
            os.link(folder / first.file, folder / name)
        checksums = first.chunk_checksums * chunks
        shards.append(ShardInfo(name, 8, first.tokens, first.bytes, f"{number:032x}", checksums))
    Manifest(tokenizer, {}, (), {TRAIN_SPLIT: tuple(shards)}).write(folder)
    build_index(Corpus.open(folder), TRAIN_SPLIT, PackingConfig(LENGTH))
    return folder


def example_corpus(folder: Path) -> Path:
    text, tokenizer, output = str(REPOSITORY / "examples/corpus"), str(folder / "tokenizer"), folder / "corpus"
    for command in (
        ["train-tokenizer", "--input", text, "--vocab_size", "8192", "--output", tokenizer],
        ["shard", "--input", text, "--tokenizer", tokenizer, "--output", str(output), "--workers", "1"],
    ):
        try:
            preprocess(command)
        except SystemExit as done:
            if done.code:
                raise
    return output


def cpu_seconds(function: Callable[[], int]) -> tuple[float, int]:
    before = time.process_time()
    result = function()
    return time.process_time() - before, result


def row(what: str, function: Callable[[], object], repetitions: int) -> str:
    """Return a line of the second table: medians in milliseconds."""
    cpu, wall = [], []
    for _ in range(repetitions):
        before = time.process_time(), time.perf_counter()
        function()
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    return f"| {what} | {statistics.median(cpu) * 1e3:,.1f} ms | {statistics.median(wall) * 1e3:,.1f} ms |"


def peak_mebibytes(function: Callable[[], object]) -> float:
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / (1 << 20)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
