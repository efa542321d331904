"""Count models: what is known of masked tokens without learning, to compare a model's held-out loss with.

* The **unigram** model knows how often each token occurs in the training split. A model whose held-out loss is no lower
  has learned nothing else.
* The **neighbour** model also knows which tokens occurred after the left neighbour and which before the right one. A
  model whose loss is higher has not learned the order of neighbouring words.

Both interpolate relative frequencies linearly (Jelinek and Mercer 1980, "Interpolated estimation of Markov source
parameters from sparse data"), down to the uniform distribution. The weights depend on how often the neighbours were
counted, in buckets; expectation-maximization finds them on a part of the sample that is not counted meanwhile (Chen and
Goodman 1998, "An empirical study of smoothing techniques for language modeling", TR-10-98, section 2.3).

The numbers are a function of the data and the masks alone. A sample of the data is counted, in constant memory.

Shapes: N tokens, M masked tokens, V vocabulary, K components of the mixture, C cells, each with its own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ds_roberta.data.loader import Collator, MicroBatch, held_out_sequences
from ds_roberta.data.manifest import TRAIN_SPLIT
from ds_roberta.data.shards import Corpus, Split
from ds_roberta.data.tokenizer import TokenizerInfo

UNIGRAM_LOSS, NEIGHBOUR_LOSS = "unigram_loss", "neighbour_loss"
"""The names of the two losses in metrics and states."""
SAMPLE_TOKENS = 1 << 22
"""The most tokens of the training split that are counted."""
_PIECE_TOKENS = 1 << 13
_TUNING_EVERY = 40
"""One piece of the sample in this many is used to find the weights."""
_ITERATIONS = 20
_BUCKETS = 16
_UNKNOWN = -1
"""Stands for a neighbour that says nothing: a special token, the mask among them, or the end of a piece."""
_SEQUENCES_AT_ONCE = 256


class Predicted(NamedTuple):
    """Ordinary tokens and their neighbours, which may be `_UNKNOWN`: three (M,) int64."""

    tokens: np.ndarray
    left: np.ndarray
    right: np.ndarray


class _Frequencies:
    """How often tokens occurred in contexts.

    Args:
        contexts: (N,) int64, their numbers; what is in the context `_UNKNOWN` is not counted.
        tokens: (N,) int64, below `vocab_size`.
    """

    def __init__(self, contexts: np.ndarray, tokens: np.ndarray, vocab_size: int):
        self._vocab_size = vocab_size
        self._keys, counts = np.unique((contexts * vocab_size + tokens)[contexts != _UNKNOWN], return_counts=True)
        self._before = np.concatenate([[0], np.cumsum(counts)])

    def of(self, contexts: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each context was counted, and each token in it: two (M,) int64."""
        keys = contexts * self._vocab_size
        return self._between(keys, keys + self._vocab_size), self._between(keys + tokens, keys + tokens + 1)

    def _between(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        return self._before[np.searchsorted(self._keys, end)] - self._before[np.searchsorted(self._keys, first)]


class CountModel:
    """The probabilities of ordinary tokens from the tokens beside them; without these, from their frequencies alone.

    Args:
        pieces: contiguous pieces of text, each (N,) integers.
    """

    def __init__(self, pieces: list[np.ndarray], tokenizer: TokenizerInfo):
        self._tokenizer = tokenizer
        self._is_ordinary = np.ones(tokenizer.vocab_size, dtype=bool)
        self._is_ordinary[list(tokenizer.special_ids)] = False
        self._frequencies = self._count([piece for number, piece in enumerate(pieces, 1) if number % _TUNING_EVERY])
        self._weights = self._tune(self._text(pieces[_TUNING_EVERY - 1 :: _TUNING_EVERY]))
        self._frequencies = self._count(pieces)

    @classmethod
    def of(cls, corpus: Corpus) -> CountModel:
        """Count a corpus's training split, which must have documents."""
        return cls(sample(corpus.split(TRAIN_SPLIT)), corpus.manifest.tokenizer)

    def losses(self, collator: Collator, sequences: int) -> dict[str, float]:
        """The held-out losses by their names, in nats per masked token.

        Args:
            collator: collates the held-out split, with `evaluation_masker` of a `Masker` that labels tokens by ids.
            sequences: as in `HeldOutSample`: the losses are of the same masked tokens as a model's.
        """
        chosen = held_out_sequences(len(collator.packed), sequences)
        sums, labels = dict.fromkeys((UNIGRAM_LOSS, NEIGHBOUR_LOSS), 0.0), 0
        for first in range(0, len(chosen), _SEQUENCES_AT_ONCE):
            part = chosen[first : first + _SEQUENCES_AT_ONCE]
            masked = self.masked(collator.collate(part, part))
            for name, probabilities in ((UNIGRAM_LOSS, self.unigram(masked)), (NEIGHBOUR_LOSS, self.neighbour(masked))):
                sums[name] -= float(np.log(probabilities).sum())
            labels += len(masked.tokens)
        return {name: value / max(labels, 1) for name, value in sums.items()}

    def masked(self, batch: MicroBatch) -> Predicted:
        """A micro-batch's masked tokens, with the neighbours that the masks leave."""
        ids, positions, labels = (each.numpy() for each in (batch.input_ids, batch.masked_positions, batch.labels))
        return self._predicted(ids.reshape(-1), positions, labels)

    def unigram(self, predicted: Predicted) -> np.ndarray:
        """The tokens' probabilities from their frequencies: (M,) float64."""
        unknown = np.full_like(predicted.tokens, _UNKNOWN)
        return self.neighbour(Predicted(predicted.tokens, unknown, unknown))

    def neighbour(self, predicted: Predicted) -> np.ndarray:
        """The tokens' probabilities from their neighbours: (M,) float64."""
        components, cells = self._components(predicted)
        return (components * self._weights[cells]).sum(axis=1)

    def _predicted(self, ids: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> Predicted:
        """`tokens` with what is beside their positions, none of which is the first or last, in `ids`."""
        left, right = ids[positions - 1], ids[positions + 1]
        return Predicted(tokens, *(np.where(self._is_ordinary[side], side, _UNKNOWN) for side in (left, right)))

    def _text(self, pieces: list[np.ndarray]) -> Predicted:
        """All ordinary tokens of `pieces`."""
        border = np.array([self._tokenizer.eos_token_id])
        ids = np.concatenate([border, *(part for piece in pieces for part in (piece, border))]).astype(np.int64)
        positions = np.flatnonzero(self._is_ordinary[ids])
        return self._predicted(ids, positions, ids[positions])

    def _count(self, pieces: list[np.ndarray]) -> list[_Frequencies]:
        text, vocab_size = self._text(pieces), self._tokenizer.vocab_size
        return [_Frequencies(contexts, text.tokens, vocab_size) for contexts in self._contexts(text)]

    def _contexts(self, predicted: Predicted) -> Iterator[np.ndarray]:
        """For each kind of frequency the number of its context: none, the left neighbour, the right one."""
        yield np.zeros_like(predicted.left)
        yield predicted.left
        yield predicted.right

    def _components(self, predicted: Predicted) -> tuple[np.ndarray, np.ndarray]:
        """The tokens' probabilities by each component, (M, K) float64, and the cells of their weights, (M,) int64.

        The components are the uniform distribution and the relative frequencies of `_contexts`.
        """
        components = [np.full(len(predicted.tokens), 1 / np.count_nonzero(self._is_ordinary))]
        cells = np.zeros(len(predicted.tokens), dtype=np.int64)
        for frequencies, contexts in zip(self._frequencies, self._contexts(predicted), strict=True):
            of_context, of_token = frequencies.of(contexts, predicted.tokens)
            components.append(of_token / np.maximum(of_context, 1))
            if len(components) > 2:  # the text as a whole is no neighbour
                cells = cells * _BUCKETS + _bucket(of_context)
        return np.stack(components, axis=1), cells

    def _tune(self, text: Predicted) -> np.ndarray:
        """The weights of the components in each cell, (C, K) float64, under which `text` is most probable.

        Each token is predicted with and without its neighbours, since masks hide some. A component weighs as if it had
        predicted one more token, so that a cell without tokens has weights, and none is 0; but where its context was
        never counted, it is 0.
        """
        unknown = np.full_like(text.tokens, _UNKNOWN)
        sides = [(left, right) for left in (text.left, unknown) for right in (text.right, unknown)]
        left, right = (np.concatenate(side) for side in zip(*sides, strict=True))
        components, cells = self._components(Predicted(np.tile(text.tokens, len(sides)), left, right))
        numbers = np.arange(_BUCKETS**2)
        counted = [numbers >= 0, numbers >= 0, *(numbers // _BUCKETS**place % _BUCKETS > 0 for place in (1, 0))]
        prior = np.stack(counted, axis=1).astype(np.float64)
        weights = prior / prior.sum(axis=1, keepdims=True)
        for _ in range(_ITERATIONS):
            shares = components * weights[cells]
            shares /= shares.sum(axis=1, keepdims=True)
            tokens = [np.bincount(cells, of_component, len(prior)) for of_component in shares.T]
            weights = prior + np.stack(tokens, axis=1)
            weights /= weights.sum(axis=1, keepdims=True)
        return weights


def _bucket(counts: np.ndarray) -> np.ndarray:
    """0 for 0, 1 for 1 to 3, 2 for 4 to 15, and so on in powers of 4: int64."""
    bits = np.frexp(counts.astype(np.float64))[1]
    return np.minimum((bits + 1) // 2, _BUCKETS - 1)


def token_frequencies(corpus: Corpus, vocab_size: int) -> np.ndarray:
    """Each token's share of a sample of the training split, to which one of each is added: (V,) float64.

    Args:
        vocab_size: V, at least the tokenizer's.
    """
    counts = np.ones(vocab_size)
    for piece in sample(corpus.split(TRAIN_SPLIT)):
        counts += np.bincount(piece, minlength=vocab_size)
    return counts / counts.sum()


def sample(split: Split, tokens: int = SAMPLE_TOKENS) -> list[np.ndarray]:
    """Pieces of a split at equal distances, `tokens` in all; of a smaller split, everything."""
    ends = np.cumsum([shard.tokens for shard in split.shards])
    total = int(ends[-1])
    pieces = min(max(-(-total // _PIECE_TOKENS), _TUNING_EVERY), max(tokens // _PIECE_TOKENS, _TUNING_EVERY))
    longest = -(-tokens // pieces)
    return [
        _slice(split, ends, start, min(start + longest, total * (piece + 1) // pieces))
        for piece in range(pieces)
        for start in [total * piece // pieces]
    ]


def _slice(split: Split, ends: np.ndarray, start: int, end: int) -> np.ndarray:
    """Tokens `start … end - 1` of a split, whose shards end at `ends`."""
    parts = [np.empty(0, dtype=np.uint16)]
    while start < end:
        shard = int(np.searchsorted(ends, start, side="right"))
        first, stop = int(ends[shard]) - split.shards[shard].tokens, min(end, int(ends[shard]))
        parts.append(split.checked(shard, split.values(shard)[start - first : stop - first]))
        start = stop
    return np.concatenate(parts)
