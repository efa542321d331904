"""Before anything is learned, heads look at the tokens beside theirs, and the output has the tokens' frequencies."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_roberta.config import model_config
from ds_roberta.model.initialization import are_sinusoids, look_at_neighbours, predict_frequencies
from ds_roberta.model.objectives import MaskedLM

RANGE = 0.02
POSITIONS = "roberta.embeddings.position_embeddings.weight"
FIRST = "roberta.encoder.layer.0.attention.self."


def models(hidden_size: int, heads: int, length: int) -> tuple[MaskedLM, MaskedLM]:
    """One with BERT's initial weights, and the same with heads that look at neighbours."""
    changes = {"hidden_size": hidden_size, "num_attention_heads": heads, "intermediate_size": 2 * hidden_size}
    config = replace(model_config("nano", 2_000, length, hidden_dropout_prob=0.0), **changes)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(MaskedLM(config))
    look_at_neighbours(made[1].roberta, RANGE)
    return made[0], made[1]


@torch.no_grad()
def attention(model: MaskedLM, length: int) -> torch.Tensor:
    """The first layer's probabilities for random tokens: (B, H, T, T)."""
    own = model.roberta.encoder.layer[0].attention.self
    hidden = model.roberta.embeddings(torch.randint(5, 2_000, (8, length)))
    query, key = (part(hidden).unflatten(-1, (own.heads, -1)).transpose(1, 2) for part in (own.query, own.key))
    return torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, -1)


@pytest.mark.parametrize(
    ("hidden_size", "heads", "length", "least"),
    [(128, 2, 128, 0.95), (256, 4, 512, 0.9), (768, 12, 512, 0.9), (1024, 16, 512, 0.9), (35, 5, 32, 0.2)],
)
def test_the_first_heads_look_at_one_neighbour_each(hidden_size, heads, length, least):
    probabilities = attention(models(hidden_size, heads, length)[1], length)
    for head, offset in zip(range(heads), (-1, 1, -2, 2), strict=False):
        assert torch.diagonal(probabilities[:, head], offset, 1, 2).mean() > least


def test_all_else_begins_as_in_bert():
    usual, own = (dict(model.named_parameters()) for model in models(60, 6, 40))
    changed = {name for name in usual if not torch.equal(usual[name], own[name])}
    assert changed == {POSITIONS, FIRST + "query.weight", FIRST + "key.weight"}
    for name in (FIRST + "query.weight", FIRST + "key.weight"):
        assert torch.equal(usual[name][40:], own[name][40:])  # of the fifth and sixth head
    assert not own[POSITIONS][1].any()  # of padding


def test_the_table_is_as_wide_as_said_and_has_no_two_equal_rows():
    own = dict(models(128, 2, 512)[1].named_parameters())[POSITIONS][2:]
    torch.testing.assert_close(own.square().mean(1).sqrt(), torch.full((512,), 2 * RANGE))
    assert torch.cdist(own, own).fill_diagonal_(1).min() > 0.1


@torch.no_grad()
def test_a_head_that_begins_at_the_frequencies_predicts_them():
    usual, own = models(128, 2, 32)
    frequencies = np.random.default_rng(0).dirichlet(np.full(2_000, 0.3)) + 1e-7
    frequencies /= frequencies.sum()
    predict_frequencies(own.lm_head.bias, frequencies)
    input_ids, places = torch.randint(5, 2_000, (4, 32)), torch.arange(4 * 32)
    divergences = [
        torch.nn.functional.kl_div(
            model.logits(input_ids, None, places).log_softmax(-1),
            torch.from_numpy(frequencies).float().expand(len(places), -1),
            reduction="batchmean",
        )
        for model in (usual, own)
    ]
    assert divergences[0] > 1
    assert divergences[1] < 0.05


@pytest.mark.parametrize(("hidden_size", "heads"), [(128, 2), (35, 5)])
def test_its_positions_are_known_whatever_their_size_and_precision(hidden_size, heads):
    usual, own = (dict(model.named_parameters())[POSITIONS].detach() for model in models(hidden_size, heads, 40))
    assert are_sinusoids(own, 1)
    assert are_sinusoids(3 * own.bfloat16(), 1)
    moved = own + 0.02 * own.norm() / own.numel() ** 0.5 * torch.randn(own.shape)
    for other in (usual, moved, -own, own.flip(0), torch.zeros_like(own)):
        assert not are_sinusoids(other, 1)
