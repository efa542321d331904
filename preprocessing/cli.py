"""The `preprocess` command: train a tokenizer, and turn raw text into token shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ds_roberta.command_line import ArgumentParser, fraction, positive, run_command
from preprocessing.commands import ROBERTA_VOCAB_SIZE, shard, train_tokenizer
from preprocessing.dedup import DEDUP_KINDS
from preprocessing.jobs.job import Task
from preprocessing.prepared import megatron, show, stats, trace, verify
from preprocessing.reading.accounts import MAX_BAD_FRACTION
from preprocessing.reading.documents import DOCUMENT_KINDS, MAX_CHARACTERS, NEWLINES, NORMALIZATIONS, ReadOptions
from preprocessing.reading.streams import READABLE
from preprocessing.tokens.encoders import AUTO, BACKENDS
from preprocessing.tokens.sentence_splitting import SENTENCE_KINDS
from preprocessing.units import ShardOptions


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on stderr for an error that the user can mend.

    `preprocess verify` exits with 1 where it found damage.
    """

    def command() -> int | None:
        options = parser().parse_args(arguments)
        return options.run(options)

    run_command(command)


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    train_tokenizer(
        arguments.input,
        arguments.output,
        arguments.vocab_size,
        _read_options(arguments),
        arguments.max_bad_fraction,
        arguments.allow_damaged_files,
    )


def _shard(arguments: argparse.Namespace) -> None:
    options = ShardOptions(
        _read_options(arguments),
        arguments.validation_fraction,
        max_bad_fraction=arguments.max_bad_fraction,
        dedup=arguments.dedup,
        allow_damaged_files=arguments.allow_damaged_files,
    )
    shard(
        arguments.input,
        arguments.tokenizer,
        arguments.output,
        options,
        arguments.workers,
        arguments.tokenizer_backend,
        arguments.task,
    )


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    return ReadOptions(**{field.name: getattr(arguments, field.name) for field in fields(ReadOptions)})


def parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="preprocess", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    reading = ArgumentParser(add_help=False)
    _add_reading_arguments(reading)

    train = commands.add_parser("train-tokenizer", parents=[reading], help="train a byte-level BPE of RoBERTa's kind")
    train.add_argument(
        "--vocab_size", type=positive, default=ROBERTA_VOCAB_SIZE, help="ids (default: RoBERTa's %(default)s)"
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR")
    train.set_defaults(run=_train_tokenizer)

    sharding = commands.add_parser("shard", parents=[reading], help="tokenize text into memory-mapped shards")
    sharding.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a RoBERTa tokenizer's folder")
    sharding.add_argument("--output", type=Path, required=True, metavar="DIR")
    sharding.add_argument("--workers", type=positive, metavar="N", help="worker processes (default: all cores)")
    sharding.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="do the I-th of N shares of the work; the last to finish writes the output (default: the SLURM array's)",
    )
    sharding.add_argument(
        "--dedup",
        choices=DEDUP_KINDS,
        default="none",
        help="drop documents that occur again: exact copies, or near ones (MinHash) too (default: none)",
    )
    sharding.add_argument(
        "--validation_fraction", type=fraction, default=0.01, help="documents held out, 0 ≤ F < 1 (default: 0.01)"
    )
    sharding.add_argument(
        "--tokenizer_backend",
        choices=BACKENDS,
        default=AUTO,
        help="what makes the ids, which are the same: gigatoken is faster, auto takes it where it is installed",
    )
    sharding.set_defaults(run=_shard)
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
    reading.add_argument("--min_characters", type=positive, default=1, help="shorter documents are rejected")
    reading.add_argument(
        "--max_characters",
        type=positive,
        default=MAX_CHARACTERS,
        help=f"longer documents are rejected; a worker's memory grows with it (default: {MAX_CHARACTERS})",
    )
    reading.add_argument(
        "--sentences",
        choices=SENTENCE_KINDS,
        default="lines",
        help="what packing keeps whole: lines (default), or sentences inside lines too, by rules, which know the marks "
        "of most scripts (Thai and Lao have none)",
    )
    reading.add_argument(
        "--filter",
        metavar="MODULE:FUNCTION",
        help="called with the text and {'id', 'source'} of each document; True keeps it, False or a reason rejects it",
    )
    reading.add_argument(
        "--max_bad_fraction",
        type=fraction,
        default=MAX_BAD_FRACTION,
        help="stop where more documents than this fraction are broken: not UTF-8, bad JSON, no text column "
        f"(default: {MAX_BAD_FRACTION})",
    )
    reading.add_argument(
        "--allow_damaged_files",
        action="store_true",
        help="read what can be read of files that are truncated or corrupt, or that never close a quote of a .csv; "
        "what is lost is named at the end (default: stop at the first)",
    )


def _task(value: str) -> Task:
    number, _, count = value.partition("/")
    if not all(part.isascii() and part.isdigit() for part in (number, count)) or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"{value!r} is not a share: give a number and a count, such as 1/8 … 8/8")
    return int(number) - 1, int(count)


if __name__ == "__main__":
    main()
