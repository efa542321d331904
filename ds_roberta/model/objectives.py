"""What the encoder is trained to do: a module that maps a micro-batch to a sum of losses.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, M masked tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.config import ModelConfig
from ds_roberta.model.cross_entropy import linear_cross_entropy
from ds_roberta.model.encoder import RobertaModel, initialize_weights


class MaskedLMHead(nn.Module):
    """Transforms hidden states for the vocabulary projection, whose matrix is the word embeddings'."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, hidden_MD: torch.Tensor, word_embeddings_VD: torch.Tensor, labels_M: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits, (M, V) in the parameters' dtype; with labels the sum of their cross-entropies, a float32 scalar."""
        transformed_MD = self.layer_norm(F.gelu(self.dense(hidden_MD)))
        if labels_M is None:
            return F.linear(transformed_MD, word_embeddings_VD, self.bias)
        return linear_cross_entropy(transformed_MD, word_embeddings_VD, self.bias, labels_M)


class MaskedLM(nn.Module):
    """Masked language modelling; parameter names and numbers of transformers' `RobertaForMaskedLM`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.roberta = RobertaModel(config)
        self.lm_head = MaskedLMHead(config)
        initialize_weights(self, config.initializer_range)

    def logits(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None,
        positions_M: torch.Tensor,
    ) -> torch.Tensor:
        """Vocabulary logits at flat positions b * T + t only: (M, V) in the parameters' dtype."""
        return self._head_at(input_ids_BT, attention_mask_BT, positions_M)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        masked_positions: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """The sum (not the mean: the step divides by its global number) of the masked tokens' cross-entropies.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or None.
            masked_positions: (M,) int64, flat.
            labels: (M,) int64.

        Returns:
            A float32 scalar, in nats.
        """
        return self._head_at(input_ids, attention_mask, masked_positions, labels)

    def _head_at(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None,
        positions_M: torch.Tensor,
        labels_M: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_BTD = self.roberta(input_ids_BT, attention_mask_BT)
        hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, positions_M)
        return self.lm_head(hidden_MD, self.roberta.embeddings.word_embeddings.weight, labels_M)
