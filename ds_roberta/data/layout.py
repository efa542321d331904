"""Sequences of different lengths one after another, without padding, and which of their tokens attend together.

Shapes: N tokens, which are those of S sequences and some after them that only round up their number; a block is a
rectangle of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

_PLACES = 2_048
"""Rows × columns of a block if lengths differ: few enough for hardly any padding, enough for large products."""
_COLUMNS = 16
_TOKENS = 64
"""Columns and tokens are rounded up to multiples of these: a CPU makes a kernel for each new shape, for half a
millisecond, and there are fewer shapes so."""
_PARTS = 64
"""A GPU's bounds are rounded up to a multiple of this, as compiled layers have a graph for each number."""


@dataclass(frozen=True)
class Block:
    """Tokens that attend together: each row to itself.

    Attributes:
        tokens: which tokens of the micro-batch are the block's: a slice, or (tokens of the block,) int64.
        rows, columns: of the rectangle.
        is_token: (R, C) bool, false at padding; None if every place has a token and these are a slice.
        sources: (R * C,) int64, which token is at each place; at padding any. None likewise.
        places: (tokens of the block,) int64, the place of each of them. None likewise.
    """

    tokens: slice | torch.Tensor
    rows: int
    columns: int
    is_token: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def spread(self, values_ND: torch.Tensor) -> torch.Tensor:
        """The block's tokens, from a tensor of all tokens, at their places: (R, C, D)."""
        own = values_ND[self.tokens] if self.sources is None else values_ND.index_select(0, self.sources)
        return own.reshape(self.rows, self.columns, -1)

    def spread_gradient(self, gradient_ND: torch.Tensor) -> torch.Tensor:
        """As `spread`, with zeros at padding."""
        spread_RCD = self.spread(gradient_ND)
        return spread_RCD if self.is_token is None else spread_RCD * self.is_token[..., None]

    def collect(self, values_RCD: torch.Tensor, out_ND: torch.Tensor) -> None:
        """The reverse of `spread`: copy the values to the block's tokens in a tensor of all tokens."""
        flat = values_RCD.reshape(self.rows * self.columns, -1)
        out_ND[self.tokens] = flat if self.places is None else flat.index_select(0, self.places)


@dataclass(frozen=True)
class FlatLayout:
    """Where the sequences of a micro-batch are among its tokens.

    Attributes:
        position_ids: (N,) int64, each token's position in its sequence, from 0.
        first_tokens: (S,) int64, the sequences' first tokens.
        tokens: of the sequences; those from there on are nothing.
        longest: tokens of the longest sequence, or more.
        blocks: attention's on a CPU; together they have every token of the sequences once.
        cu_seqlens: attention's on a GPU: (parts + 1,) int32, the bounds of the parts that attend only to themselves,
            the last parts without a token; else None.
    """

    position_ids: torch.Tensor
    first_tokens: torch.Tensor
    tokens: int
    longest: int
    blocks: tuple[Block, ...] = ()
    cu_seqlens: torch.Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths: np.ndarray, documents: np.ndarray | None = None) -> FlatLayout:
        """The layout of some sequences on a CPU.

        Args:
            lengths: (S,) int64, their tokens, which do not rise, so that neighbours are alike.
            documents: (parts,) int64, the tokens of the parts that attend only to themselves, in the order of the
                tokens; None: the sequences do.
        """
        if documents is None:
            blocks = _blocks(np.cumsum(lengths) - lengths, lengths)
        else:
            order = np.argsort(-documents, kind="stable")
            blocks = _blocks((np.cumsum(documents) - documents)[order], documents[order])
        tokens = -(-int(lengths.sum()) // _TOKENS) * _TOKENS
        return replace(cls._of_tokens(lengths, tokens, int(lengths[0])), blocks=tuple(blocks))

    @classmethod
    def of_shape(
        cls, lengths: np.ndarray, documents: np.ndarray | None, tokens: int, max_seq_length: int
    ) -> FlatLayout:
        """The layout of some sequences on a GPU, whose tensors have the same shapes as others' of so many tokens.

        Args:
            lengths, documents: as in `of_lengths`.
            tokens: N; those after the sequences are parts of at most `max_seq_length` tokens.
        """
        ends = np.cumsum(lengths if documents is None else documents)
        rest = np.arange(ends[-1] + max_seq_length, tokens + max_seq_length, max_seq_length).clip(max=tokens)
        bounds = np.concatenate([[0], ends, rest])
        cu_seqlens = np.full(-(-len(bounds) // _PARTS) * _PARTS, tokens, dtype=np.int32)
        cu_seqlens[: len(bounds)] = bounds
        return replace(cls._of_tokens(lengths, tokens, max_seq_length), cu_seqlens=torch.from_numpy(cu_seqlens))

    @classmethod
    def _of_tokens(cls, lengths: np.ndarray, tokens: int, longest: int) -> FlatLayout:
        firsts, own = np.cumsum(lengths) - lengths, int(lengths.sum())
        position_ids = np.zeros(tokens, dtype=np.int64)
        position_ids[:own] = np.arange(own) - np.repeat(firsts, lengths)
        return cls(torch.from_numpy(position_ids), torch.from_numpy(firsts), own, longest)

    def to(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> FlatLayout:
        """The layout with its tensors, except those of blocks, copied to a GPU."""
        assert self.cu_seqlens is not None
        return replace(
            self,
            position_ids=copy(self.position_ids),
            first_tokens=copy(self.first_tokens),
            cu_seqlens=copy(self.cu_seqlens),
        )


def _blocks(firsts: np.ndarray, lengths: np.ndarray) -> Iterator[Block]:
    """Blocks of parts, given by their first tokens and lengths, which do not rise."""
    number = 0
    while number < len(lengths):
        columns = int(lengths[number])
        if columns == lengths[-1] and _is_slice(firsts[number:], lengths[number:]):
            first = int(firsts[number])
            yield Block(slice(first, first + columns * (len(lengths) - number)), len(lengths) - number, columns)
            return
        columns = -(-columns // _COLUMNS) * _COLUMNS
        own = slice(number, number + max(1, _PLACES // columns))
        yield _block(firsts[own], lengths[own], columns)
        number = own.stop


def _block(firsts: np.ndarray, lengths: np.ndarray, columns: int) -> Block:
    is_token = np.arange(columns) < lengths[:, None]
    places = np.flatnonzero(is_token)
    sources = (firsts[:, None] + np.where(is_token, np.arange(columns), 0)).reshape(-1)
    tokens: slice | torch.Tensor = torch.from_numpy(sources[places])
    if _is_slice(firsts, lengths):
        tokens = slice(int(firsts[0]), int(firsts[0]) + len(places))
    return Block(tokens, len(lengths), columns, *map(torch.from_numpy, (is_token, sources, places)))


def _is_slice(firsts: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether each part begins where the one before it ends."""
    return bool((firsts[1:] == firsts[:-1] + lengths[:-1]).all())
