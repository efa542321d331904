"""Documents as ids, in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ds_roberta.data.tokenizer import TokenizerInfo


class Encoded(NamedTuple):
    """Documents as ids, in flat arrays, one document after the other."""

    ids: np.ndarray
    """(tokens,) uint16 or uint32; every document ends with `</s>`."""
    lengths: np.ndarray
    """(documents,) int64, tokens of each document with its `</s>`."""
    sentence_ends: np.ndarray
    """(sentences,) uint32, offset in its document after the last token of every sentence."""
    sentence_counts: np.ndarray
    """(documents,) int64, sentences of each document."""

    def select(self, chosen: np.ndarray) -> Encoded:
        """Return the documents where `chosen`, (documents,) bool, is true."""
        return Encoded(
            _rows(self.ids, self.lengths, chosen),
            self.lengths[chosen],
            _rows(self.sentence_ends, self.sentence_counts, chosen),
            self.sentence_counts[chosen],
        )

    def without_empty_sentences(self, filler: int) -> Encoded:
        """Return the documents without their sentences that have no tokens; a document of only such gets `filler`."""
        sizes = np.diff(self.sentence_ends.astype(np.int64), prepend=0)
        firsts = np.cumsum(self.sentence_counts) - self.sentence_counts
        sizes[firsts] = self.sentence_ends[firsts]
        if sizes.all():
            return self
        ids, ends = [], []
        documents = np.split(self.ids, np.cumsum(self.lengths)[:-1])
        sentences = np.split(self.sentence_ends, np.cumsum(self.sentence_counts)[:-1])
        for values, bounds in zip(documents, sentences, strict=True):
            is_empty = len(values) == 1
            ids.append(np.insert(values, 0, filler) if is_empty else values)
            ends.append(np.unique(bounds[:1] + 1 if is_empty else bounds[bounds > 0]))
        lengths, counts = (np.fromiter(map(len, rows), np.int64, len(rows)) for rows in (ids, ends))
        return Encoded(np.concatenate(ids), lengths, np.concatenate(ends), counts)

    @classmethod
    def concatenate(cls, parts: Sequence[Encoded]) -> Encoded:
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def _rows(values: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the values of the rows where `chosen` is true, copied run by run, as most rows are in a few long runs."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    bounds = np.concatenate([[0], np.cumsum(lengths)])[edges].tolist()
    runs = zip(bounds[::2], bounds[1::2], strict=True)
    return np.concatenate([values[:0], *(values[begin:end] for begin, end in runs)])


def close_documents(
    ids: np.ndarray, line_lengths: np.ndarray, sentence_counts: np.ndarray, info: TokenizerInfo
) -> Encoded:
    """Put `</s>` after every document, and count sentence ends from the beginning of their document."""
    last_lines = np.cumsum(sentence_counts) - 1
    line_ends = np.cumsum(line_lengths)
    document_ends = line_ends[last_lines]
    lengths = np.diff(document_ends, prepend=0)
    closed = np.full(len(ids) + len(lengths), info.eos_token_id, ids.dtype)
    places = np.ones(len(closed), bool)
    places[document_ends + np.arange(len(lengths))] = False
    closed[places] = ids
    sentence_ends = line_ends - np.repeat(document_ends - lengths, sentence_counts)
    return Encoded(closed, lengths + 1, sentence_ends.astype(np.uint32), sentence_counts)
