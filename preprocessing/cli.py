"""The `preprocess` command: train a tokenizer, and turn raw text into token shards."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ds_roberta.data.shards import SPLITS, VALIDATION_SPLIT, Manifest
from ds_roberta.errors import UserError, run_command
from ds_roberta.files import replaced_folder
from preprocessing.encoders import AUTO, BACKENDS
from preprocessing.inputs import find_inputs
from preprocessing.plan import Unit, plan_units
from preprocessing.progress import byte_bar
from preprocessing.readers import DOCUMENT_KINDS, KEPT, ReadOptions, accepted_documents, sentences, tokenizer_lines
from preprocessing.sharding import ShardOptions, Totals, shard_corpus
from preprocessing.tokenizer import MIN_VOCAB_SIZE, is_tokenizer_folder, train_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on stderr for an error that the user can mend."""

    def command() -> None:
        options = _parser().parse_args(arguments)
        options.run(options)

    run_command(command)


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    if arguments.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size {arguments.vocab_size} is too small: 256 bytes and 5 special tokens need "
            f"at least {MIN_VOCAB_SIZE}"
        )
    options = _read_options(arguments)
    units = plan_units(_find_inputs(arguments), options)
    counts: Counter[str] = Counter()
    with replaced_folder(arguments.output, is_tokenizer_folder, "a tokenizer folder") as folder:
        size = train_tokenizer(_documents(units, options, counts), arguments.vocab_size, folder)
    if size < arguments.vocab_size:
        print(
            f"note: this text has pairs for {size} ids only, --vocab_size {arguments.vocab_size} was asked: "
            "give more text for more"
        )
    print(f"tokenizer with {size} ids, trained on {counts[KEPT]} documents: {arguments.output}")


def _documents(units: Sequence[Unit], options: ReadOptions, counts: Counter[str]) -> Iterator[list[str]]:
    with byte_bar(sum(unit.bytes for unit in units), "reading") as bar:
        for unit in units:
            for piece in unit.pieces:
                for text in accepted_documents(piece, options, counts):
                    yield tokenizer_lines(sentences(text))
                bar.update(piece.end - piece.start)
    if not counts[KEPT]:
        raise UserError("the corpus is empty: no document with text in it; give files with text as --input")
    print("learning merges …", flush=True)


def _shard(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    options = ShardOptions(_read_options(arguments), arguments.validation_fraction)
    files = _find_inputs(arguments)
    manifest, totals = shard_corpus(
        files, arguments.tokenizer, arguments.output, options, arguments.workers, arguments.tokenizer_backend
    )
    _summarise(manifest, totals, time.monotonic() - began)
    print(f"prepared data: {arguments.output}")
    documents = sum(map(manifest.documents, SPLITS))
    if options.validation_fraction and not manifest.documents(VALIDATION_SPLIT):
        print(
            f"warning: none of {documents} documents fell into validation at --validation_fraction "
            f"{options.validation_fraction}: raise it or give more documents, else nothing can be evaluated",
            file=sys.stderr,
        )


def _summarise(manifest: Manifest, totals: Totals, seconds: float) -> None:
    rejected: Counter[str] = sum((Counter(entry.rejected) for entry in manifest.inputs), Counter())
    read, kept = (sum(getattr(e, f"documents_{what}") for e in manifest.inputs) for what in ("read", "kept"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "0"
    print(f"documents   {read} read = {kept} kept + {reasons} rejected, from {len(manifest.inputs)} files")
    for split in SPLITS:
        shards = len(manifest.splits[split])
        print(f"{split:<11} {manifest.documents(split)} documents, {manifest.tokens(split)} tokens, {shards} shards")
    tokens = sum(map(manifest.tokens, SPLITS))
    size = totals.text_bytes
    print(f"text        {size / 1e6:.2f} MB, {size / tokens:.2f} bytes/token, {seconds:.1f} s")
    print(f"special     {totals.special_documents} documents with special-token letters, kept as text")


def _find_inputs(arguments: argparse.Namespace) -> tuple[str, ...]:
    inputs = find_inputs(arguments.input)
    for note in inputs.notes():
        print(note)
    return inputs.files


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    return ReadOptions(arguments.documents, arguments.text_column)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="preprocess", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    reading = _Parser(add_help=False)
    reading.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="PATH", help=".txt or .jsonl, folders, globs"
    )
    reading.add_argument(
        "--documents",
        choices=DOCUMENT_KINDS,
        default="blank-line",
        help="what makes a document of a .txt file: blank lines around it (default), the whole file, every line",
    )
    reading.add_argument("--text_column", default="text", help="the key of a .jsonl line's text (default: text)")

    train = commands.add_parser("train-tokenizer", parents=[reading], help="train a byte-level BPE of RoBERTa's kind")
    train.add_argument("--vocab_size", type=_positive, default=50265, help="number of ids (default: RoBERTa's 50265)")
    train.add_argument("--output", type=Path, required=True, metavar="DIR")
    train.set_defaults(run=_train_tokenizer)

    shard = commands.add_parser("shard", parents=[reading], help="tokenize text into memory-mapped shards")
    shard.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a RoBERTa tokenizer's folder")
    shard.add_argument("--output", type=Path, required=True, metavar="DIR")
    shard.add_argument("--workers", type=_positive, default=_cores(), help="worker processes (default: all cores)")
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
    return parser


def _positive(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


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
