"""Loads on training: prepared data in very many shards, and a long run."""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import REPOSITORY
from benchmarks.load_measured import (
    MIB,
    Sample,
    growth,
    measured,
    preprocess,
    row,
    sampled,
    started,
    tokenizer,
)
from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT, Manifest
from ds_roberta.data.shards import write_shard
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.files import write_json
from ds_roberta.process import STOPPED_EXIT_CODE
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER
from ds_roberta.training.metrics import METRICS_NAME, read_metrics

_OPEN_FILES = 256
_DOCUMENTS = 8
_LENGTH = 32
_SIZES = {
    "model_type": "roberta",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
_VOCABULARY = 2048
_SAMPLE_SECONDS = 5.0
_GROWTH_AT_MOST = 0.05
"""Of memory, in an hour."""
_INTERVAL = 200
_KEPT = 3


def many_shards(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Verify data in many shards, and train on sequences of most of them, while few files may be open."""
    data = folder / "data"
    data.mkdir()
    tokenizer(folder).rename(data / TOKENIZER_FOLDER)
    info, ids = TokenizerInfo.read(data / TOKENIZER_FOLDER), np.random.default_rng(0)

    def shard(split: str, index: int) -> Any:
        documents = ids.integers(5, info.vocab_size - 1, size=(_DOCUMENTS, _LENGTH - 2))
        documents[:, -1] = info.eos_token_id
        return write_shard(data, split, index, list(documents), [np.array([_LENGTH - 3])] * _DOCUMENTS, info.vocab_size)

    shards = {split: tuple(shard(split, index) for index in range(count))
              for split, count in ((TRAIN_SPLIT, options.shards), (VALIDATION_SPLIT, 1))}  # fmt: skip
    Manifest(info, {}, (), shards).write(data)
    write_json(folder / "sizes.json", {**_SIZES, "vocab_size": info.vocab_size})
    few = ("prlimit", f"--nofile={_OPEN_FILES}")
    verified = measured(preprocess("verify", "data", "--workers", "2"), folder, "verify", before=few)
    epochs, batch = 2, max(options.shards * _DOCUMENTS // 20, 1)
    steps = epochs * options.shards * _DOCUMENTS // batch
    trained = measured(
        [REPOSITORY / "launch/pretrain.py", "--deepspeed_config", REPOSITORY / "ds_configs/zero1.json", "--data_dir",
         "data", "--model", "sizes.json", "--max_seq_length", str(_LENGTH), "--train_batch_size", str(batch),
         "--max_steps", str(steps), "--warmup_steps", "1", "--output_dir", "run"],
        folder, "pretrain", before=few,
    )  # fmt: skip
    checks = {
        "verified": verified.code == 0,
        "trained": trained.code == 0,
        f"at most {_OPEN_FILES} open files": max(sample.handles for sample in trained.samples) <= _OPEN_FILES,
    }
    shown = (
        f"verify {verified.seconds:.0f} s, peak {verified.peak / MIB:.0f} MiB; {epochs} epochs of "
        f"{options.shards * _DOCUMENTS:,} documents {trained.seconds:.0f} s, peak {trained.peak / MIB:.0f} MiB, "
        f"at most {max(sample.handles for sample in trained.samples)} open files"
    )
    if trained.code or verified.code:
        shown += f"; {' '.join((verified.output + trained.output).split()[-30:])}"
    return {"rows": [row(f"{options.shards:,} shards", checks, shown)]}


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pretrain for long, with evaluations and saves, and stop the run by a signal."""
    tokenizer_words = [
        "train-tokenizer",
        "--input",
        str(REPOSITORY / "examples/corpus"),
        "--vocab_size",
        str(_VOCABULARY),
    ]
    shard_words = ["shard", "--input", str(REPOSITORY / "examples/corpus"), "--tokenizer", "tokenizer"]
    for words, output in ((tokenizer_words, "tokenizer"), (shard_words, "data")):
        extra = ["--validation_fraction", "0.05"] if output == "data" else []
        measured(preprocess(*words, "--output", output, *extra), folder)
    write_json(folder / "sizes.json", {**_SIZES, "vocab_size": _VOCABULARY})
    process = started(
        [REPOSITORY / "launch/pretrain.py", "--deepspeed_config", REPOSITORY / "ds_configs/zero1.json",
         "--data_dir", "data", "--model", "sizes.json", "--max_seq_length", "64", "--train_batch_size", "8",
         "--learning_rate", "1e-4", "--max_steps", "100000000", "--warmup_steps", "100", "--save_interval",
         str(_INTERVAL), "--eval_interval", str(_INTERVAL), "--eval_sequences", "64", "--keep_last", str(_KEPT),
         "--output_dir", "run"],
        folder, "pretrain",
    )  # fmt: skip
    samples: list[Sample] = []
    own: list[int] = []
    of_checkpoints: list[int] = []
    began = time.monotonic()
    for sample in sampled(process, _SAMPLE_SECONDS):
        samples.append(sample)
        paths = [path.relative_to(folder / "run").parts for path in (folder / "run").rglob("*")]
        of_checkpoints.append(sum(parts[0] == CHECKPOINTS_FOLDER for parts in paths))
        own.append(len(paths) - of_checkpoints[-1])
        if time.monotonic() - began > options.minutes * 60:
            break
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    rows = read_metrics(folder / "run" / METRICS_NAME)[0]
    half = len(samples) // 2
    first, last = samples[:half], samples[half:]
    slope, memory = growth(last, "memory"), statistics.fmean(sample.memory for sample in last)
    a_checkpoint = 10  # its folder, tokenizer and files; the newest, the best, one being written and one being removed
    checks = {
        f"stopped with {STOPPED_EXIT_CODE}": code == STOPPED_EXIT_CODE,
        f"memory grows by at most {_GROWTH_AT_MOST:.0%} an hour": slope <= _GROWTH_AT_MOST * memory,
        "no more open files": max(s.handles for s in last) <= max(s.handles for s in first),
        "no more threads": max(s.threads for s in last) <= max(s.threads for s in first),
        # The median, as a file that is replaced has a temporary one beside it for a moment.
        "no more files": statistics.median(own[half:]) <= statistics.median(own[half // 2 : half]),
        "files of its checkpoints": max(of_checkpoints) <= (_KEPT + 4) * a_checkpoint,
    }
    quarters = [part for part in np.array_split(np.arange(len(samples)), 4) if len(part)]
    means = [statistics.fmean(samples[index].memory for index in part) / MIB for part in quarters]
    shown = (
        f"{rows[-1]['global_step']:,} steps, {rows[-1]['global_step'] // _INTERVAL} saves; memory by quarters "
        f"{', '.join(f'{mean:.0f}' for mean in means)} MiB, in the last half {slope / MIB:+.1f} MiB an hour; at most "
        f"{max(s.handles for s in samples)} open files, {max(s.threads for s in samples)} threads, "
        f"{statistics.median(own):.0f} files and at most {max(of_checkpoints)} of checkpoints"
    )
    return {"rows": [row(f"{options.minutes:g} minutes of pretraining", checks, shown)],
            "samples": [[round(s.seconds), s.memory, s.handles, s.threads, *files]
                        for s, *files in zip(samples, own, of_checkpoints, strict=True)]}  # fmt: skip
