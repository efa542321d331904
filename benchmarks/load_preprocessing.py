"""Loads on `preprocess`: large corpora, tiny and huge documents, many array tasks."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.load_measured import MIB, Measured, Texts, measured, must_succeed, preprocess, row, started, tokenizer
from ds_roberta.data.manifest import SPLITS, Manifest
from ds_roberta.files import file_checksum

_FILES = 20
_MORE = 64 * MIB
_SENTENCE = b"one two three four five six seven eight nine ten. "
_LONG = "too_long"


def constant_memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare a corpus and a tenth of it."""
    size = int(options.gigabytes * 1e9)
    tokenizer(folder)
    runs = []
    for name, part in (("tenth", size // 10), ("whole", size)):
        Texts().write(folder / name, part, _FILES)
        runs.append(must_succeed(_shard(folder, name, f"{name}-data", "--workers", str(options.workers))))
        manifest = Manifest.read(folder / f"{name}-data")
    whole = must_succeed(measured(preprocess("verify", "whole-data", "--workers", "2"), folder))
    tenth_run, whole_run = runs
    tokens = sum(map(manifest.tokens, SPLITS))
    checks = {
        "constant memory": whole_run.peak <= tenth_run.peak * 1.25 + _MORE,
        "verified": "is whole" in whole.output,
    }
    shown = (
        f"{whole_run.seconds / 60:.1f} min, {tokens:,} tokens; peak {_mib(whole_run)}, of a tenth {_mib(tenth_run)}; "
        f"verify {whole.seconds:.0f} s, peak {_mib(whole)}"
    )
    return {"rows": [row(f"a corpus of {size / 1e9:g} GB", checks, shown)]}


def tiny_documents(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare documents of one to three words, a quarter of them in JSON lines; most are copies of others."""
    tokenizer(folder)
    texts, count = Texts(), options.documents
    with (folder / "tiny.txt").open("w", encoding="utf-8") as plain, (folder / "tiny.jsonl").open("w") as lines:
        for number in range(count):
            text = " ".join(texts.words(1 + number % 3)) if number % 4 else f"{number} words"
            if number % 4 == 1:
                lines.write(json.dumps({"text": text}) + "\n")
            else:
                plain.write(text + "\n\n")
    found = must_succeed(
        measured(
            preprocess("shard", "--input", "tiny.txt", "tiny.jsonl", "--tokenizer", "tokenizer", "--output", "data",
                       "--dedup", "exact", "--workers", str(options.workers)),
            folder,
        )
    )  # fmt: skip
    manifest = Manifest.read(folder / "data")
    read, kept, rejected = (
        sum(entry.documents_read for entry in manifest.inputs),
        sum(entry.documents_kept for entry in manifest.inputs),
        sum(sum(entry.rejected.values()) for entry in manifest.inputs),
    )
    checks = {
        "all read": read == count,
        "all accounted for": kept + rejected == read,
        "as many in the shards": sum(map(manifest.documents, SPLITS)) == kept,
        "at most 2 GiB": found.peak <= 2048 * MIB,
    }
    shown = f"{found.seconds:.0f} s, peak {_mib(found)}; {kept:,} kept, {rejected:,} copies"
    return {"rows": [row(f"{count:,} tiny documents", checks, shown)]}


def long_document(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare files that have a huge document between small ones."""
    tokenizer(folder)
    size, rows = int(options.long_gigabytes * 1e9), []
    formats: dict[str, Callable[[Path, int], None]] = {
        "plain.txt": lambda path, length: _plain(path.open("wb"), length),
        "packed.txt.gz": lambda path, length: _plain(gzip.GzipFile(path, "wb", compresslevel=1), length),
        "lines.jsonl": _json_lines,
        "table.csv": _table,
    }
    for name, write in formats.items():
        write(folder / name, 1000)
        usual = must_succeed(_shard(folder, name, "usual", "--workers", "1"))
        (folder / name).unlink()
        write(folder / name, size)
        found = _shard(folder, name, "data", "--workers", "1", "--max_bad_fraction", "0.5")
        checks = {"ended well": found.code == 0, "the memory of a job without it": found.peak <= usual.peak + _MORE}
        if found.code == 0:
            (entry,) = Manifest.read(folder / "data").inputs
            counts = (entry.documents_read, entry.documents_kept, entry.rejected)
            checks["only it is rejected, as too long"] = counts == (21, 20, {_LONG: 1})
        shown = f"{found.seconds:.0f} s, peak {_mib(found)}, without it {_mib(usual)}"
        if found.code:
            shown += f"; exit code {found.code}: {' '.join(found.output.split()[-30:])}"
        rows.append(row(f"a document of {size / 1e9:g} GB in {name}", checks, shown))
        (folder / name).unlink()
    return {"rows": rows}


def array_tasks(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start all tasks of an array at once, on one output."""
    tokenizer(folder)
    count = options.tasks
    Texts().write(folder / "text", 2_000_000 * count, count)
    must_succeed(_shard(folder, "text", "alone", "--workers", str(options.workers)))
    processes = [
        started(_words("text", "data", "--workers", "1", "--task", f"{number}/{count}"), folder, f"task-{number}")
        for number in range(1, count + 1)
    ]
    codes = [process.wait() for process in processes]
    logs = [(folder / f"task-{number}.log").read_text(encoding="utf-8") for number in range(1, count + 1)]
    data = folder / "data"
    checks = {
        "all ended well": not any(codes),
        "one moved the output into place": sum("prepared data:" in log for log in logs) == 1,
        "the bytes of one process": data.exists() and _checksums(data) == _checksums(folder / "alone"),
        "nothing left": not list(folder.glob(".*")),
    }
    failed = [
        f"task {number}: {' '.join(log.split()[-20:])}" for number, log in enumerate(logs, 1) if codes[number - 1]
    ]
    shown = f"{sum(entry.bytes for entry in Manifest.read(folder / 'alone').splits['train']):,} bytes of shards"
    return {"rows": [row(f"{count} array tasks", checks, "; ".join([shown, *failed[:3]]))]}


def _shard(folder: Path, source: str, output: str, *words: str) -> Measured:
    return measured(_words(source, output, *words), folder)


def _words(source: str, output: str, *words: str) -> list[str | Path]:
    return preprocess("shard", "--input", source, "--tokenizer", "tokenizer", "--output", output, *words)


def _plain(file: BinaryIO | gzip.GzipFile | io.BufferedWriter, size: int) -> None:
    with file:
        file.write((_SENTENCE + b"\n\n") * 10)
        _write_long(file, size)
        file.write(b"\n\n" + (_SENTENCE + b"\n\n") * 10)


def _json_lines(path: Path, size: int) -> None:
    line = json.dumps({"text": _SENTENCE.decode()}).encode() + b"\n"
    with path.open("wb") as file:
        file.write(line * 10 + b'{"text": "')
        _write_long(file, size)
        file.write(b'"}\n' + line * 10)


def _table(path: Path, size: int) -> None:
    rows = io.StringIO()
    csv.writer(rows).writerows([[_SENTENCE.decode()]] * 10)
    with path.open("wb") as file:
        file.write(b"text\n" + rows.getvalue().encode() + b'"')
        _write_long(file, size)
        file.write(b'"\r\n' + rows.getvalue().encode())


def _write_long(file: BinaryIO | gzip.GzipFile | io.BufferedWriter, size: int) -> None:
    block = _SENTENCE * 20_000
    for _ in range(size // len(block)):
        file.write(block)
    file.write(block[: size % len(block)])


def _checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _mib(command: Measured) -> str:
    return f"{command.peak / MIB:.0f} MiB"
