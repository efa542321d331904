from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import RobertaForMaskedLM

from ds_roberta.config import model_config
from ds_roberta.data.layout import FlatLayout
from ds_roberta.data.loader import MicroBatch
from ds_roberta.model.export import hf_config
from ds_roberta.model.kernels import flat_attention
from ds_roberta.model.objectives import MaskedLM

LENGTHS = {
    "all alike": [12] * 20,
    "all different": [*range(40, 1, -1)],
    "some alike": [16] * 11 + [15] * 3 + [9] * 9 + [8, 2],
    "as many as fill blocks": [40] * 26 + [39] * 3 + [12] * 20 + [2] * 70,
    "one": [7],
}
lengths_of = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@lengths_of
def test_blocks_have_every_token_once_and_give_it_back(lengths):
    layout = FlatLayout.of_lengths(np.array(lengths))
    values = torch.arange(1, sum(lengths) + 1)[:, None] * torch.tensor([1, -1])
    out, rows = torch.zeros_like(values), []
    for block in layout.blocks:
        spread = block.spread(values)
        mask = torch.ones(spread.shape[:2], dtype=torch.bool) if block.is_token is None else block.is_token
        rows += [row[own].tolist() for row, own in zip(spread, mask, strict=True)]
        assert not block.spread_gradient(values)[~mask].any()
        assert torch.equal(block.spread_gradient(values)[mask], spread[mask])
        block.collect(spread, out)
    assert torch.equal(out, values)
    assert rows == [part.tolist() for part in values.split(lengths)]
    assert layout.tokens == sum(lengths) <= len(layout.position_ids)
    assert layout.position_ids[: layout.tokens].tolist() == [at for length in lengths for at in range(length)]
    assert values[layout.first_tokens].tolist() == [row[0] for row in rows]


def test_sequences_of_equal_length_attend_together_without_padding():
    (block,) = FlatLayout.of_lengths(np.full(50, 9)).blocks
    assert (block.rows, block.columns, block.is_token) == (50, 9, None)


def test_sorted_sequences_need_little_padding():
    lengths = np.sort(np.random.default_rng(0).integers(60, 129, 64))[::-1]
    places = sum(block.rows * block.columns for block in FlatLayout.of_lengths(lengths).blocks)
    assert lengths.sum() <= places < 1.15 * lengths.sum() < 0.9 * 64 * 128


def flat_and_padded(lengths, vocabulary, generator):
    """The same sequences and masks as a flat micro-batch and as one of rows."""
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(4, vocabulary, mask.shape, generator=generator).where(mask, torch.tensor(1))
    chosen = mask & (torch.rand(mask.shape, generator=generator) < 0.3)
    labels = ids[chosen]
    padded = MicroBatch(ids, mask, chosen.flatten().nonzero()[:, 0], labels, int(mask.sum()), len(ids))
    layout = FlatLayout.of_lengths(lengths.numpy())
    flat_ids = torch.ones_like(layout.position_ids)
    flat_ids[: layout.tokens] = ids[mask]
    flat = MicroBatch(flat_ids, None, chosen[mask].nonzero()[:, 0], labels, int(mask.sum()), len(ids), None, layout)
    return flat, padded


def assert_same_losses_and_gradients(model, *batches):
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@lengths_of
def test_without_padding_losses_and_gradients_are_the_same(lengths):
    torch.manual_seed(0)
    model = MaskedLM(model_config("tiny", 300, 48))
    for parameter in model.parameters():  # none zero or one
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.eval()
    assert_same_losses_and_gradients(model, *flat_and_padded(lengths, 300, torch.Generator().manual_seed(1)))


@pytest.fixture
def flash(monkeypatch):
    """Flash attention of varying lengths, computed by plain products; None stands for its other results."""

    def attend(query, key, value, bounds, _, longest, __, dropout_p, is_causal, return_debug_mask):
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
        parts = []
        for first, end in pairwise(bounds.tolist()):
            assert 0 <= end - first <= longest
            own = [each[first:end].transpose(0, 1) for each in (query, key, value)]
            parts.append(F.scaled_dot_product_attention(*own).transpose(0, 1))
        return torch.cat(parts), None, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", attend)


@lengths_of
def test_on_a_gpu_losses_and_gradients_are_those_with_padding(flash, lengths):
    torch.manual_seed(0)
    model = MaskedLM(model_config("tiny", 300, 48)).eval()
    flat, padded = flat_and_padded(lengths, 300, torch.Generator().manual_seed(1))
    layout = FlatLayout.of_shape(np.array(lengths), None, 60 * 48, 48)
    ids = F.pad(flat.input_ids[: layout.tokens], (0, 60 * 48 - layout.tokens), value=1)
    assert_same_losses_and_gradients(model, replace(flat, input_ids=ids, layout=layout), padded)


def test_layouts_of_a_gpu_have_the_same_shapes():
    layouts = [FlatLayout.of_shape(np.array(lengths), None, 1_920, 48) for lengths in LENGTHS.values()]
    layouts.append(FlatLayout.of_shape(np.array([40, 30]), np.array([10, 30, 5, 5, 20]), 1_920, 48))
    shapes = {(layout.position_ids.shape, layout.cu_seqlens.shape, layout.longest) for layout in layouts}
    assert shapes == {((1_920,), (128,), 48), ((1_920,), (64,), 48)}  # some have more than 63 parts
    assert layouts[-1].cu_seqlens[:7].tolist() == [0, 10, 40, 45, 50, 70, 118]
    assert all(layout.cu_seqlens[-1] == 1_920 for layout in layouts)


@lengths_of
def test_gradients_of_attention_with_dropout_are_those_of_finite_differences(lengths):
    """In float64, with the same dropout in every call."""
    layout = FlatLayout.of_lengths(np.array(lengths[::12]))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(len(layout.position_ids), 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    direction = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)

    def value(*arguments):
        torch.manual_seed(0)
        return (flat_attention(*arguments, layout, 2, 0.2) * direction).sum()

    leaves = [each.clone().requires_grad_() for each in inputs]
    value(*leaves).backward()
    for number, leaf in enumerate(leaves):
        assert not leaf.grad[layout.tokens :].any()
        step = torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * 1e-6
        moved = [[each + sign * step if at == number else each for at, each in enumerate(inputs)] for sign in (1, -1)]
        difference = value(*moved[0]) - value(*moved[1])
        assert float(difference) == pytest.approx(float(2 * (leaf.grad * step).sum()), rel=1e-4)


def test_documents_that_attend_to_themselves_alone_are_as_transformers_with_such_a_mask():
    torch.manual_seed(0)
    config = model_config("tiny", 300, 48)
    ours = MaskedLM(config).eval()
    theirs = RobertaForMaskedLM(hf_config(config)).eval()
    theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
    documents = [[30, 10, 1], [41], [5, 5, 12], [3, 19]]
    lengths = torch.tensor([sum(parts) for parts in documents])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(4, 300, mask.shape).where(mask, torch.tensor(1))
    number = torch.full(ids.shape, -1)
    for row, parts in zip(number, documents, strict=True):
        row[: sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
    sees = (number[:, :, None] == number[:, None, :])[:, None]
    layout = FlatLayout.of_lengths(lengths.numpy(), np.concatenate(documents))
    flat_ids = torch.ones_like(layout.position_ids)
    flat_ids[: layout.tokens] = ids[mask]
    with torch.no_grad():
        mine = ours.roberta(flat_ids, layout=layout)[: layout.tokens]
        positions = (torch.arange(ids.shape[1]) + 2).expand_as(ids)
        expected = theirs.roberta(ids, torch.where(sees, 0.0, -1e9), position_ids=positions)[0][mask]
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
    out = torch.zeros(layout.tokens, 1)
    for block in layout.blocks:
        block.collect(block.spread(torch.arange(1.0, 1 + len(flat_ids))[:, None]), out)
    assert out[:, 0].tolist() == list(range(1, layout.tokens + 1))
