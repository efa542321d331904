"""The `preprocess` command: train a tokenizer, and turn raw text into token shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ds_roberta.command_line import ArgumentParser, positive, run_command
from ds_roberta.inputs.streams import READABLE
from ds_roberta.lease import Task
from ds_roberta.options import add_options
from preprocessing.commands import ROBERTA_VOCAB_SIZE, shard, train_tokenizer
from preprocessing.prepared import megatron, show, stats, trace, verify
from preprocessing.reading.documents import ReadOptions
from preprocessing.tokens.encoders import AUTO, BACKENDS
from preprocessing.units import ShardOptions


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on stderr for an error that the user can fix.

    `preprocess verify` exits with 1 if it finds damage.
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
        ReadOptions.from_options(vars(arguments)),
        arguments.max_bad_fraction,
        arguments.allow_damaged_files,
    )


def _shard(arguments: argparse.Namespace) -> None:
    shard(
        arguments.input,
        arguments.tokenizer,
        arguments.output,
        ShardOptions.from_options(vars(arguments)),
        arguments.workers,
        arguments.tokenizer_backend,
        arguments.task,
    )


def parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="preprocess", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inputs = ArgumentParser(add_help=False)
    inputs.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]PATH",
        help=f"{READABLE} files, folders, globs, fsspec URLs, saved data sets, hf://datasets/OWNER/NAME; "
        "NAME is the name of the source",
    )

    train = commands.add_parser("train-tokenizer", parents=[inputs], help="train a byte-level BPE like RoBERTa's")
    train.add_argument(
        "--vocab_size", type=positive, default=ROBERTA_VOCAB_SIZE, help="number of ids (default: RoBERTa's %(default)s)"
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the tokenizer")
    add_options(train, ShardOptions, only=("max_bad_fraction", "allow_damaged_files"))
    add_options(train, ReadOptions)
    train.set_defaults(run=_train_tokenizer)

    sharding = commands.add_parser("shard", parents=[inputs], help="tokenize text into memory-mapped shards")
    sharding.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the tokenizer of a RoBERTa, an XLM-R or a CamemBERT",
    )
    sharding.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the prepared data")
    sharding.add_argument("--workers", type=positive, metavar="N", help="worker processes (default: all cores)")
    sharding.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="do the I-th of N shares of the work; the last to finish writes the output (default: the SLURM array's)",
    )
    sharding.add_argument(
        "--tokenizer_backend",
        choices=BACKENDS,
        default=AUTO,
        help="library that computes the ids, always the same ones: gigatoken is faster, and auto uses it if installed",
    )
    add_options(sharding, ShardOptions)
    sharding.set_defaults(run=_shard)
    for module in (verify, stats, show, trace, megatron):
        module.add_commands(commands)
    return parser


def _task(value: str) -> Task:
    number, _, count = value.partition("/")
    if not all(part.isascii() and part.isdigit() for part in (number, count)) or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"{value!r} is not a share: write a number and a count, such as 1/8 … 8/8")
    return int(number) - 1, int(count)


if __name__ == "__main__":
    main()
