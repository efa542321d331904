"""Where in its input a document of prepared data stands.

Shards do not hold the places of their documents. The part of the input that a document came from is read again, as it
was for the data, until its text is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from itertools import pairwise

import xxhash

from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from preprocessing.prepared.stored_documents import Decoder, Document, Documents
from preprocessing.reading.accept import judge
from preprocessing.reading.documents import Document as ReadDocument
from preprocessing.reading.documents import Piece, ReadOptions
from preprocessing.reading.formats import TABLES, known_format
from preprocessing.reading.readers import read_documents
from preprocessing.tokens.sentence_splitting import sentence_bytes

OFFSETS_HELP = "give each document's own bytes (in tables: row) in its input, which is read again"
_PARTS_KEPT = 64
_Spans = dict[bytes, tuple[int, int | None]]


class Origins:
    """Finds documents in the inputs that their data was made of."""

    def __init__(self, corpus: Corpus, documents: Documents, decoder: Decoder):
        known = {field.name for field in fields(ReadOptions)}
        options = corpus.manifest.options
        self._options = ReadOptions(**{name: value for name, value in options.items() if name in known})
        self._documents, self._decoder = documents, decoder
        self._spans = lru_cache(maxsize=_PARTS_KEPT)(self._read)

    def span(self, document: Document) -> tuple[int, int | None] | None:
        """Where the document begins in its input and where what follows it does: bytes of the (decompressed) file or,
        in tables, rows. Of documents with the same text in one part it is the first.

        The end is None at the end of a compressed file; all is None where the input is not known or no longer holds
        the text.
        """
        if document.source is None:
            return None
        text = self._decoder.text(self._documents.sentences(document))
        source = document.source
        try:
            return self._spans(source.path, source.start, source.end).get(_digest(text.encode("utf-8")))
        except UserError:  # the input is not where it was
            return None

    def _read(self, path: str, start: int, end: int) -> _Spans:
        found: _Spans = {}
        for text, place in self._kept(Piece(path, start, end)):
            found.setdefault(_digest(text), place)
        return found

    def _kept(self, piece: Piece) -> Iterator[tuple[bytes, tuple[int, int | None]]]:
        kind, compression = known_format(piece.path)
        items = list(read_documents(piece, self._options))
        offsets = [item.offset for item in items]
        if kind in TABLES:
            ends: list[int | None] = [offset + 1 for offset in offsets]
        else:
            ends = [*(following for _, following in pairwise(offsets)), None if compression else piece.end]
        for item, end in zip(items, ends, strict=True):
            kept = judge(item, piece, self._options) if isinstance(item, ReadDocument) else item
            if isinstance(kept, ReadDocument):
                text = sentence_bytes(kept.text, self._options.sentences)
                yield text.replace(b"\r", b""), (item.offset, end)


def _digest(text: bytes) -> bytes:
    return xxhash.xxh3_128_digest(text)
