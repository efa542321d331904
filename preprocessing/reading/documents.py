"""A document, and the options by which files become documents."""

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
        r"what ends a line within a document: \n, \r\n and \r, or Unicode's other line and paragraph ends too, which "
        "never separate documents",
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


class Document(NamedTuple):
    """A document's text, where it begins (as in `Reject`), and its id and source if the input has them."""

    text: str
    offset: int
    id: str | None = None
    source: str | None = None
