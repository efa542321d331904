"""`preprocess show`: print documents of prepared data as text, one line per sentence, as packing sees them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_roberta.data.manifest import SPLITS, TRAIN_SPLIT
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.inputs.streams import TABLES, format_of
from preprocessing.prepared.stored_documents import OFFSETS_HELP, Decoder, Origins, StoredDocument, StoredDocuments


def show(
    documents: StoredDocuments,
    decoder: Decoder,
    document: StoredDocument,
    with_ids: bool = False,
    origins: Origins | None = None,
) -> Iterator[str]:
    """Yield the lines that show one document: where it is stored, where it came from, and its numbered sentences."""
    sentences = documents.sentences(document)
    yield (
        f"document {document.number} of {documents.split.name}: {document.end - document.start - 1} tokens, "
        f"{len(sentences)} sentences"
    )
    yield f"  shard  {document.file}, row {document.row}, values {document.start}-{document.end - 1}"
    if document.source is not None:
        source = document.source
        file_format = format_of(source.path)
        is_table = file_format is not None and file_format.kind in TABLES
        yield f"  input  {source.path}, in {'row groups' if is_table else 'bytes'} {source.start}-{source.end - 1}"
        if origins is not None:
            place = origins.span(document)
            if not isinstance(place, str):
                begin, end = place
                place = f"row {begin}" if is_table else f"byte {begin}" if end is None else f"byte {begin} to {end - 1}"
            yield f"  place  {place}"
    for number, (ids, text) in enumerate(zip(sentences, decoder.lines(sentences), strict=True), start=1):
        yield f"{number:>5}  " + text.replace("\n", "\n       ")
        if with_ids:
            yield f"       {' '.join(map(str, ids.tolist()))}"


def document_numbers(text: str, count: int) -> range:
    """Parse `N` or `FIRST:LAST` (LAST excluded); negative numbers count from the end.

    Raises:
        UserError: it is neither, or the range is empty.
    """
    try:
        if ":" not in text:
            return range(int(text), int(text) + 1)
        first, last = (int(bound) if bound else None for bound in text.split(":"))
    except ValueError:
        raise UserError(
            f"--doc {text!r} is not a document: write a number (-1 is the last) or a range such as 10:20"
        ) from None
    numbers = range(*slice(first, last).indices(count))
    if not numbers:
        raise UserError(f"--doc {text!r} contains no document: there are {count}, numbered from 0")
    return numbers


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `show` to the command line."""
    parser = commands.add_parser("show", help="show documents of prepared data as text")
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="a folder that 'preprocess shard' made")
    parser.add_argument(
        "--doc", required=True, metavar="N", help="number of a document, -1 for the last, or a range (10:20, --doc=-5:)"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default=TRAIN_SPLIT, help=f"which documents (default: {TRAIN_SPLIT})"
    )
    parser.add_argument("--ids", action="store_true", help="show the token ids under each sentence")
    parser.add_argument("--offsets", action="store_true", help=OFFSETS_HELP)
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    corpus = Corpus.open(arguments.data_dir)
    documents, decoder = StoredDocuments(corpus, arguments.split), Decoder(corpus)
    origins = Origins(corpus, documents, decoder) if arguments.offsets else None
    for number in document_numbers(arguments.doc, len(documents)):
        print("\n".join(show(documents, decoder, documents.document(number), arguments.ids, origins)))
