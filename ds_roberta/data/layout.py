"""Sequences of different lengths one after another, without padding, and the rectangles in which they attend.

Shapes: N tokens, which are those of S sequences and fewer than 64 behind them that only round up their number; a block
is a rectangle of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

_PLACES = 1_024
"""Rows × columns of a block if lengths differ: few enough for hardly any padding, enough for large products."""
_COLUMNS = 16
_TOKENS = 64
"""Columns and tokens are rounded up to multiples of these: a CPU makes a kernel for each new shape, for half a
millisecond, and there are fewer shapes so."""


@dataclass(frozen=True)
class Block:
    """Sequences that attend together, each in a row of its own.

    Attributes:
        tokens: which tokens of the micro-batch are the block's.
        rows, columns: of the rectangle.
        is_token: (R, C) bool, false at padding; None if there is none.
        sources: (R * C,) int64, which of the block's tokens is at each place; any at padding. None without padding.
        places: (tokens of the block,) int64, the place of each of them. None without padding.
    """

    tokens: slice
    rows: int
    columns: int
    is_token: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def spread(self, values_ND: torch.Tensor) -> torch.Tensor:
        """The block's tokens, from a tensor of all tokens, at their places: (R, C, D)."""
        own = values_ND[self.tokens]
        own = own if self.sources is None else own.index_select(0, self.sources)
        return own.reshape(self.rows, self.columns, -1)

    def spread_gradient(self, gradient_ND: torch.Tensor) -> torch.Tensor:
        """As `spread`, with zeros at padding."""
        spread_RCD = self.spread(gradient_ND)
        return spread_RCD if self.is_token is None else spread_RCD * self.is_token[..., None]

    def collect(self, values_RCD: torch.Tensor, out_ND: torch.Tensor) -> None:
        """The reverse of `spread`: copy the values to the block's tokens in a tensor of all tokens."""
        flat = values_RCD.reshape(self.rows * self.columns, -1)
        if self.places is None:
            out_ND[self.tokens] = flat
        else:
            torch.index_select(flat, 0, self.places, out=out_ND[self.tokens])


@dataclass(frozen=True)
class FlatLayout:
    """Where the sequences of a micro-batch are among its tokens.

    Attributes:
        position_ids: (N,) int64, each token's position in its sequence, from 0.
        first_tokens: (S,) int64, the sequences' first tokens.
        blocks: attention's; together they have every token of the sequences once, in order.
        tokens: of the sequences; those from there on are nothing.
        longest: tokens of the longest sequence.
    """

    position_ids: torch.Tensor
    first_tokens: torch.Tensor
    blocks: tuple[Block, ...]
    tokens: int
    longest: int

    @classmethod
    def of_lengths(cls, lengths: np.ndarray) -> FlatLayout:
        """The layout of sequences of so many tokens: (S,) int64, which do not rise, so that neighbours are alike."""
        ends = np.cumsum(lengths)
        firsts, tokens = ends - lengths, int(ends[-1])
        position_ids = np.zeros(-(-tokens // _TOKENS) * _TOKENS, dtype=np.int64)
        position_ids[:tokens] = np.arange(tokens) - np.repeat(firsts, lengths)
        first_tokens, blocks = torch.from_numpy(firsts), tuple(_blocks(lengths, ends))
        return cls(torch.from_numpy(position_ids), first_tokens, blocks, tokens, int(lengths[0]))


def _blocks(lengths: np.ndarray, ends: np.ndarray) -> Iterator[Block]:
    """Blocks of consecutive sequences; the lengths do not rise."""
    first = 0
    while first < len(lengths):
        columns = int(lengths[first])
        if columns == lengths[-1]:
            yield Block(slice(int(ends[first]) - columns, int(ends[-1])), len(lengths) - first, columns)
            return
        columns = -(-columns // _COLUMNS) * _COLUMNS
        own = lengths[first : first + max(1, _PLACES // columns)]
        yield _block(own, columns, int(ends[first + len(own) - 1]))
        first += len(own)


def _block(lengths: np.ndarray, columns: int, end: int) -> Block:
    tokens, rows = int(lengths.sum()), len(lengths)
    is_token = np.arange(columns) < lengths[:, None]
    places = np.flatnonzero(is_token)
    sources = np.zeros(rows * columns, dtype=np.int64)
    sources[places] = np.arange(tokens)
    return Block(slice(end - tokens, end), rows, columns, *map(torch.from_numpy, (is_token, sources, places)))
