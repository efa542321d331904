"""The RoBERTa encoder (Liu et al. 2019), with the parameter names and results of transformers' `RobertaModel`.

A micro-batch is rows of equal length with padding, (B, T), or, in a `FlatLayout`, one row of tokens, (N,). What the
encoder computes for a token is the same.

Shapes: B sequences, T tokens, D hidden size, H heads, K = D / H; N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_roberta.config import ModelConfig
from ds_roberta.data.layout import FlatLayout
from ds_roberta.model.kernels import Dropout, Embedding, LayerNorm, attention, flat_attention, split_heads, table_rows

Padding = torch.Tensor | FlatLayout | None
"""Where padding is: (B, 1, 1, T) bool, false at padding; in a flat layout there is none; None: all rows are full."""

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _laplace(values: torch.Tensor) -> torch.Tensor:
    """A Gaussian's cumulative distribution (Ma et al. 2022, MEGA, arXiv:2209.10655, section 3.3)."""
    return 0.5 * (1 + torch.erf((values - 0.707107) / (0.282095 * 2**0.5)))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | type[nn.Module]] = {
    "gelu": F.gelu,
    "gelu_10": lambda values: F.gelu(values).clamp(-10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda values: values,
    "mish": F.mish,
    "prelu": nn.PReLU,
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
    "relu": F.relu,
    "relu2": lambda values: F.relu(values).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda values: F.softplus(values).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""The MLP's activations by transformers' names, equal to them up to rounding; modules if they have parameters.

transformers' `xielu` is missing: it keeps its parameters in bf16.
"""


class RobertaEmbeddings(nn.Module):
    """Word, position and token type embeddings, normalised: (B, T) ids to (B, T, D), or (N,) to (N, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size, config.pad_token_id)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.first_position = config.pad_token_id + 1

    def forward(self, input_ids: torch.Tensor, layout: FlatLayout | None = None) -> torch.Tensor:
        # Rows start at the left, so positions do not depend on the padding, whose outputs are never read.
        length = input_ids.shape[1] if layout is None else layout.longest
        positions_T = torch.arange(self.first_position, self.first_position + length, device=input_ids.device)
        places_TD = self.position_embeddings(positions_T) + self.token_type_embeddings(torch.zeros_like(positions_T))
        places = places_TD if layout is None else table_rows(places_TD, layout.position_ids)
        return self.normalise(self.word_embeddings(input_ids), places)

    def normalise(self, words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.LayerNorm(words + places))


class RobertaSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, hidden: torch.Tensor, padding: Padding) -> torch.Tensor:
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        dropout_p = self.dropout_prob if self.training else 0.0
        if isinstance(padding, FlatLayout):
            return flat_attention(query, key, value, padding, self.heads, dropout_p)
        query, key, value = (split_heads(each, self.heads) for each in (query, key, value))
        attended_BHTK = attention(query, key, value, padding, dropout_p)
        return attended_BHTK.transpose(1, 2).flatten(2)


class ResidualOutput(nn.Module):
    """Projection, dropout, residual connection and normalisation, as after attention and after the MLP."""

    def __init__(self, input_size: int, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, inner: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(inner)) + residual)


class RobertaAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self = RobertaSelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: torch.Tensor, padding: Padding) -> torch.Tensor:
        return self.output(self.self(hidden, padding), hidden)


class RobertaIntermediate(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        activation = ACTIVATIONS[config.hidden_act]
        self.intermediate_act_fn = activation() if isinstance(activation, type) else activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(hidden))


class RobertaLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = RobertaAttention(config)
        self.intermediate = RobertaIntermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: torch.Tensor, padding: Padding) -> torch.Tensor:
        hidden = self.attention(hidden, padding)
        return self.output(self.intermediate(hidden), hidden)


class RobertaEncoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layer = nn.ModuleList(RobertaLayer(config) for _ in range(config.num_hidden_layers))
        self.recomputed_layers = 0
        """The number of first layers that keep only their input; the backward pass computes the rest again."""

    def forward(self, hidden: torch.Tensor, padding: Padding) -> torch.Tensor:
        for number, layer in enumerate(self.layer):
            if self.training and number < self.recomputed_layers:
                hidden = checkpoint(layer, hidden, padding, use_reentrant=False)
            else:
                hidden = layer(hidden, padding)
        return hidden


class RobertaModel(nn.Module):
    """Token ids to hidden states; no pooler, as in `RobertaForMaskedLM`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = RobertaEncoder(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        layout: FlatLayout | None = None,
    ) -> torch.Tensor:
        """Compute the hidden states of the last layer.

        Args:
            input_ids: (B, T) int64, any padding on the right; or, with a layout, (N,).
            attention_mask_BT: (B, T) bool, false at padding; None without padding, which is faster.
            layout: where the sequences are among N tokens; None: in rows.

        Returns:
            (B, T, D) or (N, D) in the parameters' dtype.
        """
        mask_B11T = None if attention_mask_BT is None else attention_mask_BT[:, None, None, :]
        return self.encoder(self.embeddings(input_ids, layout), layout or mask_B11T)
