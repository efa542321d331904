"""A wrapper around DeepSpeed's engine, and the only module that creates one.

Accumulation. Gradients of all micro-steps are summed in fp32 on every process and reduced once a step, at every ZeRO
stage and precision:

* Each parameter's `grad_dtype` is fp32, so autograd itself adds low-precision gradients to an fp32 sum.
* Stages 0 and 1 reduce at the accumulation boundary only. Stages 2 and 3 would reduce at every micro-step;
  DeepSpeed's `coalesce_grad_reduction` defers that to the end of the step. Stage 1 in fp16 uses it too, because
  the sums are needed before they are reduced.
* Reduction is in fp32 (`DeepSpeedConfig.resolved`).

The loss of a step is the sum over its labelled tokens divided by their global number, so each micro-step's sum is
divided by that number; DeepSpeed averages over processes, which the factor `world_size` undoes.

In fp16 both factors are applied once a step to the fp32 sums: within the backward pass of a batch of 8,192 sequences
they would leave a masked token a weight of about 1e-6, times the loss scale. Measured on three layers of width 128
with a vocabulary of 8,000 (50,000): the gradient differs from fp32's by 0.07% (0.08%) at weights from 2^-3 on, 0.5%
(3.4%) at 2^-8 and 52% (59%) at 2^-12; the worst tensor by 3% (1%) from 2^2 on and 26% (9%) at 2^-3. So a token's
weight is the loss scale / `FP16_LOSS_UNIT`, whatever the batch and its partition: 2^4 at DeepSpeed's first scale of
2^16.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from ds_roberta.data.hashing import derive_key
from ds_roberta.data.loader import Counts, MicroBatch
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError, disk_refusal
from ds_roberta.files import sync_file
from ds_roberta.model.objectives import Objective
from ds_roberta.training.device import fastest_precision, without_compiler
from ds_roberta.training.loss_scale import LossScale
from ds_roberta.training.micro_batch import BatchPlan
from ds_roberta.training.muon import ADAM_STATES, Muon, muon_arguments
from ds_roberta.training.optimizer import Groups, StepResult

FP16_LOSS_UNIT = 4_096
"""What the loss is divided by within fp16's backward pass: about the masked tokens of a micro-batch."""
# Muon is not among the optimizers that DeepSpeed has tested with ZeRO: our tests do so.
logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())


class Engine:
    """A model in a DeepSpeed engine, stepped once per global batch."""

    def __init__(self, model: Objective, config: dict[str, Any], ranks: Ranks, seed: int, groups: Groups = None):
        """Initialize DeepSpeed with a model.

        Args:
            config: from `DeepSpeedConfig.resolved`.
            seed: the run's; dropout derives from it.
            groups: parameter groups; None if the optimizer treats all alike.

        Raises:
            UserError: DeepSpeed refuses the configuration.
        """
        self.ranks, self.config, self._seed = ranks, config, seed
        self.device = torch.device(get_accelerator().current_device_name())
        self.deepspeed_version = deepspeed.__version__
        try:
            # DeepSpeed prints memory figures to stdout.
            with contextlib.redirect_stdout(io.StringIO()), without_compiler():
                arguments = muon_arguments(model, config, groups, ranks, self.device, _fastest_dtype(ranks))
                self.deepspeed, *_ = deepspeed.initialize(
                    model=model, **(arguments or {"config": config, "model_parameters": groups})
                )
        except (ValueError, AssertionError) as error:
            raise UserError(f"DeepSpeed refuses the configuration: {error}") from error
        self.zero_stage = int(self.deepspeed.zero_optimization_stage())
        for parameter in self.module.parameters():
            parameter.grad_dtype = torch.float32
        fp16 = self.deepspeed.fp16_enabled()
        self._loss_scale = LossScale(self.deepspeed.optimizer, self._non_finite_gradients) if fp16 else None
        if isinstance(self.optimizer, Muon):
            self.optimizer.locate_matrices(self.module.parameters(), self.deepspeed.optimizer, self.zero_stage)
        # Adam's moments exist only after a first update: this is one, so that fresh and resumed runs are alike.
        nothing = torch.empty(0, dtype=torch.int64)
        self.rehearse(MicroBatch(torch.zeros(1, 2, dtype=torch.int64), None, nothing, nothing, 0, 0, nothing))
        self._link_moments()

    @property
    def module(self) -> Objective:
        return self.deepspeed.module

    @property
    def bucket_bytes(self) -> int:
        """What DeepSpeed's reduction takes of the device's memory at a step's first backward pass, and frees after it.

        It has contiguous buckets of their full size only where the optimizer is offloaded, whatever the JSON says.
        """
        wrapper = self.deepspeed.optimizer
        if self.zero_stage not in (1, 2) or not getattr(wrapper, "contiguous_gradients", False):
            return 0
        buckets = len(wrapper.ipg_buckets) * (2 if wrapper.overlap_comm else 1)
        return buckets * int(wrapper.reduce_bucket_size) * wrapper._gradient_reduction_buffer_dtype().itemsize

    def set_batch(self, plan: BatchPlan) -> None:
        """Tell DeepSpeed the sizes of a step, which its timers use."""
        self.deepspeed.set_train_micro_batch_size(plan.micro_batch_size)
        self.deepspeed.set_train_batch_size(plan.micro_batch_size * plan.accumulation_steps * plan.world_size)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside DeepSpeed's wrapper."""
        return self.deepspeed.basic_optimizer

    @property
    def applied_steps(self) -> int:
        """The number of updates by which Adam corrects its bias."""
        for entry in (*self.optimizer.param_groups, *self.optimizer.state.values()):
            if "step" in entry:
                return int(entry["step"])
        return 0

    @applied_steps.setter
    def applied_steps(self, steps: int) -> None:
        for entry in (*self.optimizer.param_groups, *self.optimizer.state.values()):
            if isinstance(entry.get("step"), torch.Tensor):
                entry["step"].fill_(steps)
            elif "step" in entry:
                entry["step"] = steps

    def full_tensors(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """The whole fp32 `weight` and moments (`exp_avg`, …) of a parameter; a collective call at stages 1 to 3."""
        moments = self.optimizer.states_of(parameter) if isinstance(self.optimizer, Muon) else ADAM_STATES
        if self.zero_stage == 0:
            return {"weight": parameter.data, **{key: self.optimizer.state[parameter][key] for key in moments}}
        return {
            "weight": safe_get_full_fp32_param(parameter),
            **{key: safe_get_full_optimizer_state(parameter, key) for key in moments},
        }

    def set_tensors(self, parameter: nn.Parameter, values: dict[str, torch.Tensor]) -> None:
        """The reverse of `full_tensors`; also sets the low-precision working weights; all ranks call it."""
        values = {key: value.to(self.device) for key, value in values.items()}
        moments = [key for key in values if key != "weight"]
        with torch.no_grad():
            if self.zero_stage == 3:
                partitions = {key: self._own_partition(parameter, value) for key, value in values.items()}
                safe_set_local_fp32_param(parameter, partitions["weight"])
                for key in moments:
                    safe_set_local_optimizer_state(parameter, partitions[key], key)
                # DeepSpeed sets only the fp32 master; the working copy follows only here.
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(values["weight"])
                return
            parameter.data.copy_(values["weight"])
            if self.zero_stage > 0:
                safe_set_full_fp32_param(parameter, values["weight"])
            for key in moments:
                if self.zero_stage == 0:
                    self.optimizer.state[parameter][key].copy_(values[key])
                else:
                    safe_set_full_optimizer_state(parameter, values[key], key)

    def _own_partition(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's part at stage 3, padded with zeros: `safe_set_full_*` fails on tensors that need padding."""
        size = parameter.partition_numel()  # type: ignore[attr-defined]  # DeepSpeed adds it
        padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
        return padded.narrow(0, size * self.ranks.rank, size)

    @property
    def loss_scaler_state(self) -> dict[str, float]:
        """The numbers of fp16's dynamic loss scaler; empty in other precisions."""
        return self._loss_scale.state if self._loss_scale else {}

    @loss_scaler_state.setter
    def loss_scaler_state(self, state: dict[str, float]) -> None:
        if self._loss_scale:
            self._loss_scale.state = state

    def save_deepspeed_checkpoint(self, folder: Path, tag: str, client_state: dict[str, Any]) -> str | None:
        """Write a durable checkpoint in DeepSpeed's layout into `folder/tag`; a collective call.

        Returns:
            What this rank could not write. It is returned, not raised: all ranks must reach DeepSpeed's next barriers.
        """
        problems: list[str] = []

        def guarded(write: Callable[..., object]) -> Callable[..., None]:
            def call(*arguments: Any, **keywords: Any) -> None:
                try:
                    write(*arguments, **keywords)
                except (OSError, RuntimeError) as error:  # torch raises the latter for a full disk
                    problems.append(disk_refusal(error) or str(error))

            return call

        def save(state_dict: dict[str, Any], path: str) -> None:
            write_file(state_dict, path)
            sync_file(Path(path))

        write_file, copy_scripts = self.deepspeed.checkpoint_engine.save, self.deepspeed._copy_recovery_script
        self.deepspeed.checkpoint_engine.save = guarded(save)
        self.deepspeed._copy_recovery_script = guarded(copy_scripts)
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
        finally:
            self.deepspeed.checkpoint_engine.save = write_file
            self.deepspeed._copy_recovery_script = copy_scripts
        return problems[0] if problems else None

    def load_deepspeed_checkpoint(self, folder: Path, tag: str) -> None:
        """Load such a checkpoint if ZeRO stage, precision and world size are the same; may raise `UserError`."""
        try:
            self.deepspeed.load_checkpoint(str(folder), tag=tag)
        except Exception as error:  # whatever pickle makes of a damaged file
            raise UserError(f"DeepSpeed cannot load the checkpoint {str(folder / tag)!r}: {error!r}") from error
        self._link_moments()

    def _link_moments(self) -> None:
        """Link moments to parameters: DeepSpeed does not do so for loaded moments, nor beyond the first group."""
        if self.zero_stage in (1, 2):
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def rehearse(self, *micro_batches: MicroBatch) -> None:
        """Take a step at weight and learning rate 0 and uncount it: nothing in the training changes."""
        applied_steps, loss_scaler_state = self.applied_steps, self.loss_scaler_state
        with self.accumulation():
            for number, micro_batch in enumerate(micro_batches, 1):
                self._micro_step(micro_batch, Counts(1, 1, 1), 0.0, last=number == len(micro_batches))
        self.step(0.0)
        self.applied_steps, self.loss_scaler_state = applied_steps, loss_scaler_state

    def twin(self, make_model: Callable[[], Objective]) -> Objective:
        """A model outside DeepSpeed that takes as much memory as this one: its weights, and an fp32 gradient.

        Up to stage 2 the weights are this model's own tensors; at stage 3, which spreads them over the processes,
        zeros of the full size.

        Args:
            make_model: makes another model like the engine's.
        """
        with torch.device("meta"):
            twin = make_model()
        weights = {
            name: torch.zeros(parameter.ds_shape, dtype=parameter.dtype, device=self.device)  # type: ignore[attr-defined]
            if self.zero_stage == 3
            else parameter.detach()
            for name, parameter in self.module.named_parameters()
        }
        twin.load_state_dict(weights, assign=True)
        for parameter in twin.parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return twin

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """One step's backward passes; their summed gradient is reduced when the block ends."""
        if not self._reduces_at_the_end:
            self.deepspeed.set_gradient_accumulation_boundary(False)
            yield
            return
        with self.deepspeed.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                # DeepSpeed would reduce what there is while the exception leaves, and wait for the other ranks.
                for parameter in self.module.parameters():
                    parameter.grad = parameter.grad_accum = None  # type: ignore[attr-defined]
                raise

    def forward_backward(
        self, micro_batch: MicroBatch, counts: Counts, global_step: int, micro_step: int, last: bool
    ) -> dict[str, torch.Tensor]:
        """Take one micro-step within `accumulation`.

        Args:
            counts: the counts of the whole global batch.
            last: whether the step's gradient is complete after this micro-step.

        Returns:
            The objective's sums, detached, on the device.
        """
        # The generator's state need not be saved: a resumed step draws the same dropout.
        torch.manual_seed(derive_key("dropout", self._seed, global_step, micro_step, self.ranks.rank) >> 1)
        return self._micro_step(micro_batch, counts, self.ranks.world_size / counts.labels, last)

    def _micro_step(
        self, micro_batch: MicroBatch, counts: Counts, weight: float, last: bool
    ) -> dict[str, torch.Tensor]:
        """Add the gradient of the micro-batch's loss times `weight`, which is the same in all micro-steps of a step."""
        if not self._reduces_at_the_end:
            self.deepspeed.set_gradient_accumulation_boundary(last)
        sums = self._forward(micro_batch)
        loss_sum = self.module.weigh(sums, counts)
        if self._loss_scale is None:
            self.deepspeed.backward(loss_sum * weight, scale_wrt_gas=False)
        else:
            self.deepspeed.backward(loss_sum / FP16_LOSS_UNIT, scale_wrt_gas=False)
            if last:
                torch._foreach_mul_(self._gradient_sums(), weight * FP16_LOSS_UNIT)
        return {name: value.detach() for name, value in sums.items()}

    @property
    def _reduces_at_the_end(self) -> bool:
        return self.zero_stage >= 2 or self._loss_scale is not None

    def _gradient_sums(self) -> list[torch.Tensor]:
        """This process's fp32 gradients before they are reduced; at stage 1 DeepSpeed keeps them in `grad_accum`."""
        candidates = ((getattr(p, "grad_accum", None), p.grad) for p in self.module.parameters())
        return [gradient for pair in candidates for gradient in pair if gradient is not None]

    def step(self, learning_rate: float, loss: float = 0.0, muon_lr: float = 0.0) -> StepResult:
        """Apply the optimizer to the accumulated gradient, which is then cleared; one that is not finite is discarded.

        Args:
            loss: the step's, the same on all ranks; if it is not finite, the loss scale is not to blame.
            muon_lr: the rate of the matrices that Muon updates, if it does.

        Raises:
            UserError: the gradient overflows in fp16 and the loss scale cannot become smaller.
        """
        if self._loss_scale:
            self._loss_scale.begin_step(loss)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = (muon_lr if "momentum" in group else learning_rate) * group.get("lr_ratio", 1.0)
        grad_norm = self._unpartitioned_grad_norm() if self.zero_stage == 0 else None
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm()) if grad_norm is None else grad_norm
        skipped = self._loss_scale is not None and self._loss_scale.end_step()
        return StepResult(grad_norm, skipped, self._loss_scale.value if self._loss_scale else 1.0)

    def _non_finite_gradients(self) -> list[str]:
        """Names of the parameters whose reduced gradient is not finite; a collective call."""
        return [
            name
            for name, parameter in self.module.named_parameters()
            if not bool(torch.isfinite(safe_get_full_grad(parameter)).all())
        ]

    def evaluate(self, micro_batch: MicroBatch) -> dict[str, float]:
        """The objective's sums, without dropout and without gradients."""
        self.deepspeed.eval()
        with torch.no_grad():
            sums = {name: float(value) for name, value in self._forward(micro_batch).items()}
        self.deepspeed.train()
        return sums

    def _forward(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        return self.deepspeed(micro_batch.to(self.device))

    def _unpartitioned_grad_norm(self) -> float:
        # A CPU's fp32 norm of a large matrix is off by up to a thousandth.
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in self.module.parameters()]
        return float(torch.linalg.vector_norm(torch.stack(norms)))


def _fastest_dtype(ranks: Ranks) -> torch.dtype:
    """bf16 if it is the fastest on all processes' devices, else fp32; a collective call."""
    return torch.float32 if ranks.any(fastest_precision() != "bf16") else torch.bfloat16
