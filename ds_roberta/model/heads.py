"""The heads that objectives put on the encoder.

Shapes: B sequences, D hidden size, V vocabulary, M labelled tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.config import ModelConfig
from ds_roberta.model.kernels import CrossEntropy, LayerNorm, cross_entropy_by_rows, linear_cross_entropy


class MaskedLMHead(nn.Module):
    """Transforms hidden states and projects them to the vocabulary with the matrix of the word embeddings."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.cross_entropy: CrossEntropy = cross_entropy_by_rows

    def forward(
        self, hidden_MD: torch.Tensor, word_embeddings_VD: torch.Tensor, labels_M: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits, (M, V) in the parameters' dtype; with labels the sum of their cross-entropies, a float32 scalar.

        There may be fewer labels than rows, whose last ones then count for nothing.
        """
        transformed_MD = self.transform(hidden_MD)
        if labels_M is None:
            return F.linear(transformed_MD, word_embeddings_VD, self.bias)
        return linear_cross_entropy(transformed_MD, word_embeddings_VD, self.bias, labels_M, self.cross_entropy)

    def transform(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(F.gelu(self.dense(hidden_MD)))


class NextSentenceHead(nn.Module):
    """Predicts from `<s>` whether the second segment follows the first, with BERT's pooler and classifier."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Logits of `data.pairs`' labels: (B, 2) in the parameters' dtype."""
        return self.seq_relationship(torch.tanh(self.pooler(hidden_BD)))


class SubstitutionHead(nn.Module):
    """Predicts whether a token was replaced, from its hidden state (ELECTRA's discriminator, Clark et al. 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Logits of "replaced": (M,) in the parameters' dtype."""
        return self.classifier(F.gelu(self.dense(hidden_MD)))[:, 0]
