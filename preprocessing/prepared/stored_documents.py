"""Documents of prepared data by their number: where each lies, what it came from, and its text.

The documents of a split are numbered from 0 through its shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from tokenizers import Tokenizer, decoders

from ds_roberta.data.shards import TOKENIZER_FOLDER, Corpus, InputPiece
from ds_roberta.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document: `shard` counts from 0 within the split, `start … end` are its place in the shard's values.

    `source` is the part of an input that it came from, None where the manifest does not know.
    """

    number: int
    shard: int
    file: str
    row: int
    start: int
    end: int
    source: InputPiece | None


class Documents:
    """The documents of one split.

    Raises:
        UserError: the data has no such split.
    """

    def __init__(self, corpus: Corpus, split: str):
        if not corpus.manifest.documents(split):
            splits = [name for name in corpus.manifest.splits if corpus.manifest.documents(name)]
            raise UserError(f"no split {split!r} in {str(corpus.folder)!r}: it has {', '.join(splits)}")
        self.split = corpus.split(split)
        self._first = np.cumsum([0, *(info.documents for info in self.split.shards)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def document(self, number: int) -> Document:
        """The document of this number, counted from the end where negative. Raises `UserError` where there is none."""
        if not -len(self) <= number < len(self):
            raise UserError(
                f"no document {number} in split {self.split.name!r}: it has {len(self)}, numbered from 0 to "
                f"{len(self) - 1} (or from -1 back)"
            )
        number %= len(self)
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._at(shard, number - int(self._first[shard]))

    def overlapping(self, shard: int, start: int, end: int) -> Iterator[Document]:
        """The documents that have tokens in `start … end` of a shard's values."""
        offsets = self.split.document_offsets(shard)
        first, last = np.searchsorted(offsets, [start, end - 1], side="right") - 1
        return (self._at(shard, row) for row in range(int(first), int(last) + 1))

    def sentences(self, document: Document) -> list[np.ndarray]:
        """The ids of each sentence, without the separator: views of the file."""
        values = self.split.values(document.shard)
        bounds = [document.start, *(document.start + self.split.sentence_ends(document.shard, document.row)).tolist()]
        return [values[start:end] for start, end in pairwise(bounds)]

    def _at(self, shard: int, row: int) -> Document:
        info = self.split.shards[shard]
        start, end = self.split.document_offsets(shard)[row : row + 2].tolist()
        behind = accumulate(piece.documents for piece in info.pieces)
        source = next((piece for piece, last in zip(info.pieces, behind, strict=True) if row < last), None)
        return Document(int(self._first[shard]) + row, shard, info.file, row, start, end, source)


class Decoder:
    """Turns a document's ids back into the lines that were encoded."""

    def __init__(self, corpus: Corpus):
        self._tokenizer = Tokenizer.from_file(str(corpus.folder / TOKENIZER_FOLDER / "tokenizer.json"))
        self._tokenizer.decoder = decoders.ByteLevel()

    def lines(self, sentences: list[np.ndarray]) -> list[str]:
        """The text of each sentence; the space by which all but the first open is dropped."""
        first, *others = self._decoded(sentences)
        return [first, *(text.removeprefix(" ") for text in others)]

    def text(self, sentences: list[np.ndarray]) -> str:
        """The whole document, its sentences apart by a newline where white space is between them."""
        first, *others = self._decoded(sentences)
        return "".join([first, *(f"\n{text[1:]}" if text.startswith(" ") else text for text in others)])

    def _decoded(self, sentences: list[np.ndarray]) -> list[str]:
        return [self._tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in sentences]
