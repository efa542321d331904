"""The `preprocess` command: train a tokenizer, and turn raw text into token shards."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

from ds_roberta.data.shards import SPLITS, VALIDATION_SPLIT, Manifest
from ds_roberta.errors import ArgumentParser, UserError, run_command
from ds_roberta.files import replaced_folder
from preprocessing import megatron, show, stats, trace, verify
from preprocessing.accept import accepted_documents, load_filter
from preprocessing.accounts import KEPT, MAX_BAD_FRACTION, Account, BadDocuments, summary_lines
from preprocessing.dedup import DEDUP_KINDS
from preprocessing.encoders import AUTO, BACKENDS
from preprocessing.formats import READABLE
from preprocessing.inputs import Inputs, find_inputs
from preprocessing.job import Task
from preprocessing.pieces import DOCUMENT_KINDS, MAX_CHARACTERS, NEWLINES, NORMALIZATIONS, ReadOptions
from preprocessing.plan import Unit, plan_units
from preprocessing.progress import byte_bar
from preprocessing.sentences import SENTENCE_KINDS, sentences, tokenizer_lines
from preprocessing.sharding import Totals, run_job
from preprocessing.tokenizer import MIN_VOCAB_SIZE, is_tokenizer_folder, train_tokenizer
from preprocessing.units import ShardOptions
from preprocessing.workers import Workers, is_mpi, local_workers, mpi_workers, slurm_task

_PIPE_CLOSED_EXIT_CODE = 141
"""What a shell reports of a command that SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on stderr for an error that the user can mend.

    `preprocess verify` exits with 1 where it found damage.
    """

    def command() -> int | None:
        options = parser().parse_args(arguments)
        try:
            code = options.run(options)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads our output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = _PIPE_CLOSED_EXIT_CODE
        return code

    run_command(command)


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    if arguments.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size {arguments.vocab_size} is too small: 256 bytes and 5 special tokens need "
            f"at least {MIN_VOCAB_SIZE}"
        )
    options = _read_options(arguments)
    units = plan_units(_find_inputs(arguments).files, options)
    account = Account()
    with replaced_folder(arguments.output, is_tokenizer_folder, "a tokenizer folder") as folder:
        documents = _documents(units, options, BadDocuments(arguments.max_bad_fraction), account)
        size = train_tokenizer(documents, arguments.vocab_size, folder)
    if size < arguments.vocab_size:
        print(
            f"note: this text has pairs for {size} ids only, --vocab_size {arguments.vocab_size} was asked: "
            "give more text for more"
        )
    print(f"tokenizer with {size} ids, trained on {account.counts[KEPT]} documents: {arguments.output}")


def _documents(units: Sequence[Unit], options: ReadOptions, bad: BadDocuments, total: Account) -> Iterator[list[str]]:
    with byte_bar(sum(unit.bytes for unit in units), "reading") as bar:
        for piece in (piece for unit in units for piece in unit.pieces):
            account = Account()
            for document in accepted_documents(piece, options, account):
                yield tokenizer_lines(sentences(document.text, options.sentences))
            bad.add({piece.path: account})
            total.add(account)
            bar.update(piece.bytes)
    bad.check()
    if not total.counts[KEPT]:
        raise UserError("the corpus is empty: no document with text in it; give files with text as --input")
    print("learning merges …", flush=True)


def _shard(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    options = ShardOptions(
        _read_options(arguments),
        arguments.validation_fraction,
        max_bad_fraction=arguments.max_bad_fraction,
        dedup=arguments.dedup,
    )
    task = arguments.task or slurm_task()
    if task is not None:
        print(f"task {task[0] + 1} of {task[1]} (from {'--task' if arguments.task else 'the SLURM array'})")
    with _workers(arguments) as workers:
        if workers is None:  # a rank that served another
            return
        inputs = _find_inputs(arguments)
        result = run_job(
            inputs.files,
            arguments.tokenizer,
            arguments.output,
            options,
            workers,
            inputs.sources,
            arguments.tokenizer_backend,
            task,
        )
    if result is None:
        return
    manifest, totals = result
    _summarise(manifest, totals, time.monotonic() - began)
    print(f"prepared data: {arguments.output}")
    documents = sum(map(manifest.documents, SPLITS))
    if options.validation_fraction and not manifest.documents(VALIDATION_SPLIT):
        print(
            f"warning: none of {documents} documents fell into validation at --validation_fraction "
            f"{options.validation_fraction}: raise it or give more documents, else nothing can be evaluated",
            file=sys.stderr,
        )


def _workers(arguments: argparse.Namespace) -> AbstractContextManager[Workers | None]:
    if not is_mpi():
        return local_workers(arguments.workers or _cores())
    if arguments.workers is not None:
        raise UserError(
            f"--workers {arguments.workers} is for one machine: under mpirun -n gives the number, leave it out"
        )
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


def _find_inputs(arguments: argparse.Namespace) -> Inputs:
    inputs = find_inputs(arguments.input)
    for note in inputs.notes():
        print(note)
    return inputs


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    if arguments.min_characters > arguments.max_characters:
        raise UserError(
            f"--min_characters {arguments.min_characters} is above --max_characters {arguments.max_characters}: "
            "nothing would be kept; lower the one or raise the other"
        )
    if arguments.filter is not None:
        load_filter(arguments.filter)
    return ReadOptions(**{field.name: getattr(arguments, field.name) for field in fields(ReadOptions)})


def parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="preprocess", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    reading = ArgumentParser(add_help=False)
    _add_reading_arguments(reading)

    train = commands.add_parser("train-tokenizer", parents=[reading], help="train a byte-level BPE of RoBERTa's kind")
    train.add_argument("--vocab_size", type=_positive, default=50265, help="number of ids (default: RoBERTa's 50265)")
    train.add_argument("--output", type=Path, required=True, metavar="DIR")
    train.set_defaults(run=_train_tokenizer)

    shard = commands.add_parser("shard", parents=[reading], help="tokenize text into memory-mapped shards")
    shard.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a RoBERTa tokenizer's folder")
    shard.add_argument("--output", type=Path, required=True, metavar="DIR")
    shard.add_argument("--workers", type=_positive, metavar="N", help="worker processes (default: all cores)")
    shard.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="do the I-th of N shares of the work; the last to finish writes the output (default: the SLURM array's)",
    )
    shard.add_argument(
        "--dedup",
        choices=DEDUP_KINDS,
        default="none",
        help="drop documents that occur again: exact copies, or near ones (MinHash) too (default: none)",
    )
    shard.add_argument(
        "--validation_fraction", type=_fraction, default=0.01, help="documents held out, 0 ≤ F < 1 (default: 0.01)"
    )
    shard.add_argument(
        "--tokenizer_backend",
        choices=BACKENDS,
        default=AUTO,
        help="what makes the ids, which are the same: gigatoken is faster, auto takes it where it is installed",
    )
    shard.set_defaults(run=_shard)
    for module in (verify, stats, show, trace, megatron):
        module.add_commands(commands)
    return parser


def _add_reading_arguments(reading: argparse.ArgumentParser) -> None:
    """What both commands are told of the input: a field of `ReadOptions` each, and how much may be bad."""
    reading.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]PATH",
        help=f"{READABLE} files, folders, globs, fsspec URLs, saved data sets, hf://datasets/OWNER/NAME; "
        "NAME is the name of the source",
    )
    reading.add_argument(
        "--documents",
        choices=DOCUMENT_KINDS,
        default="blank-line",
        help="what makes a document of a .txt file: blank lines around it (default), the whole file, every line",
    )
    reading.add_argument("--text_column", default="text", help="the key or column of the text (default: text)")
    reading.add_argument("--id_column", help="the column of a document's id, for --filter")
    reading.add_argument(
        "--source_column", help="the column of a document's source, for --filter and training's --source_weights"
    )
    reading.add_argument(
        "--normalization", choices=NORMALIZATIONS, default="none", help="Unicode normalization (default: none)"
    )
    reading.add_argument(
        "--newlines",
        choices=NEWLINES,
        default="universal",
        help=r"what ends a line: \n, \r\n and \r (default), or Unicode's other line and paragraph ends too",
    )
    reading.add_argument("--min_characters", type=_positive, default=1, help="shorter documents are rejected")
    reading.add_argument(
        "--max_characters",
        type=_positive,
        default=MAX_CHARACTERS,
        help=f"longer documents are rejected; a worker's memory grows with it (default: {MAX_CHARACTERS})",
    )
    reading.add_argument(
        "--sentences",
        choices=SENTENCE_KINDS,
        default="lines",
        help="what packing keeps whole: lines (default), or sentences inside lines too, by rules",
    )
    reading.add_argument(
        "--filter",
        metavar="MODULE:FUNCTION",
        help="called with the text and {'id', 'source'} of each document; True keeps it, False or a reason rejects it",
    )
    reading.add_argument(
        "--max_bad_fraction",
        type=_fraction,
        default=MAX_BAD_FRACTION,
        help="stop where more documents than this fraction are broken: not UTF-8, bad JSON, no text column, "
        f"damaged files (default: {MAX_BAD_FRACTION})",
    )


def _positive(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def _task(value: str) -> Task:
    number, _, count = value.partition("/")
    if not all(part.isascii() and part.isdigit() for part in (number, count)) or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"{value!r} is not a share: give a number and a count, such as 1/8 … 8/8")
    return int(number) - 1, int(count)


def _fraction(value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a fraction: give a number from 0 to below 1, such as 0.01")
    return fraction


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
