"""Trainer guards and counters on real engines: `guards_worker.py CASES CORPUS FOLDER`, started by `run_group`.

One engine of each ZeRO stage and precision takes many short runs, each from the same first checkpoint.
"""

import contextlib
import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from worker import BATCH, LENGTH, MUON, SEED, make, parameters, save, small_model, train

from ds_roberta.config import GuardConfig, IntervalConfig, MaskingConfig, PackingConfig, ScheduleConfig
from ds_roberta.data.loader import Collator, HeldOutSample
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import make_stages
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.process import leave, set_up_logging
from ds_roberta.training import checkpoint, deepspeed_checkpoint, loss_spikes
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.device import get_accelerator, init_distributed, on_gpu
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.settings import RunConfig
from ds_roberta.training.trainer import Trainer

COMBINATIONS = [
    (0, "fp32", ""),
    *((stage, precision, "") for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")),
    (2, "fp16", "-muon"),
    (3, "fp32", "-muon"),
]
ALSO_RARE = ("0-fp32", "2-bf16", "3-fp16")
POLICIES = ("off", "warn", "stop")
STEPS, SAVE_INTERVAL, HURT_STEP = 4, 2, 2
FP16 = {"enabled": True, "initial_scale_power": 12, "hysteresis": 1}
IDENTITY = {"packing": {"max_seq_length": LENGTH}}


class Lab:
    """Runs of one engine, in which something goes wrong once."""

    def __init__(self, ranks: Ranks, corpus: Corpus, folder: Path, stage: int, precision: str, optimizer: str):
        self.ranks, self.corpus, self.folder, self.has_muon = ranks, corpus, folder, bool(optimizer)
        changes = {"fp16": FP16} if precision == "fp16" else {}
        if self.has_muon:
            changes["optimizer"] = MUON
        self.engine, self.loader = make(ranks, corpus, stage, precision, 6, dropout=0.1, **changes)
        identity = {**IDENTITY, "model": asdict(small_model(corpus, 0.1))}
        state = TrainState(identity, loss_scaler=self.engine.loss_scaler_state)
        self.first = save(self.engine, corpus, folder / "first", state)

    def run(self, name: str, hurt=contextlib.nullcontext, policy="warn", rate=1e-3, path: Path | None = None, **others):
        """Run from the first checkpoint, or from `path`; return how the run ended and what is left of it.

        Args:
            hurt: makes a context in which it goes wrong.
            others: of `IntervalConfig` and `RunConfig`.
        """
        names = ("save_interval", "eval_interval", "keep_last")
        intervals = {"save_interval": SAVE_INTERVAL, "eval_interval": STEPS, "keep_last": 9}
        intervals |= {key: others.pop(key) for key in names if key in others}
        config = RunConfig(
            data_dir=self.corpus.folder,
            output_dir=self.folder / name,
            model_name="small",
            model=small_model(self.corpus, 0.1),
            packing=PackingConfig(LENGTH),
            schedule=ScheduleConfig(STEPS, 0),
            stages=make_stages(LENGTH, BATCH, None, None),
            intervals=IntervalConfig(**intervals),
            guard=GuardConfig(policy),
            **others,
        )
        self.ranks.on_main(lambda: config.output_dir.mkdir(exist_ok=True))
        state = checkpoint.load(self.engine, path or self.first)
        tokenizer = self.corpus.manifest.tokenizer
        packed = open_index(self.corpus, "train", PackingConfig(LENGTH))
        collator = Collator(packed, evaluation_masker(MaskingConfig(), tokenizer), tokenizer, LENGTH)
        held_out = HeldOutSample(collator, 8, 8, self.ranks)
        trainer = Trainer(
            config,
            self.engine,
            self.loader,
            held_out,
            state,
            path,
            peak_learning_rate=rate,
            peak_muon_lr=rate if self.has_muon else None,
            peak_flops=1e9,
            monitors=Monitors(config.output_dir, {}, False),
        )
        error = None
        try:
            with hurt():
                assert trainer.train()
        except UserError as problem:
            error = str(problem)
        errors = self.ranks.gather(error)
        assert errors == [error] * self.ranks.world_size
        folder = config.output_dir / checkpoint.CHECKPOINTS_FOLDER
        saved = sorted(checkpoint.saved_steps(folder))
        for step in saved if self.ranks.is_main else []:
            checkpoint.verify(checkpoint.step_folder(folder, step))
        self.ranks.barrier()
        lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        return {
            "error": error,
            "saved": saved,
            "hidden": [path.name for path in folder.glob(".*")],
            "state": asdict(trainer.state),
            "applied_steps": self.engine.applied_steps,
            "steps": [row["global_step"] for row in rows],
            "losses": [row["loss"] for row in rows],
            "counted": [[row["skipped_steps"], row["loss_spikes"], row["loss_scale"]] for row in rows],
        }

    @contextlib.contextmanager
    def patched(self, name: str, replacement):
        original = getattr(self.engine, name)
        setattr(self.engine, name, replacement(original))
        try:
            yield
        finally:
            setattr(self.engine, name, original)

    def loss_times(self, factor: float, at_step: int = HURT_STEP):
        """Multiply the loss of one micro-step on the last rank, the first time that the run reaches it."""
        waiting = [self.ranks.rank == self.ranks.world_size - 1]

        def replacement(forward_backward):
            def changed(micro_batch, counts, global_step, micro_step, *rest):
                if global_step != at_step or micro_step != 0 or not waiting[0]:
                    return forward_backward(micro_batch, counts, global_step, micro_step, *rest)
                waiting[0] = False
                with self.patched("_forward", lambda forward: lambda batch: {"loss": forward(batch)["loss"] * factor}):
                    return forward_backward(micro_batch, counts, global_step, micro_step, *rest)

            return changed

        return self.patched("forward_backward", replacement)

    @contextlib.contextmanager
    def infinite_gradient(self, at_step: int = HURT_STEP):
        """Make the gradient of one parameter infinite once, on the last rank alone; the loss stays finite."""
        step, waiting = [0], [self.ranks.rank == self.ranks.world_size - 1]

        def remember(forward_backward):
            def changed(micro_batch, counts, global_step, *rest):
                step[0] = global_step
                return forward_backward(micro_batch, counts, global_step, *rest)

            return changed

        def hook(gradient):
            if step[0] != at_step or not waiting[0]:
                return gradient
            waiting[0] = False
            return torch.full_like(gradient, torch.inf)

        handle = dict(self.engine.module.named_parameters())["lm_head.bias"].register_hook(hook)
        with self.patched("forward_backward", remember):
            yield
        handle.remove()

    def infinite_weight(self, at_step: int = HURT_STEP, key: str = "weight"):
        """Make one number of one parameter infinite once, after a step's update."""
        calls = []

        def replacement(step):
            def changed(*arguments):
                result = step(*arguments)
                calls.append(1)
                if len(calls) == at_step + 1:
                    parameter = dict(self.engine.module.named_parameters())["lm_head.bias"]
                    tensors = {name: value.clone() for name, value in self.engine.full_tensors(parameter).items()}
                    tensors[key][-1] = torch.inf
                    self.engine.set_tensors(parameter, tensors)
                return result

            return changed

        return self.patched("step", replacement)

    def nan_held_out_loss(self, call: int):
        """Make the held-out loss of one evaluation NaN; evaluations are counted from 0."""
        calls = []

        def replacement(evaluate):
            def changed(micro_batch):
                calls.append(1)
                return {"loss": math.nan} if len(calls) == call + 1 else evaluate(micro_batch)

            return changed

        return self.patched("evaluate", replacement)


def guards(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Record, at every stage and precision, what ends a run, what is rolled back, what is counted and what is saved."""
    loss_spikes.WINDOW = 2
    findings = {}
    for number, (stage, precision, optimizer) in enumerate(COMBINATIONS):
        name = f"{stage}-{precision}{optimizer}"
        lab = Lab(ranks, corpus, ranks.broadcast(folder / name), stage, precision, optimizer)
        found = {"diverged": lab.run("diverged", rate=1e20, save_interval=1)}
        policy = POLICIES[number % len(POLICIES)]
        found["nan"] = lab.run("nan", partial(lab.loss_times, math.nan), policy)
        found["rollback"] = lab.run("rollback", partial(lab.loss_times, math.nan), "rollback")
        found["gradient"] = lab.run("gradient", lab.infinite_gradient)
        if name in ALSO_RARE:
            found |= rare(lab)
        findings[name] = found
    if ranks.is_main:
        (folder / "guards.json").write_text(json.dumps(findings))


def rare(lab: Lab) -> dict:
    """Record what depends little on the stage and the precision."""
    found = {"resumed": lab.run("resumed", path=lab.folder / "rollback/checkpoints/global_step2", policy="rollback")}
    final = [
        checkpoint.weights(lab.folder / run / f"checkpoints/global_step{STEPS}") for run in ("rollback", "resumed")
    ]
    found["resumed"]["equal"] = all(torch.equal(value, final[1][key]) for key, value in final[0].items())
    for policy in ("warn", "stop", "rollback"):
        found[f"spike {policy}"] = lab.run(f"spike-{policy}", partial(lab.loss_times, 1e3), policy)
    for key in ("weight", "exp_avg_sq"):
        hurt = partial(lab.infinite_weight, key=key)
        found[key] = lab.run(key, hurt, save_interval=1, save_deepspeed_checkpoint=True)
        theirs = lab.folder / key / deepspeed_checkpoint.FOLDER
        found[key]["deepspeed"] = sorted(checkpoint.saved_steps(theirs))
    found["weight rollback"] = lab.run("weight-back", lab.infinite_weight, "rollback", save_interval=1)
    found["held-out"] = lab.run("held-out", partial(lab.nan_held_out_loss, 2), eval_interval=2)
    return found


def weight_decay(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Three steps with fixed positions and no decay of biases and LayerNorms, the third also resumed, and torch's."""
    differences = {}
    params = {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.5}
    for stage in (0, 1, 2, 3):
        changes = {"optimizer": {"type": "AdamW", "params": params}}
        engine, loader = make(ranks, corpus, stage, "fp32", 6, is_grouped=True, **changes)
        torch.manual_seed(SEED)
        plain = MaskedLM(small_model(corpus, 0.0)).to(engine.device)
        positions = plain.roberta.embeddings.position_embeddings.weight
        named = [(name, parameter) for name, parameter in plain.named_parameters() if parameter is not positions]
        is_left_out = [name.endswith("bias") or "norm" in name.lower() for name, _ in named]
        groups = [{"params": [p for (_, p), out in zip(named, is_left_out, strict=True) if not out]}]
        groups += [{"params": [p for (_, p), out in zip(named, is_left_out, strict=True) if out], "weight_decay": 0.0}]
        groups += [{"params": [positions], "lr": 0.0}]
        optimizer = torch.optim.AdamW(groups, **{**params, "betas": tuple(params["betas"])})
        for step in range(3):
            micro_batches = loader.micro_batches(step)
            (masked,) = ranks.sum(sum(len(batch.labels) for batch in micro_batches))
            for batch in micro_batches:
                (plain(batch.to(engine.device))["loss"] / masked).backward()
            for parameter in plain.parameters():
                torch.distributed.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
        train(engine, loader, 0, 2)
        path = save(engine, corpus, folder / f"decay-{stage}", TrainState(IDENTITY, global_step=2))
        train(engine, loader, 2, 3)
        final = parameters(engine)
        checkpoint.load(engine, path)
        train(engine, loader, 2, 3)
        again = parameters(engine)
        differences[stage] = {
            "from torch": max(
                float(abs(p.detach().cpu().numpy() - final[name]).max()) for name, p in plain.named_parameters()
            ),
            "resumed": max(float(abs(again[name] - value).max()) for name, value in final.items()),
        }
    if ranks.is_main:
        (folder / "weight_decay.json").write_text(json.dumps(differences))


def loss_scale(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """fp16 whose loss scale falls before a checkpoint and grows after it: the scaler after each step, and the steps
    that were applied.
    """
    fp16 = {"enabled": True, "initial_scale_power": 12, "hysteresis": 2, "loss_scale_window": 2}
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def steps(engine, loader, first: int, last: int) -> list[list[float]]:
        rows = []
        for step in range(first, last):
            train(engine, loader, step, step + 1)
            scaler = engine.deepspeed.optimizer.loss_scaler
            rows.append([*(getattr(scaler, name) for name in names), engine.applied_steps])
        return rows

    engine, loader = make(ranks, corpus, 2, "fp16", 4, fp16=fp16)
    overflow = engine.module.get_parameter("lm_head.bias").register_hook(lambda g: torch.full_like(g, torch.inf))
    rows = steps(engine, loader, 0, 2)
    overflow.remove()
    rows += steps(engine, loader, 2, 3)
    state = TrainState({}, global_step=3, skipped_steps=2, loss_scaler=engine.loss_scaler_state)
    portable = save(engine, corpus, folder / "loss_scale", state)
    theirs = deepspeed_checkpoint.save(engine, state, folder / "loss_scale-deepspeed", keep_last=2)
    findings = {"unbroken": rows + steps(engine, loader, 3, 5)}
    for layout in ("portable", "deepspeed"):
        engine, loader = make(ranks, corpus, 2, "fp16", 4, fp16=fp16)
        if layout == "portable":
            checkpoint.load(engine, portable)
        else:
            deepspeed_checkpoint.load(engine, theirs, state)
        findings[layout] = steps(engine, loader, 3, 5)
    if ranks.is_main:
        (folder / "loss_scale.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    set_up_logging()
    cases, corpus_folder, output = sys.argv[1:]
    all_ranks = init_distributed()
    if not on_gpu():
        get_accelerator().is_fp16_supported = lambda: True  # lets a CPU run dynamic loss scaling
    for case in (guards, weight_decay, loss_scale):
        if case.__name__ in cases.split(","):
            case(all_ranks, Corpus.open(corpus_folder), Path(output))
    leave(0)
