"""A stand-in for the engine: a small module with moments, without DeepSpeed."""

import torch
from torch import nn

IDENTITY = {"data": "abc", "seed": 3, "model": {"hidden_size": 4, "hidden_dropout_prob": 0.1}, "train_batch_size": 8}


class FakeEngine:
    """What `checkpoint` needs of an engine; every rank holds the whole state."""

    def __init__(self, ranks, seed=0, module=None):
        self.ranks = ranks
        self.module = module or nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 2))
        generator = torch.Generator().manual_seed(seed)  # torch's own is shared by the threads

        def random(parameter):
            return torch.rand(parameter.shape, generator=generator)

        self.moments = {}
        for parameter in self.module.parameters():
            parameter.data = random(parameter)
            self.moments[parameter] = {key: random(parameter) for key in ("exp_avg", "exp_avg_sq")}
        self.applied_steps, self.loss_scaler_state = 0, {}

    def full_tensors(self, parameter):
        return {"weight": parameter.data, **self.moments[parameter]}

    def set_tensors(self, parameter, values):
        parameter.data.copy_(values["weight"])
        self.moments[parameter] = {key: values[key].clone() for key in ("exp_avg", "exp_avg_sq")}

    def content(self):
        return {
            f"{key}.{name}": tensor.clone()
            for name, parameter in self.module.named_parameters()
            for key, tensor in self.full_tensors(parameter).items()
        }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
