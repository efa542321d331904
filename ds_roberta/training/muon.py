"""The Muon optimizer for the encoder's matrices, with AdamW for all other parameters.

DeepSpeed gives an optimizer flat parts of the parameters, after it has reduced, unscaled and clipped the gradient. What
Muon keeps is elementwise and stays divided like that; only the update's direction is gathered, once a step, so that
whole matrices are orthogonalized. Each process does so with the matrices that it holds a part of.

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon, whose steps these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_roberta.distributed import Ranks
from ds_roberta.training.optimizer import Groups

ADAM_STATES, MUON_STATES = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # Jordan et al.'s, and torch.optim.Muon's
_MOMENTUM = 0.95
_ADAM_PARAMS = ("betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Matrix:
    """A matrix, and where it is: (rank, place in that rank's part, elements), in order; together they are all of it."""

    shape: torch.Size
    slices: list[tuple[int, int, int]]


class Muon(torch.optim.AdamW):
    """Muon for groups that have a `momentum`, AdamW for the others.

    Args:
        device: of the gathered matrices; the parameters may be in host memory.
        dtype: of the orthogonalization; torch.optim.Muon's is bf16.
    """

    def __init__(self, groups: list[dict[str, Any]], ranks: Ranks, device: torch.device, dtype: torch.dtype):
        super().__init__(groups, fused=True)
        self._ranks, self._device, self._dtype = ranks, device, dtype
        # What a flat parameter holds parts of; one without an entry is a whole matrix.
        self._layouts: dict[torch.Tensor, list[Matrix]] = {}
        self._hidden = {parameter for group in groups if "momentum" in group for parameter in group["params"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own looks for its step in every parameter's state

    def states_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The names of what is kept for a parameter of the model besides its weight."""
        return MUON_STATES if parameter in self._hidden else ADAM_STATES

    @property
    def _parts(self) -> list[torch.Tensor]:
        """What Muon updates: matrices, or the flat parameters that DeepSpeed has put in their place."""
        return [parameter for group in self.param_groups if "momentum" in group for parameter in group["params"]]

    def locate_matrices(self, parameters: Iterable[nn.Parameter], wrapper: Any, zero_stage: int) -> None:
        """Note what the flat parameters are made of; a collective call after DeepSpeed has made them.

        Args:
            parameters: the model's.
            wrapper: DeepSpeed's optimizer around this one.
        """
        if zero_stage == 0:
            return

        def own_slice(parameter: Any) -> tuple[int, int, int]:
            """Index of the flat parameter, place in it, elements without padding."""
            if zero_stage == 3:
                index, place, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
                return index, place, max(0, min(size, parameter.ds_numel - size * self._ranks.rank))
            mapping = parameter._hp_mapping  # None if other ranks have all of it
            return (0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel) if mapping else (0, 0, 0)

        hidden = [parameter for parameter in parameters if parameter in self._hidden]
        everyones = self._ranks.gather([own_slice(parameter) for parameter in hidden])
        parts = wrapper.fp32_partitioned_groups_flat if zero_stage == 3 else self._parts
        for index, parameter in enumerate(hidden):
            slices = [(rank, own[index][1], own[index][2]) for rank, own in enumerate(everyones) if own[index][2]]
            matrix = Matrix(getattr(parameter, "ds_shape", parameter.shape), slices)
            self._layouts.setdefault(parts[everyones[0][index][0]], []).append(matrix)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"] if "momentum" in group else ():
                if parameter.grad is not None:
                    self._update(parameter, group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        if self.param_groups:  # without any, torch warns of a CUDA graph
            super().step()
        self.param_groups = groups

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(buffer, group["momentum"]).to(self._device, self._dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        matrices = self._layouts.get(parameter)
        if matrices is None:
            matrices = [Matrix(parameter.shape, [(self._ranks.rank, 0, parameter.numel())])]
            directions = {self._ranks.rank: direction.flatten()}
        else:
            directions = dict(enumerate(self._gathered(direction)))
        own = parameter.view(-1)
        for matrix in matrices:
            places = [0]
            for _, _, size in matrix.slices:
                places.append(places[-1] + size)
            mine = [index for index, (rank, _, _) in enumerate(matrix.slices) if rank == self._ranks.rank]
            if not mine:
                continue
            parts = [directions[rank].narrow(0, place, size) for rank, place, size in matrix.slices]
            update = orthogonalized(torch.cat(parts).view(matrix.shape)).flatten().to(parameter.device)
            rate = group["lr"] * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
            for index in mine:
                _, place, size = matrix.slices[index]
                own.narrow(0, place, size).add_(update.narrow(0, places[index], size), alpha=-rate)

    def _gathered(self, direction: torch.Tensor) -> list[torch.Tensor]:
        """The parts of all ranks, which have one size."""
        if self._ranks.world_size == 1:
            return [direction]
        gathered = direction.new_empty(self._ranks.world_size * direction.numel())
        torch.distributed.all_gather_into_tensor(gathered, direction)
        return list(gathered.chunk(self._ranks.world_size))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T for a matrix U S V^T: five Newton-Schulz iterations in the matrix's dtype, as torch.optim.Muon's.

    Singular values end between 0.7 and 1.2, which serves as well as 1 (Jordan et al.).
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


def muon_arguments(
    model: Any, config: dict[str, Any], groups: Groups, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> dict[str, Any] | None:
    """The arguments with which `deepspeed.initialize` uses this optimizer; None if the JSON asks for another.

    DeepSpeed gets no section "optimizer": it would mark the parameters for its own Muon.
    """
    section = config["optimizer"]
    if section["type"].lower() != "muon":
        return None
    return {
        "config": {key: value for key, value in config.items() if key != "optimizer"},
        "model_parameters": muon_groups(model, groups, section["params"]),
        "optimizer": lambda groups: Muon(groups, ranks, device, dtype),
    }


def muon_groups(model: Any, groups: Groups, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with their settings but the rates, which every step sets; the encoder's matrices are Muon's.

    Args:
        groups: None, or groups with another weight decay.
        params: the JSON's `optimizer.params`.
    """
    hidden = {parameter for parameter in model.roberta.encoder.parameters() if parameter.ndim == 2}
    adam = {name: params[name] for name in _ADAM_PARAMS if name in params}
    muon = {**adam, "momentum": params.get("momentum", _MOMENTUM)}
    made = []
    for group in groups or [{"params": list(model.parameters())}]:
        for settings, is_hidden in ((muon, True), (adam, False)):
            parameters = [parameter for parameter in group["params"] if (parameter in hidden) == is_hidden]
            if parameters:
                made.append({**settings, **group, "params": parameters})
    return made
