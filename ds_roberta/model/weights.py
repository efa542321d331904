"""A model's weights by name: whether they are finite, and embeddings for longer sequences or another vocabulary.

Shapes: P rows of positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F

POSITION_EMBEDDINGS = "roberta.embeddings.position_embeddings.weight"
HEAD_BIAS = "lm_head.bias"
VOCABULARY_PARAMETERS = ("roberta.embeddings.word_embeddings.weight", HEAD_BIAS)
"""The parameters that have a row for each token."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    If one is, so is the sum, which takes one pass and no mask. Because a sum of finite numbers can overflow, a sum that
    is not finite is followed by a check of every element.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that is not finite."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def position_rows(
    weight_PD: torch.Tensor, pad_token_id: int, learned: int, new_pad_token_id: int, length: int
) -> torch.Tensor:
    """Position embeddings for sequences of `length` tokens: the learned ones, repeated.

    Position *p* gets the row of position *p* mod `learned`, as in Longformer (Beltagy et al. 2020, arXiv:2004.05150,
    section 5): attention is mostly local, and the copies keep that everywhere except at their borders.

    Args:
        weight_PD: position *p* in row `pad_token_id + 1 + p`, as RoBERTa counts; the rows before belong to the padding.
        learned: the number of positions that were trained.
        new_pad_token_id: the padding's id in the new vocabulary.

    Returns:
        (new_pad_token_id + 1 + length, D).
    """
    first = pad_token_id + 1
    positions = torch.arange(length) % learned + first
    before = torch.arange(new_pad_token_id + 1).clamp(max=pad_token_id)
    before[-1] = pad_token_id
    return weight_PD[torch.cat([before, positions])]


def token_sources(
    vocabulary: Mapping[str, int],
    new_vocabulary: Mapping[str, int],
    new_size: int,
    pieces: Callable[[str], Sequence[int]],
) -> tuple[list[list[int]], int]:
    """The old tokens that each id of a new vocabulary starts from, by the tokens' texts.

    A token of both vocabularies starts from itself. Any other starts from the pieces that the old tokenizer cuts its
    text into (Gee et al. 2022, Fast Vocabulary Transfer, section 3), or without pieces, from the whole vocabulary.

    Args:
        pieces: the old tokenizer's ids of a text in its own alphabet.

    Returns:
        Old ids by new id, `new_size` lists, empty for the whole vocabulary; and the number of tokens that both have.
    """
    sources: list[list[int]] = [[] for _ in range(new_size)]
    shared = 0
    for token, new_id in new_vocabulary.items():
        old_id = vocabulary.get(token)
        shared += old_id is not None
        sources[new_id] = list(pieces(token)) if old_id is None else [old_id]
    return sources, shared


def token_rows(rows: torch.Tensor, sources: Sequence[Sequence[int]], everything: Sequence[int]) -> torch.Tensor:
    """The mean of each list of rows, of `everything` for an empty one: (V, D) or (V,) float32 to a row each."""
    flat = torch.tensor([old_id for ids in sources for old_id in ids], dtype=torch.int64)
    counts = torch.tensor([len(ids) for ids in sources])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
    found = F.embedding_bag(flat, rows.reshape(len(rows), -1), offsets, mode="mean").reshape(-1, *rows.shape[1:])
    found[counts == 0] = rows[torch.tensor(everything)].mean(0)
    return found
