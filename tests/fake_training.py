"""Stand-ins for what the training loop works with: data whose ids are places, a model of one number, its engine."""

import contextlib
import math
import os
import signal
from dataclasses import dataclass

import torch
from torch import nn

from ds_roberta.data.loader import Counts, MicroBatch
from ds_roberta.model.objectives import MaskedLM


class PlacesCollator:
    """Micro-batches whose inputs are their places; the mask shows the length."""

    def __init__(self, length):
        self.length = length

    def collate_all(self, sequences, places, micro_batch_size, mlm_probability):
        return [
            MicroBatch(
                input_ids=torch.from_numpy(part)[:, None],
                attention_mask=torch.ones(len(part), self.length, dtype=torch.bool),
                masked_positions=torch.arange(len(part)),
                labels=torch.from_numpy(part),
                tokens=len(part) * self.length,
                sequences=len(part),
            )
            for part in places.reshape(-1, micro_batch_size)
        ]


@dataclass
class Result:
    grad_norm: float = 1.0
    skipped: bool = False
    loss_scale: float = 1.0


class Interrupted(Exception):
    """Stands in for a kill."""


class OneWeight(MaskedLM):
    """The objective's numbers, without its encoder."""

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(1, 1))


class FakeEngine:
    """A model of one number, whose loss is that and some noise of each place, and much more at the spikes' places."""

    def __init__(self, ranks, spikes, interrupted_at=None):
        self.ranks, self.device, self.module = ranks, torch.device("cpu"), OneWeight()
        self.moments = {key: torch.zeros(1, 1) for key in ("exp_avg", "exp_avg_sq")}
        self.applied_steps, self.loss_scaler_state, self.micro_batch_sizes = 0, {}, []
        self._spikes, self._interrupted_at, self._calls = spikes, interrupted_at, 0
        self.places = {}
        self._gradient = 0.0

    def set_batch(self, plan):
        self.micro_batch_sizes.append((plan.train_batch_size, plan.micro_batch_size))

    def accumulation(self):
        return contextlib.nullcontext()

    def forward_backward(self, micro_batch, counts, global_step, micro_step, last):
        if micro_step == 0:
            self.places[global_step] = []
            self._calls += 1
            if self._calls == self._interrupted_at:
                raise Interrupted
        length = micro_batch.attention_mask.shape[1]
        places = [(length, place) for place in micro_batch.input_ids.flatten().tolist()]
        self.places[global_step] += places
        noise = sum(math.sin(place * length) for _, place in places)
        self._gradient += noise / counts.labels
        spike = sum(self._spikes.get(place, 0.0) for place in places)
        return {"loss": self.module.weight.detach().sum() * len(places) + 0.01 * noise + spike}

    def evaluate(self, micro_batch):
        raise AssertionError("`HeldOut` asks no model")

    def step(self, rate, loss, muon_lr):
        self.module.weight.data -= rate * self._gradient
        self._gradient = 0.0
        self.applied_steps += 1
        return Result(grad_norm=2.5)

    def full_tensors(self, parameter):
        return {"weight": parameter.data, **self.moments}

    def set_tensors(self, parameter, values):
        parameter.data.copy_(values["weight"])


class HeldOut:
    """A held-out sample whose losses are given, by the first step that has each; at `stopped_at`, a signal comes."""

    def __init__(self, trainer, losses, stopped_at=None):
        self.trainer, self.losses, self._stopped_at = trainer, losses, stopped_at

    def evaluate(self, model, stop):
        if self.trainer.state.global_step == self._stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop():
            return None
        step = max(step for step in self.losses if step <= self.trainer.state.global_step)
        return {"loss": self.losses[step]}, Counts(1, 1, 1)
