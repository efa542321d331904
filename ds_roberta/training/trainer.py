"""The training loop.

A step is one optimizer step on exactly `train_batch_size` sequences; its micro-steps are counted from 0.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_roberta.data.loader import Counts, HeldOutSample, LoaderStage, MicroBatch, TrainLoader
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.stages import skip
from ds_roberta.distributed import StopRequest
from ds_roberta.errors import UserError
from ds_roberta.lease import Lease
from ds_roberta.model.initialization import RANDOM
from ds_roberta.progress import MicroStepBar
from ds_roberta.training import checkpoint, deepspeed_checkpoint
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER, TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention
from ds_roberta.training.facts import completed_identity
from ds_roberta.training.loss_plateau import LossPlateau, find_plateau, remedy, with_evaluation
from ds_roberta.training.loss_spikes import LossSpike, spike_limit, with_loss
from ds_roberta.training.metrics import MetricsLog, memory_gb
from ds_roberta.training.micro_batch import BatchPlan
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.optimizer import StepResult
from ds_roberta.training.schedules import learning_rate
from ds_roberta.training.settings import RunConfig

if TYPE_CHECKING:  # the loop is tested without DeepSpeed
    from ds_roberta.training.engine import Engine


class Trainer:
    """Trains a run from its state to its end; `ds_roberta.training.run` makes its parts.

    Args:
        held_out: None if there is no validation split.
        last_checkpoint: the portable one that `state` comes from; None for a fresh run.
        peak_learning_rate: Adam's.
        peak_muon_lr: that of the matrices that Muon updates; None if the optimizer is not Muon.
        peak_flops: peak FLOP/s of one device.
        monitors: already open; the caller closes them.
        lease: rank 0's on the run's folder, checked before anything is written there; None where nobody else writes.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loader: TrainLoader,
        held_out: HeldOutSample | None,
        state: TrainState,
        last_checkpoint: Path | None,
        *,
        peak_learning_rate: float,
        peak_muon_lr: float | None = None,
        peak_flops: float,
        monitors: Monitors,
        lease: Lease | None = None,
    ):
        self.config, self.engine, self.loader, self.state = config, engine, loader, state
        self.ranks, self.objective = engine.ranks, engine.module
        self._peak_learning_rate, self._peak_muon_lr = peak_learning_rate, peak_muon_lr
        self._peak_flops = peak_flops * self.ranks.world_size
        self._held_out = held_out
        self.last_checkpoint = last_checkpoint
        self._saved_state = copy.deepcopy(state) if last_checkpoint else None
        self._stop = StopRequest(self.ranks)
        self._monitors, self._lease = monitors, lease
        lines = ", ".join(f"{name} {loss:.3f}" for name, loss in state.lines.items())
        self._progress = MicroStepBar(config.schedule.max_steps, state.global_step, self.ranks.is_main, lines)
        self._metrics = self._open_metrics()
        self._writer = CheckpointWriter(
            engine,
            config.data_dir / TOKENIZER_FOLDER,
            config.output_dir / CHECKPOINTS_FOLDER,
            Retention(config.intervals.keep_last, config.intervals.keep_every),
            self._progress.say,
            lease,
        )
        self._stage: LoaderStage | None = None

    def train(self) -> bool:
        """Train until `max_steps` or until asked to stop, saving as configured.

        Returns:
            Whether the run is complete.
        """
        with self._stop, contextlib.closing(self._progress), self._writer:
            while True:
                try:
                    complete = self._take_steps()
                    self.save()
                    return complete
                except LossPlateau:
                    self.save()
                    self._writer.finish()
                    raise
                except LossSpike as spike:
                    self._writer.finish()
                    if self.config.guard.loss_spike != "rollback":
                        raise
                    self._roll_back(spike)

    def _take_steps(self) -> bool:
        """Train from the state's step to `max_steps` and its evaluation; False if a request to stop ended it early."""
        schedule, intervals, state = self.config.schedule, self.config.intervals, self.state
        with contextlib.closing(
            self.loader.steps(state.global_step, schedule.max_steps, state.skipped_places)
        ) as steps:
            complete = self.evaluate_and_save()
            while True:
                began = time.perf_counter()
                micro_batches = next(steps, None)
                if micro_batches is None:
                    break
                try:
                    row = self.train_step(micro_batches, began)
                    if row is None:
                        return False
                    if state.global_step % intervals.log_interval == 0 or state.global_step == schedule.max_steps:
                        self.log(row)
                    complete = self.evaluate_and_save()
                except UserError:  # raised on all ranks: they share a step's numbers, and rank 0's errors
                    self._writer.finish()
                    raise
        return complete

    def _open_metrics(self) -> MetricsLog:
        """The run's log, which rank 0 writes; it and the monitors are cut back to the state's step."""

        def open_metrics() -> MetricsLog:
            metrics = MetricsLog(self.config.output_dir, self.state.global_step, self._evaluation_is_due())
            self._monitors.start(metrics, self.state.global_step, self._progress.say)
            return metrics

        return self.ranks.on_main(open_metrics)

    def _enter_stage(self) -> None:
        """Prepare the engine and the progress bar if the next step begins another stage."""
        current = self.loader.stage(self.state.global_step)
        if self.state.global_step == current.stage.first_step:
            self.state.recent_losses = []  # a stage is compared only with itself
        if current is self._stage:
            return
        if self._stage is not None:
            self._progress.restart(self.state.global_step)
        self._stage = current
        plan = BatchPlan(current.stage.train_batch_size, current.micro_batch_size, self.ranks.world_size)
        self.engine.set_batch(plan)

    def train_step(self, micro_batches: list[MicroBatch], began: float) -> dict[str, Any] | None:
        """Take one optimizer step on this process's micro-batches of the next global batch.

        Args:
            began: `time.perf_counter()` when the process began to wait for these micro-batches.

        Returns:
            The step's row of metrics, or None if the processes agreed to stop: the step is then discarded.

        Raises:
            LossSpike: the loss is a spike, or it or the gradient is not finite (in fp16, such a gradient of a finite
                loss skips the step instead); the state is unchanged, the engine is not.
            UserError: in fp16 the gradient overflows and the loss scale cannot become smaller.
        """
        self._enter_stage()
        state, waited = self.state, time.perf_counter() - began
        counts = Counts.total([micro_batch.counts for micro_batch in micro_batches], self.ranks)
        micro_batches = self.loader.level(state.global_step, micro_batches, self.ranks)
        sums: dict[str, torch.Tensor] = {}
        with self.engine.accumulation():
            for micro_step, micro_batch in enumerate(micro_batches):
                if self._stop.agreed():
                    return None
                last = micro_step == len(micro_batches) - 1
                more = self.engine.forward_backward(micro_batch, counts, state.global_step, micro_step, last)
                sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
                self._progress.micro_step(micro_step, len(micro_batches), next(iter(sums.values())).item)
        metrics = self.objective.metrics(self.ranks.sum_each(sums), counts)
        peaks = {"learning_rate": self._peak_learning_rate, "muon_lr": self._peak_muon_lr}
        rates = {
            name: learning_rate(self.config.schedule, peak, state.global_step + 1)
            for name, peak in peaks.items()
            if peak is not None
        }
        result = self.engine.step(rates["learning_rate"], metrics["loss"], rates.get("muon_lr", 0.0))
        self._check_loss(metrics["loss"], result)
        state.recent_losses = with_loss(state.recent_losses, metrics["loss"])
        state.count_step(counts, result.skipped)
        return self._row(metrics, rates, result, counts, waited, time.perf_counter() - began)

    def _row(
        self,
        metrics: dict[str, float],
        rates: dict[str, float],
        result: StepResult,
        counts: Counts,
        waited: float,
        seconds: float,
    ) -> dict[str, Any]:
        """The step just taken as a row of `metrics.jsonl`; the progress bar shows some of it."""
        assert self._stage is not None
        state, length = self.state, self._stage.stage.max_seq_length
        flops = self.objective.flops_per_token(self.config.model, length, counts.labels / counts.tokens)
        row = {
            "global_step": state.global_step,
            **metrics,
            **rates,
            "grad_norm": result.grad_norm,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "tokens_per_second": counts.tokens / seconds,
            "mfu": counts.tokens * flops / seconds / self._peak_flops,
            "step_seconds": seconds,
            "data_wait_share": waited / seconds,
            "memory_gb": memory_gb(self.engine.device),
            "loss_scale": result.loss_scale,
            "skipped_steps": state.skipped_steps,
            "skipped_samples": sum(entry.end_place - entry.first_place for entry in state.skipped_places),
            "loss_spikes": state.loss_spikes,
        }
        self._progress.step(state.global_step, row["loss"], row["tokens_per_second"], row["mfu"], seconds)
        return row

    def evaluate_and_save(self) -> bool:
        """Between two steps: do what is due, and advance the save in flight.

        Returns:
            False if a request to stop interrupted an evaluation that was due.
        """
        state, intervals = self.state, self.config.intervals
        self._writer.poll()
        self._monitors.saved(self._writer.saved_step)
        evaluated = self.evaluate() if self._evaluation_is_due() else True
        is_best = state.best_step == state.global_step
        if state.global_step and (is_best or state.global_step % intervals.save_interval == 0):
            self.save()
        return evaluated

    def _evaluation_is_due(self) -> bool:
        step = self.state.global_step
        return step % self.config.intervals.eval_interval == 0 or step == self.config.schedule.max_steps

    def _check_loss(self, loss: float, result: StepResult) -> None:
        """Check the step just taken: raise `LossSpike` as `train_step` says, or count and report a spike."""
        state, guard, step = self.state, self.config.guard, self.state.global_step + 1
        if not math.isfinite(loss) or not (result.skipped or math.isfinite(result.grad_norm)):
            numbers = f"the loss ({loss}) or the gradient norm ({result.grad_norm})"
            raise LossSpike(f"{numbers} of step {step} is not finite", step)
        if guard.loss_spike_threshold is None:
            return
        limit = spike_limit(state.recent_losses, guard.loss_spike_threshold)
        if loss <= limit:
            return
        problem = f"the loss of step {step} is a spike: {loss:.4f}, above {limit:.4f}"
        if guard.loss_spike != "warn":
            raise LossSpike(
                problem,
                step,
                "; the step is not saved: resume from the last checkpoint with --loss_spike rollback, which skips "
                "this data, or with a lower learning rate",
            )
        state.loss_spikes += 1
        self._progress.say(problem)

    def _roll_back(self, spike: LossSpike) -> None:
        """Go back to the newest good checkpoint and skip the data since then, including that of the spiked step.

        The skipped places are saved at once, so that an interrupted run skips the same ones.

        Raises:
            UserError: there is no checkpoint, or it does not help: the run was rolled back to it before or began there.
        """
        folder = self.config.output_dir / CHECKPOINTS_FOLDER
        begun, is_saved = self.last_checkpoint, self._writer.saved_step > 0
        is_others = begun is not None and not is_saved and begun.resolve().parent != folder.resolve()
        path = self.ranks.on_main(lambda: checkpoint.choose(str(begun) if is_others else "auto", folder))
        if path is None:
            raise UserError(f"{spike.problem}; there is no checkpoint to go back to")
        spiked = self.state
        self.state = checkpoint.load(self.engine, path)
        self.state.identity = completed_identity(self.state.identity)
        self.state.begin_at(spiked.resumed_from, is_own=not is_others)
        self.state.continue_as(spiked.identity, spiked.eval_sequences)
        self.state.lines = spiked.lines
        step, skipped_before = self.state.global_step, self.state.skipped_places
        if any(entry.global_step == step for entry in skipped_before):
            raise UserError(f"{spike.problem}; it is the second one since step {step}: skipping data does not help")
        if spike.step == step:
            raise UserError(
                f"{spike.problem}, at the checkpoint {str(path)!r} itself: resume from an earlier one with --resume"
            )
        self.state.skipped_places = skip(self.loader.stages, step, skipped_before, spike.step, spiked.skipped_places)
        self.state.loss_spikes = spiked.loss_spikes + 1
        self.last_checkpoint = path
        self._progress.restart(step)
        self._progress.say(f"{spike.problem}: rolled back to {path}; the data since then is skipped")
        self._metrics = self._open_metrics()
        self.save()

    def evaluate(self) -> bool:
        """Evaluate on the held-out split, if there is one, log it, and remember the step with the lowest loss.

        A run that resumes at a step where this is due does it again, so an interruption leaves no trace.

        Returns:
            False if a request to stop interrupted it.

        Raises:
            LossSpike: the loss is not finite: the model is useless, whatever the training loss says.
            LossPlateau: it stalls, and the run is to stop when it does.
        """
        if self._held_out is None:
            return True
        result = self._held_out.evaluate(self.engine.evaluate, self._stop.agreed)
        if result is None:
            return False
        state, evaluation = self.state, self.objective.evaluation(*result)
        loss = evaluation["loss"]
        if not math.isfinite(loss):
            raise LossSpike(
                f"the held-out loss ({loss}) after step {state.global_step} is not finite", state.global_step
            )
        lowest = math.inf if state.best_eval_loss is None else state.best_eval_loss
        if state.global_step and loss < lowest:
            state.best_eval_loss, state.best_step = loss, state.global_step
        columns = {f"eval_{name}": value for name, value in evaluation.items()}
        are_logged = state.lines.items() <= self._metrics.latest.items()
        self.log({"global_step": state.global_step, **columns, **({} if are_logged else state.lines)})
        report = "; ".join(f"{name} {text}" for name, text in self.objective.report(evaluation).items())
        self._progress.say(f"step {state.global_step}: {report}")
        self._check_plateau(loss)
        return True

    def _check_plateau(self, loss: float) -> None:
        """Report the plateau that the held-out loss is on, once for each kind, or raise `LossPlateau`."""
        state, max_steps = self.state, self.config.schedule.max_steps
        if not state.lines:
            return
        state.recent_evaluations = with_evaluation(state.recent_evaluations, state.global_step, loss, max_steps)
        if self.config.guard.loss_plateau == "off" or not self._trains_at_held_out_length:
            return
        plateau = find_plateau(state.recent_evaluations, max_steps, state.lines)
        if plateau is None:
            return
        reported, state.plateau = state.plateau, plateau.kind
        advice = remedy(self.config.initial_attention != RANDOM or bool(state.identity.get("init_from")))
        if self.config.guard.loss_plateau == "stop":
            raise LossPlateau(f"{plateau.problem}; the step is saved: --loss_plateau warn continues; {advice}")
        if plateau.kind != reported:
            self._progress.say(f"{plateau.problem}; {advice}")

    @property
    def _trains_at_held_out_length(self) -> bool:
        """Whether the last step had sequences as long as the held-out ones; else it says little about their end."""
        last_step = max(self.state.global_step - 1, 0)
        return self.loader.stage(last_step).stage.max_seq_length == self.config.packing.max_seq_length

    def log(self, row: dict[str, Any]) -> None:
        """Write a row to `metrics.jsonl` and to the monitors."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.ranks.on_main(lambda: self._write_row(finite))
        self._monitors.write(finite)

    def _write_row(self, row: dict[str, Any]) -> None:
        if self._lease:
            self._lease.check()
        self._metrics.write(row)

    def save(self) -> None:
        """Begin to write a checkpoint unless this state has one; it becomes `last_checkpoint` when the writer is done.

        Raises:
            LossSpike: a weight or a moment is not finite: the step's update was too large, whatever its loss was.
        """
        state = self.state
        if self._saved_state == state:
            return
        state.loss_scaler = self.engine.loss_scaler_state
        self.last_checkpoint = self._writer.save(state)
        if self.config.save_deepspeed_checkpoint:
            folder = self.config.output_dir / deepspeed_checkpoint.FOLDER
            try:
                deepspeed_checkpoint.save(self.engine, state, folder, self.config.intervals.keep_last)
            except UserError:
                self._writer.finish()  # the portable one is good
                raise
        self._saved_state = copy.deepcopy(state)
