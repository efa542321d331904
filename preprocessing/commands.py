"""What `preprocess train-tokenizer` and `preprocess shard` do, as functions."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from ds_roberta.data.manifest import SPLITS, VALIDATION_SPLIT, Manifest, is_data_folder
from ds_roberta.errors import UserError
from ds_roberta.files import replaced_folder
from ds_roberta.inputs.paths import Inputs, find_inputs
from ds_roberta.inputs.streams import TEXT, is_url, known_format
from ds_roberta.lease import Task
from ds_roberta.options import require_fraction
from ds_roberta.progress import clock, document_bar
from preprocessing.jobs.workers import Workers, is_mpi, local_workers, mpi_workers, refuse_strangers, slurm_task
from preprocessing.reading.accounts import (
    KEPT,
    MAX_BAD_FRACTION,
    Account,
    BadDocuments,
    filter_checksum,
    kept_documents,
    refuse_damage,
    summary_lines,
    without_value_lines,
)
from preprocessing.reading.documents import ReadOptions
from preprocessing.reading.planning import Unit, plan_units
from preprocessing.sharding import Totals, run_job
from preprocessing.tokens.bpe import MIN_VOCAB_SIZE, is_tokenizer_folder, train_bpe
from preprocessing.tokens.encoders import AUTO
from preprocessing.tokens.sentence_splitting import sentence_bytes, tokenizer_lines
from preprocessing.units import ShardOptions

ROBERTA_VOCAB_SIZE = 50265


def train_tokenizer(
    inputs: Sequence[str],
    output: Path,
    vocab_size: int = ROBERTA_VOCAB_SIZE,
    options: ReadOptions | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    allow_damaged_files: bool = False,
) -> int:
    """Train a byte-level BPE like RoBERTa's on a corpus and write it to a folder, all or nothing.

    Args:
        inputs: `[NAME=]PATH` each, as `--input` takes them.
        options: how files become documents; None for the defaults.
        max_bad_fraction: the fraction of the documents that may be broken.
        allow_damaged_files: whether to skip the unreadable part of damaged files.

    Returns:
        The number of ids: `vocab_size`, or fewer if no other pair of the text occurs twice.

    Raises:
        UserError: the input is missing, empty or broken, a value out of range, the output cannot be written.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 256 bytes and 5 special tokens need at least {MIN_VOCAB_SIZE}"
        )
    require_fraction("--max_bad_fraction", max_bad_fraction)
    options = options or ReadOptions()
    _check(options)
    found = _find_inputs(inputs, options)
    units = plan_units(found.files, options, sources=found.sources, allow_damaged=allow_damaged_files)
    account = Account()
    bad = BadDocuments(max_bad_fraction, options)
    with (
        replaced_folder(output, is_tokenizer_folder, "a tokenizer folder") as folder,
        clock("learning merges") as start_clock,
    ):
        documents = _documents(units, options, bad, allow_damaged_files, account, start_clock)
        size = train_bpe(documents, vocab_size, folder)
    if size < vocab_size:
        print(
            f"note: this text has enough pairs for only {size} ids, not for --vocab_size {vocab_size}: "
            "add text for more"
        )
    for line in without_value_lines([account.without_value]):
        print(line)
    print(f"tokenizer with {size} ids, trained on {account.counts[KEPT]} documents: {output}")
    return size


def shard(
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: ShardOptions | None = None,
    workers: int | None = None,
    tokenizer_backend: str = AUTO,
    task: Task | None = None,
) -> Manifest | None:
    """Tokenize a corpus into a folder of memory-mapped shards, which appears whole or not at all.

    Args:
        inputs: `[NAME=]PATH` each, as `--input` takes them.
        tokenizer: a RoBERTa tokenizer's folder.
        options: how to read, hold out and deduplicate documents; None for the defaults.
        workers: number of processes on this machine; None for one per core, and always None under MPI.
        tokenizer_backend: one of `encoders.BACKENDS`; the ids are the same with each.
        task: which share of the work to do here, and the number of shares; None takes both from the
            SLURM array, if any.

    Returns:
        The manifest of the finished folder; None if other tasks or ranks finish it.

    Raises:
        UserError: the input, the tokenizer or a value is wrong, or the output cannot be written. See `run_job`.
    """
    began = time.monotonic()
    options = options or ShardOptions()
    _check(options.read)
    given, task = task, task or slurm_task()
    if task is not None:
        origin = "--task" if given else "the SLURM array; --task 1/1 makes a whole output in each of its tasks"
        print(f"task {task[0] + 1} of {task[1]} (from {origin})")
    with _workers(workers, is_share=given is not None) as pool:
        if pool is None:  # this rank was a worker
            return None
        found = _find_inputs(inputs, options.read)
        result = run_job(found.files, tokenizer, output, options, pool, found.sources, tokenizer_backend, task)
    if result is None:
        return None
    manifest, totals = result
    _summarise(manifest, totals, time.monotonic() - began)
    print(f"prepared data: {output}")
    documents = sum(map(manifest.documents, SPLITS))
    if options.validation_fraction and not manifest.documents(VALIDATION_SPLIT):
        print(
            f"warning: none of {documents} documents is held out for validation at --validation_fraction "
            f"{options.validation_fraction}: raise it or add documents, or nothing can be evaluated",
            file=sys.stderr,
        )
    return manifest


def _check(options: ReadOptions) -> None:
    if options.min_characters > options.max_characters:
        raise UserError(
            f"--min_characters {options.min_characters} is above --max_characters {options.max_characters}: "
            "nothing would be kept; lower the first or raise the second"
        )
    filter_checksum(options.filter)  # a module that cannot be imported ends the command here


def _find_inputs(inputs: Sequence[str], options: ReadOptions) -> Inputs:
    """The inputs, of which some are named because they are passed over, such as an earlier output in a folder of text.

    Raises:
        UserError: as `find_inputs`; or all are prepared data, or text files that have none of the columns in `options`.
    """
    found = find_inputs(inputs)
    folders = {path: Path(path).parent.parent for path in found.files if path.endswith(".arrow") and not is_url(path)}
    of_data = {folder for folder in set(folders.values()) if is_data_folder(folder)}
    prepared = {path: folder for path, folder in folders.items() if folder in of_data}
    if prepared:
        files = tuple(path for path in found.files if path not in prepared)
        names = tuple(dict.fromkeys(map(str, prepared.values())))
        if not files:
            raise UserError(f"{names[0]!r} is prepared data, not text: give the text that it was made of")
        found = replace(found, files=files, passed_over={**found.passed_over, "ignored (prepared data)": names})
    for note in found.notes():
        print(note)
    if all(known_format(path).kind == TEXT for path in found.files):
        for name in ("text_column", "id_column", "source_column"):
            column = getattr(options, name)
            if column != getattr(ReadOptions, name):
                raise UserError(
                    f"--{name} {column!r} names a column, but all inputs are text files, which have none: leave it "
                    "out (NAME=PATH names a source)"
                )
    return found


def _documents(
    units: Sequence[Unit],
    options: ReadOptions,
    bad: BadDocuments,
    allow_damaged: bool,
    total: Account,
    at_the_end: Callable[[], None],
) -> Iterator[list[str]]:
    with document_bar(sum(unit.bytes for unit in units), "reading") as update:
        for piece in (piece for unit in units for piece in unit.pieces):
            account = Account()
            for document in kept_documents(piece, options, account):
                update(0, 1)
                yield tokenizer_lines(sentence_bytes(document.text, options.sentences)).decode().split("\n")
            if not allow_damaged:
                refuse_damage({piece.path: account})
            bad.add({piece.path: account})
            total.add(account)
            update(piece.bytes, 0)
    bad.check()
    bad.check_columns()
    if not total.counts[KEPT]:
        raise UserError("the corpus is empty: no document has text in it; choose files with text as --input")
    print("learning merges …", flush=True)
    at_the_end()


def _workers(workers: int | None, is_share: bool = False) -> AbstractContextManager[Workers | None]:
    """
    Args:
        is_share: whether this process has been given its share of the work.
    """
    if not is_share:
        refuse_strangers()
    if not is_mpi():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return local_workers(workers or cores)
    if workers is not None:
        raise UserError(f"--workers {workers} is for one machine: under mpirun, -n sets the number, so leave it out")
    return mpi_workers()


def _summarise(manifest: Manifest, totals: Totals, seconds: float) -> None:
    for line in summary_lines(manifest.inputs):
        print(line)
    for split in SPLITS:
        shards = len(manifest.splits[split])
        print(f"{split:<11} {manifest.documents(split)} documents, {manifest.tokens(split)} tokens, {shards} shards")
    tokens = sum(map(manifest.tokens, SPLITS))
    size = totals.text_bytes
    print(f"text        {size / 1e6:.2f} MB, {size / tokens:.2f} bytes/token, {seconds:.1f} s")
    print(f"special     {totals.special_documents} documents with special-token letters, kept as text")
    if totals.unknown_tokens:
        print(
            f"unknown     {totals.unknown_tokens} tokens ({totals.unknown_tokens / tokens:.2%}) are <unk>: characters "
            "that the tokenizer does not know"
        )
