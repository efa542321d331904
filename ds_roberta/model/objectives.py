"""The training objectives of the encoder. Each is one class in this module, listed in `OBJECTIVES`.

Shapes: B sequences, T tokens, N tokens of all sequences, D hidden size, V vocabulary, M labelled tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ds_roberta.config import ModelConfig, PackingConfig
from ds_roberta.data.loader import Counts, MicroBatch
from ds_roberta.data.masking import Masker, Substituter
from ds_roberta.errors import UserError
from ds_roberta.model.encoder import RobertaModel
from ds_roberta.model.heads import MaskedLMHead, NextSentenceHead, SubstitutionHead
from ds_roberta.model.initialization import initialize_weights
from ds_roberta.options import require_one_of


class Objective(nn.Module, ABC):
    """An encoder with a head and a loss.

    `forward` returns sums over a micro-batch, which are added up over micro-steps and processes. The other methods say
    what the sums of a whole batch mean.

    Attributes:
        name: the choice of `--objective`.
        summary: the line about it in the option's help.
        description: its name in the model card.
        chosen: what happens to the tokens that masking chooses, in one word.
        masker: prepares the inputs and labels.
        is_paired: whether it needs a packing of pairs; one name may stand for two objectives, with pairs and without.
        predicts_tokens: whether its held-out loss is that of the masked tokens' ids, as of `data.count_models`.
        reads_first_token: whether it predicts something of a whole sequence from `<s>`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    description: ClassVar[str]
    chosen: ClassVar[str] = "masked"
    masker: ClassVar[type[Masker]] = Masker
    is_paired: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    reads_first_token: ClassVar[bool] = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.roberta = RobertaModel(config)

    @abstractmethod
    def forward(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Named sums, each a float32 scalar; losses in nats, with a gradient, and counts without one."""

    def hidden_ND(self, batch: MicroBatch) -> torch.Tensor:
        """The encoder's outputs at the flat positions of a micro-batch: (N, D) in the parameters' dtype."""
        return self.roberta(batch.input_ids, batch.attention_mask, batch.layout).flatten(0, -2)

    @staticmethod
    def weigh(sums: Mapping[str, torch.Tensor], counts: Counts) -> torch.Tensor:
        """The scalar to differentiate, for one micro-batch's sums.

        Args:
            counts: the counts of the step's whole batch; the engine divides the result by the number of its labels.
        """
        return sums["loss"]

    @staticmethod
    def metrics(sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        """The columns of a step in `metrics.jsonl`, the first of them its `loss`."""
        return {"loss": sums["loss"] / counts.labels}

    @classmethod
    def evaluation(cls, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        """The columns of an evaluation, without their prefix `eval_`; the lowest `loss` marks the best checkpoint."""
        return cls.metrics(sums, counts)

    @staticmethod
    def report(evaluation: Mapping[str, float]) -> dict[str, str]:
        """An evaluation in words, for the log and the model card."""
        return {"held-out loss": f"{evaluation['loss']:.4f} nats per token"}

    @staticmethod
    @abstractmethod
    def head_parameters(config: ModelConfig) -> int:
        """Elements of the matrices that each labelled token's hidden state is multiplied by."""

    @classmethod
    def flops_per_token(cls, config: ModelConfig, length: int, labelled_share: float) -> float:
        """Floating-point operations of training that a token of a full sequence needs, forward and backward.

        A matrix of P parameters takes 2 P operations a token forward (a multiplication and an addition each) and twice
        that backward (gradients of input and of weights): 6 P, as Kaplan et al. (2020, arXiv:2001.08361, section 2.1)
        count. With hidden size D a layer has 4 D² in attention's projections and 2 D I in an MLP of width I. The two
        products of attention (QKᵀ and weights · V) take D multiplications each for every one of the T tokens seen:
        2 · 2 · D · T forward, 12 D T in all. The head works on labelled tokens only. Look-ups of embeddings, biases,
        normalisation, softmax, dropout and the optimizer are not counted, nor is the head of pairs (D² a sequence).

        Args:
            length: T, the tokens of a sequence; for shorter ones this counts more attention than they need.
            labelled_share: the share of all tokens, `<s>` and `</s>` included, that have a label.
        """
        hidden = config.hidden_size
        layer = 6 * (4 * hidden**2 + 2 * hidden * config.intermediate_size) + 12 * hidden * length
        return config.num_hidden_layers * layer + labelled_share * (6 * cls.head_parameters(config))

    @classmethod
    def identity(cls) -> dict[str, Any]:
        """The objective's entries in a run's identity; see `objective_of`. Masked language modelling has none."""
        pairs = {"next_sentence_prediction": True} if cls.is_paired else {}
        return pairs if cls.name == MaskedLM.name else {**pairs, "objective": cls.name}


_LABELS = 16
"""The head's rows are rounded up to a multiple of this: a CPU makes a kernel for each new shape, see `data.layout`."""


class MaskedLM(Objective):
    """Masked language modelling; parameter names and results of transformers' `RobertaForMaskedLM`."""

    name = "mlm"
    summary = "predict masked tokens"
    description = "masked language modelling"
    predicts_tokens = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.lm_head = MaskedLMHead(config)
        self.head_shapes: int | None = None
        """How many different numbers of rows the head may have, each of which is compiled separately; None: any."""
        initialize_weights(self, config.initializer_range)

    def logits(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None,
        positions_M: torch.Tensor,
    ) -> torch.Tensor:
        """Vocabulary logits at flat positions b * T + t only: (M, V) in the parameters' dtype."""
        return self._masked_lm(self.roberta(input_ids_BT, attention_mask_BT).flatten(0, 1), positions_M)

    def forward(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """`loss`: the masked tokens' cross-entropies."""
        return {"loss": self._masked_lm(self.hidden_ND(batch), batch.masked_positions, batch.labels)}

    def _masked_lm(
        self, hidden_ND: torch.Tensor, positions_M: torch.Tensor, labels_M: torch.Tensor | None = None
    ) -> torch.Tensor:
        if labels_M is not None:  # shapes that differ less
            unit = -(-len(hidden_ND) // self.head_shapes) if self.head_shapes else _LABELS
            positions_M = F.pad(positions_M, (0, -len(positions_M) % unit))
        hidden_MD = hidden_ND.index_select(0, positions_M)
        return self.lm_head(hidden_MD, self.roberta.embeddings.word_embeddings.weight, labels_M)

    @classmethod
    def evaluation(cls, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        loss = sums["loss"] / counts.labels
        return {"loss": loss, "perplexity": perplexity(loss)}

    @staticmethod
    def report(evaluation: Mapping[str, float]) -> dict[str, str]:
        loss = evaluation["loss"]
        return {"held-out loss": f"{loss:.4f} nats per masked token (perplexity {perplexity(loss):,.2f})"}

    @staticmethod
    def head_parameters(config: ModelConfig) -> int:
        return config.hidden_size**2 + config.hidden_size * config.vocab_size


def perplexity(loss: float) -> float:
    """The perplexity for a mean cross-entropy in nats; finite even if the model has diverged."""
    return math.exp(min(loss, 700.0))


class MaskedLMWithBagOfWords(MaskedLM):
    """Masked language modelling, and prediction of the same tokens from `<s>`, whose state then says what a sequence
    is about: masked language modelling does not ask for it, while heads for whole sequences read nothing else.

    As bag-of-words prediction (Ma et al. 2024, arXiv:2401.11248), but of the masked tokens, not of all.
    """

    name = "mlm-bow"
    summary = "predict masked tokens, and their bag from the first token"
    description = "masked language modelling, and prediction of the bag of masked tokens from `<s>`"
    reads_first_token = True
    weight: ClassVar[float] = 0.3
    """Of a token's cross-entropy from `<s>`, beside that from its own place."""

    def forward(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """`mlm_loss` and `bow_loss`: the masked tokens' cross-entropies, from their own places and from `<s>`."""
        hidden_ND = self.hidden_ND(batch)
        masked_lm = self._masked_lm(hidden_ND, batch.masked_positions, batch.labels)
        first_tokens_B = rows_B = batch.first_tokens[: batch.sequences]
        if self.head_shapes:  # each number of rows would be compiled
            rows_B = F.pad(first_tokens_B, (0, -len(first_tokens_B) % _LABELS))
        logits_BV = self.lm_head(hidden_ND.index_select(0, rows_B), self.roberta.embeddings.word_embeddings.weight)
        sequences_M = torch.searchsorted(first_tokens_B, batch.masked_positions, right=True) - 1
        log_probabilities_M = F.log_softmax(logits_BV.float(), dim=-1)[sequences_M, batch.labels]
        return {"mlm_loss": masked_lm, "bow_loss": -log_probabilities_M.sum()}

    @classmethod
    def weigh(cls, sums: Mapping[str, torch.Tensor], counts: Counts) -> torch.Tensor:
        return sums["mlm_loss"] + cls.weight * sums["bow_loss"]

    @classmethod
    def metrics(cls, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        mlm_loss, bow_loss = sums["mlm_loss"] / counts.labels, sums["bow_loss"] / counts.labels
        return {"loss": mlm_loss + cls.weight * bow_loss, "mlm_loss": mlm_loss, "bow_loss": bow_loss}

    @classmethod
    def evaluation(cls, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        """The `loss` is only that of the masked tokens from their own places, as of other masked language models."""
        metrics = cls.metrics(sums, counts)
        loss = metrics["mlm_loss"]
        return {"loss": loss, "perplexity": perplexity(loss), "bow_loss": metrics["bow_loss"]}

    @staticmethod
    def report(evaluation: Mapping[str, float]) -> dict[str, str]:
        words = f"loss {evaluation['bow_loss']:.4f} nats per masked token"
        return {**MaskedLM.report(evaluation), "masked tokens from the first token": words}

    @classmethod
    def flops_per_token(cls, config: ModelConfig, length: int, labelled_share: float) -> float:
        """As of masked language modelling, with one more row of the head for each sequence."""
        return super().flops_per_token(config, length, labelled_share + 1 / length)


class MaskedLMWithNextSentence(MaskedLM):
    """Masked language modelling and next sentence prediction of pairs (Devlin et al. 2019, section 3.1)."""

    description = "masked language modelling and next sentence prediction, whose head is not in this folder"
    is_paired = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.next_sentence_head = NextSentenceHead(config)
        initialize_weights(self.next_sentence_head, config.initializer_range)

    def forward(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """`mlm_loss` and `nsp_loss`: the masked tokens' and the pairs' cross-entropies; `nsp_correct`: pairs predicted
        correctly.
        """
        labels = batch.next_sentence_labels
        assert labels is not None
        hidden_ND = self.hidden_ND(batch)
        masked_lm = self._masked_lm(hidden_ND, batch.masked_positions, batch.labels)
        first_tokens = batch.first_tokens[: len(labels)]  # the rows after them are empty places
        logits = self.next_sentence_head(hidden_ND.index_select(0, first_tokens)).float()
        return {
            "mlm_loss": masked_lm,
            "nsp_loss": F.cross_entropy(logits, labels, reduction="sum"),
            "nsp_correct": (logits.argmax(-1) == labels).sum().float(),
        }

    @staticmethod
    def weigh(sums: Mapping[str, torch.Tensor], counts: Counts) -> torch.Tensor:
        return sums["mlm_loss"] + counts.labels / counts.sequences * sums["nsp_loss"]

    @staticmethod
    def metrics(sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        mlm_loss, nsp_loss = sums["mlm_loss"] / counts.labels, sums["nsp_loss"] / counts.sequences
        return {
            "loss": mlm_loss + nsp_loss,
            "mlm_loss": mlm_loss,
            "nsp_loss": nsp_loss,
            "nsp_accuracy": sums["nsp_correct"] / counts.sequences,
        }

    @classmethod
    def evaluation(cls, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        """The `loss` is only that of the masked tokens, so that it can be compared with runs without pairs."""
        metrics = cls.metrics(sums, counts)
        loss = metrics["mlm_loss"]
        pairs = {name: metrics[name] for name in ("nsp_loss", "nsp_accuracy")}
        return {"loss": loss, "perplexity": perplexity(loss), **pairs}

    @staticmethod
    def report(evaluation: Mapping[str, float]) -> dict[str, str]:
        pairs = "loss {nsp_loss:.4f}, accuracy {nsp_accuracy:.2%}".format_map(evaluation)
        return {**MaskedLM.report(evaluation), "next sentence prediction": pairs}


class RandomTokenSubstitution(Objective):
    """Random token substitution (see `data.masking.Substituter`), without a projection to the vocabulary."""

    name = "rts"
    summary = "find randomly replaced tokens"
    description = "random token substitution (which tokens were replaced?), whose head is not in this folder"
    chosen = "replaced"
    masker = Substituter

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.substitution_head = SubstitutionHead(config)
        initialize_weights(self, config.initializer_range)

    def forward(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """`loss`: the ordinary tokens' binary cross-entropies; and how many of them are predicted to be replaced
        (`predicted`), are replaced (`replaced`), and both (`found`).
        """
        hidden_MD = self.hidden_ND(batch).index_select(0, batch.masked_positions)
        logits_M = self.substitution_head(hidden_MD).float()
        predicted, replaced = logits_M > 0, batch.labels == 1
        return {
            "loss": F.binary_cross_entropy_with_logits(logits_M, batch.labels.float(), reduction="sum"),
            "found": (predicted & replaced).sum().float(),
            "predicted": predicted.sum().float(),
            "replaced": replaced.sum().float(),
        }

    @staticmethod
    def metrics(sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        """Precision, recall and F1 are 0 where they would be 0 / 0. Accuracy would say little: five of six tokens are
        not replaced.
        """

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole else 0.0

        found, predicted, replaced = sums["found"], sums["predicted"], sums["replaced"]
        return {
            "loss": sums["loss"] / counts.labels,
            "detection_precision": ratio(found, predicted),
            "detection_recall": ratio(found, replaced),
            "detection_f1": ratio(2 * found, predicted + replaced),
        }

    @staticmethod
    def report(evaluation: Mapping[str, float]) -> dict[str, str]:
        measures = [f"{name} {evaluation[f'detection_{name}']:.3f}" for name in ("precision", "recall", "f1")]
        return {**Objective.report(evaluation), "replaced tokens found": ", ".join(measures)}

    @staticmethod
    def head_parameters(config: ModelConfig) -> int:
        return config.hidden_size**2 + config.hidden_size


OBJECTIVES: tuple[type[Objective], ...] = (
    MaskedLM,
    MaskedLMWithBagOfWords,
    MaskedLMWithNextSentence,
    RandomTokenSubstitution,
)
SUMMARIES = {objective.name: objective.summary for objective in OBJECTIVES}
"""The choices of `--objective`."""


def find_objective(name: str, packing: PackingConfig) -> type[Objective]:
    """The objective of a run.

    Raises:
        UserError: the name is unknown, or its objective needs another packing.
    """
    require_one_of("--objective", name, SUMMARIES)
    objective = _find(name, packing.is_paired)
    if objective is None:
        raise UserError(
            f"--objective {name} cannot be trained with --packing {packing.format}: choose another packing or another "
            "objective"
        )
    return objective


def objective_of(identity: Mapping[str, Any]) -> type[Objective]:
    """The objective of a checkpoint's run, from its identity; raises `UserError` if this version does not have it."""
    name = identity.get("objective", MaskedLM.name)
    objective = _find(name, bool(identity.get("next_sentence_prediction")))
    if objective is None:
        raise UserError(f"the checkpoint's objective {name!r} is unknown: use the version of ds_roberta that wrote it")
    return objective


def _find(name: str, is_paired: bool) -> type[Objective] | None:
    return next((each for each in OBJECTIVES if each.name == name and each.is_paired == is_paired), None)
