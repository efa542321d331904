"""The types that the plan, the readers and the accounts exchange: pieces of files, documents, rejects and damage; and
the reading options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ds_roberta.options import Settings, option, require_positive


@dataclass(frozen=True)
class ReadOptions(Settings):
    """How files become documents; the output's bytes depend on these."""

    documents: str = option(
        "what separates documents in a .txt file: blank lines, nothing (the file is one), or the end of each line",
        "blank-line",
        choices=("blank-line", "file", "line"),
    )
    text_column: str = option("key or column that holds the text", "text")
    id_column: str | None = option("column that holds a document's id, for --filter", None)
    source_column: str | None = option(
        "column that holds a document's source, for --filter and training's --source_weights", None
    )
    normalization: str = option("Unicode normalization", "none", choices=("none", "NFC", "NFKC"))
    newlines: str = option(
        r"what ends a line: \n, \r\n and \r, or Unicode's other line and paragraph ends too",
        "universal",
        choices=("universal", "unicode"),
    )
    min_characters: int = option("shorter documents are rejected", 1, check=require_positive)
    max_characters: int = option(
        "longer documents are rejected; each worker holds a whole document and its tokens in memory",
        2_000_000,
        check=require_positive,
    )
    sentences: str = option(
        "what packing keeps whole: lines, or also sentences within lines, found by rules that know the marks of most "
        "scripts (Thai and Lao have none)",
        "lines",
        choices=("lines", "rules"),
    )
    filter: str | None = option(
        "called with the text and {'id', 'source'} of each document; True keeps it, False or a reason rejects it",
        None,
        metavar="MODULE:FUNCTION",
    )

    @property
    def longest_raw(self) -> int:
        """A document with more bytes than this in its file is too long; it is not decoded.

        A character has at most 6 bytes in JSON (12 outside the basic plane); the rest is for the other columns.
        """
        return 8 * self.max_characters + (1 << 20)


@dataclass(frozen=True)
class Piece:
    """A part of a file that begins and ends between documents, and the name of the source that it belongs to.

    `start … end` are bytes of a plain text file, all bytes of a compressed one, row groups of a Parquet file and
    record batches of an Arrow file. `weight` is the size of a table's piece for the plan.
    """

    path: str
    start: int
    end: int
    source: str = ""
    weight: int = 0

    @property
    def bytes(self) -> int:
        return self.weight or self.end - self.start


class Document(NamedTuple):
    """A document's text, where it begins (as in `Reject`), and its id and source if the input has them."""

    text: str
    offset: int
    id: str | None = None
    source: str | None = None


class Reject(NamedTuple):
    """A document that is not kept: why not, and where it begins.

    `offset` is a byte of the (decompressed) file, or a row of a table, both counted from 0. `documents` is above 1
    if that many rows share the reason. `bytes` is the size of a document that is too long.
    """

    reason: str
    offset: int
    detail: str = ""
    documents: int = 1
    bytes: int = 0


class Damage(NamedTuple):
    """A part of a file that cannot be read; it is unknown how many documents it held.

    `offset` is where it begins, as in `Reject`. `documents` is the number of rows known to be lost, or 0.
    """

    reason: str
    offset: int
    detail: str
    documents: int = 0
