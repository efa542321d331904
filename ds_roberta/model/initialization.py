"""Initial weights: BERT's, attention heads that begin by looking at the tokens beside theirs, and a head that begins by
predicting tokens as often as they occur.

Shapes: P rows of positions, D hidden size, K the size of a head, F frequencies, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ds_roberta.model.encoder import RobertaLayer, RobertaModel

INITIAL_ATTENTION = RANDOM, NEIGHBOURS = ("random", "neighbours")
INITIAL_BIAS = ZERO, FREQUENCIES = ("zero", "frequencies")
_OFFSETS = (-1, 1, -2, 2)
"""What the first heads of the first layer look at, one offset a head; fewer if the layer has fewer heads."""
_POSITIONS_RANGE = 2.0
"""Root mean square of the position embeddings, in units of `initializer_range`."""
_BF16_ROUNDING = 2**-8
_NEIGHBOURS_SCORE = 16.0
"""A head's score for its neighbour; those of other tokens are about 0, so that even of 512 it has nearly all."""


def initialize_weights(model: nn.Module, initializer_range: float) -> None:
    """Normal weights of the given standard deviation, zero biases, zero padding embeddings (BERT's initialisation)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()


@torch.no_grad()
def look_at_neighbours(encoder: RobertaModel, initializer_range: float) -> None:
    """Make the first heads of the first layer look at the tokens beside theirs, by position alone.

    Trained heads of BERT do so (Clark et al. 2019, "What Does BERT Look At?", section 3.1), and a small model needs
    millions of tokens to find it. The position embeddings become sinusoids, of which a shift is a rotation (Vaswani et
    al. 2017, section 3.5): a head's key projection keeps its frequencies, its query projection rotates them by its
    offset, and their product is largest where the two positions meet. The projections are trained on; the position
    embeddings should stay as they are, see docs/pretraining.md.

    Args:
        encoder: with BERT's initial weights; other heads and layers keep them.
        initializer_range: the standard deviation of its word and token type embeddings.
    """
    embeddings, first_layer = encoder.embeddings.position_embeddings, encoder.encoder.layer[0]
    assert isinstance(first_layer, RobertaLayer)
    assert embeddings.padding_idx is not None
    attention = first_layer.attention.self
    positions, hidden_size = embeddings.weight.shape
    heads = attention.heads
    head_size = hidden_size // heads
    frequencies_F = _frequencies(hidden_size)
    sinusoids_PD = _sinusoids(positions, hidden_size, embeddings.padding_idx)
    embeddings.weight.copy_(_POSITIONS_RANGE * initializer_range * sinusoids_PD)

    # The share of positions in the variance of what LayerNorm makes of word, token type and position.
    share = _POSITIONS_RANGE**2 / (_POSITIONS_RANGE**2 + 2)
    scale = (_NEIGHBOURS_SCORE / (share * head_size**0.5)) ** 0.5
    # Equally spaced frequencies would have a common period: the head would look as much at tokens 64 places away.
    shuffled_F = torch.from_numpy(np.random.RandomState(0).permutation(len(frequencies_F)))  # the same with any numpy
    for head, offset in zip(range(heads), _OFFSETS, strict=False):
        own_F = shuffled_F[head::heads][: head_size // 2]
        columns_K = torch.stack([2 * own_F, 2 * own_F + 1], 1).flatten()
        rows = slice(head * head_size, head * head_size + len(columns_K))
        for projection, angle in ((attention.query, offset), (attention.key, 0)):
            rotation_KD = _rotation(angle * frequencies_F)[columns_K]
            projection.weight[rows, : rotation_KD.shape[1]] = scale * rotation_KD.to(projection.weight)


def are_sinusoids(positions_PD: torch.Tensor, padding_idx: int) -> bool:
    """Whether position embeddings are those of `look_at_neighbours`, of any size and up to bf16's rounding."""
    positions, hidden_size = positions_PD.shape
    expected_PD, positions_PD = _sinusoids(positions, hidden_size, padding_idx), positions_PD.double()
    scale = float((positions_PD * expected_PD).sum() / expected_PD.square().sum())
    rest = float((positions_PD - scale * expected_PD).norm() / positions_PD.norm().clamp(min=1e-30))
    return scale > 0 and rest <= _BF16_ROUNDING


def _frequencies(hidden_size: int) -> torch.Tensor:
    # Multiples of the golden ratio are spread evenly over (0, pi), however many there are, and have no common period.
    golden = (5**0.5 - 1) / 2
    return (torch.arange(1, hidden_size // 2 + 1, dtype=torch.float64) * golden % 1).sort().values * torch.pi


def _sinusoids(positions: int, hidden_size: int, padding_idx: int) -> torch.Tensor:
    """(P, D) float64, with a root mean square of 1; the padding's row is zero."""
    angles_PF = torch.arange(positions, dtype=torch.float64)[:, None] * _frequencies(hidden_size)
    sinusoids_PD = torch.zeros(positions, hidden_size, dtype=torch.float64)  # of an odd size, the last column stays so
    sinusoids_PD[:, : 2 * angles_PF.shape[1]] = 2**0.5 * torch.stack([angles_PF.sin(), angles_PF.cos()], 2).flatten(1)
    sinusoids_PD[padding_idx] = 0
    return sinusoids_PD


@torch.no_grad()
def predict_frequencies(bias: nn.Parameter, frequencies: np.ndarray) -> None:
    """Make a masked-LM head predict tokens as often as they occur, whatever its input; its small weights add noise.

    A bias that begins with the logarithm of the prior spares the model its first steps (Lin et al. 2017, "Focal Loss
    for Dense Object Detection", section 3.3, for the prior of rare objects).

    Args:
        bias: of the head: (V,).
        frequencies: the tokens' probabilities, none of which is 0: (V,).
    """
    bias.copy_(torch.from_numpy(np.log(frequencies)))


def _rotation(angles_F: torch.Tensor) -> torch.Tensor:
    """(2F, 2F): turns the pairs (sin x, cos x) into (sin(x + angle), cos(x + angle))."""
    cosines_F, sines_F = angles_F.cos(), angles_F.sin()
    return torch.block_diag(*torch.stack([cosines_F, sines_F, -sines_F, cosines_F], 1).view(-1, 2, 2))
