"""Find documents of prepared data by number: where each is stored, its text, and where it came from.

The documents of a split are numbered from 0 through its shards. Shards do not record positions in the input: the part
of the input that a document came from is read again, as it was for the data, until its text is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import decoders

from ds_roberta.data import unigram
from ds_roberta.data.manifest import TOKENIZER_FOLDER, InputPiece
from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer_files import training_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.inputs.pieces import Piece
from ds_roberta.inputs.streams import TABLES, format_of, is_url, known_format
from preprocessing.reading.accounts import filter_checksum, kept_or_rejected
from preprocessing.reading.documents import Document, ReadOptions
from preprocessing.reading.readers import read_documents
from preprocessing.tokens.corpus_tokenizer import corpus_tokenizer
from preprocessing.tokens.encoders import HUGGINGFACE, beyond_plain, make_encoder
from preprocessing.tokens.sentence_splitting import sentence_bytes

OFFSETS_HELP = "show each document's own bytes (in tables: row) in its input, which is read again"
_PARTS_KEPT = 64
_RELATIVE = " (the path is relative to the folder in which the data was prepared)"
_Spans = dict[bytes, tuple[int, int | None]]


@dataclass(frozen=True)
class StoredDocument:
    """One document: `shard` counts from 0 within the split, `start … end` are its tokens in the shard's values.

    `source` is the part of an input that it came from, None if the manifest does not say.
    """

    number: int
    shard: int
    file: str
    row: int
    start: int
    end: int
    source: InputPiece | None


class StoredDocuments:
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

    def document(self, number: int) -> StoredDocument:
        """Return a document by number, counted from the end if negative. Raises `UserError` if there is none."""
        if not -len(self) <= number < len(self):
            raise UserError(
                f"no document {number} in split {self.split.name!r}: it has {len(self)}, numbered from 0 to "
                f"{len(self) - 1} (or from -1 back)"
            )
        number %= len(self)
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._at(shard, number - int(self._first[shard]))

    def overlapping(self, shard: int, start: int, end: int) -> Iterator[StoredDocument]:
        """Yield the documents that have tokens in `start … end` of a shard's values."""
        offsets = self.split.document_offsets(shard)
        first, last = np.searchsorted(offsets, [start, end - 1], side="right") - 1
        return (self._at(shard, row) for row in range(int(first), int(last) + 1))

    def sentences(self, document: StoredDocument) -> list[np.ndarray]:
        """Return the ids of each sentence, without the separator, as views of the file."""
        shard, values = document.shard, self.split.values(document.shard)
        bounds = zip(*self.split.sentence_bounds(shard, document.row), strict=True)
        return [self.split.checked(shard, values[start:end]) for start, end in bounds]

    def _at(self, shard: int, row: int) -> StoredDocument:
        info = self.split.shards[shard]
        start, end = self.split.document_offsets(shard)[row : row + 2].tolist()
        ends = accumulate(piece.documents for piece in info.pieces)
        source = next((piece for piece, last in zip(info.pieces, ends, strict=True) if row < last), None)
        return StoredDocument(int(self._first[shard]) + row, shard, info.file, row, start, end, source)


class Decoder:
    """Turns a document's ids back into the lines that were encoded; a Unigram gives them as it normalized them, with
    single spaces, and with `<unk>` for what it does not know."""

    def __init__(self, corpus: Corpus):
        self._tokenizer = training_tokenizer(corpus.folder / TOKENIZER_FOLDER)
        self.of_unigram = unigram.is_model(self._tokenizer)
        if self.of_unigram:
            self._tokenizer.decoder = decoders.Sequence([decoders.Replace(unigram.WORD_START, " "), decoders.Fuse()])
        else:
            self._tokenizer.decoder = decoders.ByteLevel()

    def lines(self, sentences: list[np.ndarray]) -> list[str]:
        """Return the text of each sentence; all but the first lose the space at their start."""
        first, *others = self._decoded(sentences)
        return [first, *(text.removeprefix(" ") for text in others)]

    def text(self, sentences: list[np.ndarray]) -> str:
        """Return the whole document, with a newline between sentences that were separated by white space."""
        first, *others = self._decoded(sentences)
        return "".join([first, *(f"\n{text[1:]}" if text.startswith(" ") else text for text in others)])

    def _decoded(self, sentences: list[np.ndarray]) -> list[str]:
        first, *others = (self._tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in sentences)
        return [first.removeprefix(" ") if self.of_unigram else first, *others]


class Origins:
    """Finds documents in the inputs that their data was made from.

    Raises:
        UserError: the filter that the data was made with cannot be imported, or has changed since it was.
    """

    def __init__(self, corpus: Corpus, documents: StoredDocuments, decoder: Decoder):
        known = {field.name for field in fields(ReadOptions)}
        options = corpus.manifest.options
        self._options = ReadOptions(**{name: value for name, value in options.items() if name in known})
        filter_checksum(self._options.filter)  # with another filter, other documents would be found
        self._sources = {info.path: info.source for info in corpus.manifest.inputs}
        self._documents, self._decoder = documents, decoder
        self._encoder = None
        if beyond_plain(corpus_tokenizer(corpus.folder / TOKENIZER_FOLDER).content) is not None:
            self._encoder, _ = make_encoder(HUGGINGFACE, corpus.folder / TOKENIZER_FOLDER, corpus.manifest.tokenizer)
        self._spans = lru_cache(maxsize=_PARTS_KEPT)(self._read)

    def span(self, document: StoredDocument) -> tuple[int, int | None] | str:
        """Return where the document begins in its input, and where the next one does: bytes of the (decompressed) file
        or, in tables, rows; or say why that is unknown. If several documents of a part have the same text (for a
        Unigram: the same ids), the first of them is returned.

        The end is None at the end of a compressed file.
        """
        source = document.source
        if source is None:
            return "unknown: the data does not name its input"
        if format_of(source.path) is None:
            return f"unknown: {source.path!r} is not text"
        text = self._decoder.text(self._documents.sentences(document))
        try:
            spans = self._spans(source.path, source.start, source.end)
        except UserError as error:
            what, _, _ = str(error).partition("; ")
            is_relative = not is_url(source.path) and not Path(source.path).is_absolute()
            return f"unknown: {what}{_RELATIVE if is_relative else ''}"
        return spans.get(_digest(text.encode("utf-8")), "no longer there")

    def _read(self, path: str, start: int, end: int) -> _Spans:
        found: _Spans = {}
        for text, place in self._kept(Piece(path, start, end, self._sources.get(path, ""))):
            found.setdefault(_digest(text), place)
        return found

    def _kept(self, piece: Piece) -> Iterator[tuple[bytes, tuple[int, int | None]]]:
        kind, compression = known_format(piece.path)
        last_end = None if compression else piece.end
        for item, following in pairwise(chain(read_documents(piece, self._options), [None])):
            assert item is not None
            end = item.offset + 1 if kind in TABLES else following.offset if following else last_end
            kept = kept_or_rejected(item, piece, self._options) if isinstance(item, Document) else item
            if isinstance(kept, Document):
                yield self._as_stored(sentence_bytes(kept.text, self._options.sentences)), (item.offset, end)

    def _as_stored(self, sentences: bytes) -> bytes:
        """The text that the ids of a document stand for; only a plain byte-level BPE never changes it."""
        if self._encoder is None:
            return sentences.replace(b"\r", b"")
        encoded = self._encoder.encode([sentences])
        bounds = pairwise([0, *encoded.sentence_ends.tolist()])
        return self._decoder.text([encoded.ids[start:end] for start, end in bounds]).encode("utf-8")


def _digest(text: bytes) -> bytes:
    return xxhash.xxh3_128_digest(text)
