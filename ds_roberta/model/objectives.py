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

NEXT_SENTENCE_HEAD, SUBSTITUTION_HEAD = "next_sentence_head.", "substitution_head."
"""How the names of parameters begin that transformers' models do not have."""


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

    is_paired = False
    labels_all_tokens = False

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
        return self._masked_lm(self.roberta(input_ids_BT, attention_mask_BT), positions_M)

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
        return self._masked_lm(self.roberta(input_ids, attention_mask), masked_positions, labels)

    def _masked_lm(
        self, hidden_BTD: torch.Tensor, positions_M: torch.Tensor, labels_M: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, positions_M)
        return self.lm_head(hidden_MD, self.roberta.embeddings.word_embeddings.weight, labels_M)


class NextSentenceHead(nn.Module):
    """Whether the second segment follows the first, from the hidden state of `<s>` (BERT's pooler and classifier)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Logits of `data.pairs`' labels: (B, 2) in the parameters' dtype."""
        return self.seq_relationship(torch.tanh(self.pooler(hidden_BD)))


class MaskedLMWithNextSentence(MaskedLM):
    """Masked language modelling and next sentence prediction of pairs (Devlin et al. 2019, section 3.1)."""

    is_paired = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.next_sentence_head = NextSentenceHead(config)
        initialize_weights(self.next_sentence_head, config.initializer_range)

    def forward(  # type: ignore[override]  # its micro-batches have labels of their own
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        masked_positions: torch.Tensor,
        labels: torch.Tensor,
        next_sentence_labels: torch.Tensor,
    ) -> torch.Tensor:
        """What `MaskedLM` gives, and two sums of next sentence prediction.

        Args:
            next_sentence_labels: (sequences,) int64, of the first rows; those behind are empty places.

        Returns:
            (3,) float32: the masked tokens' cross-entropies, the pairs' cross-entropies, both in nats, and how many
            pairs are predicted right, which has no gradient.
        """
        hidden_BTD = self.roberta(input_ids, attention_mask)
        masked_lm = self._masked_lm(hidden_BTD, masked_positions, labels)
        logits = self.next_sentence_head(hidden_BTD[: len(next_sentence_labels), 0]).float()
        next_sentence = F.cross_entropy(logits, next_sentence_labels, reduction="sum")
        correct = (logits.argmax(-1) == next_sentence_labels).sum().float()
        return torch.stack([masked_lm, next_sentence, correct])


class SubstitutionHead(nn.Module):
    """Whether a token was replaced, from its hidden state (ELECTRA's discriminator, Clark et al. 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Logits of "replaced": (M,) in the parameters' dtype."""
        return self.classifier(F.gelu(self.dense(hidden_MD)))[:, 0]


class RandomTokenSubstitution(nn.Module):
    """Telling replaced tokens from others (see `data.substitution`); no vocabulary projection is held or computed."""

    is_paired = False
    labels_all_tokens = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.roberta = RobertaModel(config)
        self.substitution_head = SubstitutionHead(config)
        initialize_weights(self, config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """The sum of the tokens' binary cross-entropies, and what `detection` needs.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or None.
            positions: (M,) int64, flat, of the ordinary tokens.
            labels: (M,) int64, 1 where replaced, else 0.

        Returns:
            (4,) float32: the loss in nats, and without gradient how many are told to be replaced and are, how many are
            told to be, how many are.
        """
        hidden_MD = self.roberta(input_ids, attention_mask).flatten(0, 1).index_select(0, positions)
        logits_M = self.substitution_head(hidden_MD).float()
        loss = F.binary_cross_entropy_with_logits(logits_M, labels.float(), reduction="sum")
        told = logits_M > 0
        counts = [(told & (labels == 1)).sum(), told.sum(), (labels == 1).sum()]
        return torch.stack([loss, *(count.float() for count in counts)])


def detection(right: float, told: float, replaced: float) -> dict[str, float]:
    """Precision, recall and F1 of "replaced", from counts or anything that is proportional to them; 0 for 0 / 0.

    Accuracy would say little: five of six tokens are not replaced.
    """

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    return {
        "detection_precision": ratio(right, told),
        "detection_recall": ratio(right, replaced),
        "detection_f1": ratio(2 * right, told + replaced),
    }


Objective = MaskedLM | RandomTokenSubstitution


def make_model(config: ModelConfig, objective: str, is_paired: bool) -> Objective:
    """The model of a run, by `RunConfig.objective` and by whether its sequences are pairs."""
    if objective == "rts":
        return RandomTokenSubstitution(config)
    return MaskedLMWithNextSentence(config) if is_paired else MaskedLM(config)
