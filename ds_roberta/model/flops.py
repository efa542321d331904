"""The useful work of training, in floating-point operations."""

from __future__ import annotations

from ds_roberta.config import ModelConfig


def flops_per_token(config: ModelConfig, length: int, masked_share: float, objective: str = "mlm") -> float:
    """Floating-point operations of training that a token of a full sequence needs, forward and backward.

    A matrix of P parameters takes 2 P operations a token forward (a multiplication and an addition each) and twice that
    backward (gradients of input and of weights): 6 P, as Kaplan et al. (2020, arXiv:2001.08361, section 2.1) count.
    With hidden size D a layer has 4 D² in attention's projections and 2 · 4 D² in the MLP. The two products of
    attention (QKᵀ and weights · V) are of D multiplications each for every of the T tokens seen: 2 · 2 · D · T forward,
    12 D T in all. The head (D² and the vocabulary's D V) is needed at masked tokens alone. Look-ups of embeddings,
    biases, normalisation, softmax, dropout and the optimizer are not counted, nor is the head of pairs (D² a sequence).
    The head of random token substitution has D² + D, at all ordinary tokens.

    Args:
        length: T, the tokens of a sequence; of shorter ones it counts more of attention than they need.
        masked_share: of all tokens, `<s>` and `</s>` included, that have a label.
        objective: one of `config.OBJECTIVES`.
    """
    hidden = config.hidden_size
    layer = 6 * (4 * hidden**2 + 2 * hidden * config.intermediate_size) + 12 * hidden * length
    head = 6 * (hidden**2 + hidden * (1 if objective == "rts" else config.vocab_size))
    return config.num_hidden_layers * layer + masked_share * head
