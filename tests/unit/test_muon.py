"""Muon beside torch's own, without DeepSpeed."""

import copy

import pytest
import torch

from ds_roberta.config import ModelConfig
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.muon import Matrix, Muon, muon_groups, orthogonalized
from ds_roberta.training.optimizer import parameter_groups

PARAMS = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "momentum": 0.9}
RATES = {True: 0.02, False: 1e-3}


def model():
    torch.manual_seed(1)
    return MaskedLM(ModelConfig(vocab_size=50, num_hidden_layers=2, hidden_size=24, num_attention_heads=2))


def set_rates(groups):
    for group in groups:
        group["lr"] = RATES["momentum" in group]


@pytest.mark.parametrize("decay_all", [True, False])
def test_it_takes_the_steps_of_torchs_muon_and_adamw(solo_ranks, decay_all):
    ours = model()
    theirs = copy.deepcopy(ours)
    groups = muon_groups(ours, parameter_groups(ours, no_decay_bias_and_norm=not decay_all), PARAMS)
    assert sum(len(group["params"]) for group in groups) == len(list(ours.parameters()))
    optimizer = Muon(groups, solo_ranks, torch.device("cpu"), torch.bfloat16)
    hidden = [p for name, p in theirs.named_parameters() if "layer." in name and p.ndim == 2]
    assert len(hidden) == 12
    others = [p for p in theirs.parameters() if p not in set(hidden)]
    adam = {name: PARAMS[name] for name in ("betas", "eps", "weight_decay")}
    undecayed = [] if decay_all else [{"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]
    decayed = [{"params": [p for p in others if decay_all or p.ndim > 1]}]
    torchs = [
        torch.optim.Muon(hidden, lr=RATES[True], weight_decay=0.1, momentum=0.9),
        torch.optim.AdamW(decayed + undecayed, lr=RATES[False], fused=True, **adam),
    ]
    for _ in range(3):
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        set_rates(optimizer.param_groups)
        optimizer.step()
        for each in torchs:
            each.step()
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other), name


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_fp32_orthogonalizes_as_bf16_does_and_more_exactly(shape):
    matrix = torch.randn(shape)
    exact, rounded = orthogonalized(matrix), orthogonalized(matrix.bfloat16())
    assert float((exact - rounded).norm() / exact.norm()) < 0.03
    values = torch.linalg.svdvals(exact)
    assert 0.4 < float(values.min()) < float(values.max()) < 1.3


def test_parts_of_matrices_on_several_ranks_take_the_steps_of_whole_ones(on_ranks):
    """Three ranks with 40 elements each: a 6 x 8 and a 9 x 7 matrix, then padding."""
    shapes = (torch.Size([6, 8]), torch.Size([9, 7]))
    slices = [[(0, 0, 40), (1, 0, 8)], [(1, 8, 32), (2, 0, 31)]]
    weights = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(2)]

    def flat(tensors):
        return torch.cat([*(tensor.flatten() for tensor in tensors), torch.zeros(9)])

    whole = [torch.nn.Parameter(weight.clone()) for weight in weights]
    torchs = torch.optim.Muon(whole, lr=0.02, momentum=0.9, weight_decay=0.1)
    for own in gradients:
        for parameter, gradient in zip(whole, own, strict=True):
            parameter.grad = gradient.clone()
        torchs.step()

    def steps(ranks):
        part = torch.nn.Parameter(flat(weights)[40 * ranks.rank :][:40].clone())
        group = {"params": [part], "momentum": 0.9, "weight_decay": 0.1, "lr": 0.02}
        optimizer = Muon([group], ranks, torch.device("cpu"), torch.bfloat16)
        optimizer._layouts = {part: [Matrix(*each) for each in zip(shapes, slices, strict=True)]}
        optimizer._gathered = lambda direction: ranks.gather(direction)
        for own in gradients:
            part.grad = flat(own)[40 * ranks.rank :][:40].clone()
            optimizer.step()
        return part.detach()

    assert torch.equal(torch.cat(on_ranks(3, steps)), flat([parameter.detach() for parameter in whole]))
