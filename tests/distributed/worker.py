"""What runs inside the processes of the distributed tests: `worker.py CASES CORPUS FOLDER`, started by `run_group`.

Starting a process group costs seconds, so one group runs many configurations and writes its findings as JSON.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from reductions import Reductions

from ds_roberta.config import MaskingConfig, ModelConfig, PackingConfig, Stage, model_config
from ds_roberta.data.loader import Collator, Counts, LoaderStage, MicroBatch, TrainLoader
from ds_roberta.data.masking import training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import MaskedLM, find_objective
from ds_roberta.model.weights import POSITION_EMBEDDINGS
from ds_roberta.process import leave, set_up_logging
from ds_roberta.training import checkpoint, deepspeed_checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention
from ds_roberta.training.compilation import compile_layers, compile_model
from ds_roberta.training.device import get_accelerator, init_distributed, on_gpu
from ds_roberta.training.engine import Engine
from ds_roberta.training.micro_batch import BatchPlan, Trial, full_micro_batch, largest_size
from ds_roberta.training.optimizer import parameter_groups

SEED, BATCH = 3, 22  # neither 3 nor 4 processes divide 22
PAD = 1
LENGTH = int(os.environ.get("SEQUENCE_LENGTH", "32"))
MUON = {"type": "Muon", "params": {"muon_lr": 0.01, "adam_lr": 1e-3, "weight_decay": 0.1}}
REPOSITORY = Path(__file__).parents[2]


def small_model(corpus: Corpus, dropout: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=corpus.manifest.tokenizer.vocab_size,
        num_hidden_layers=1,
        hidden_size=48,
        num_attention_heads=2,
        max_position_embeddings=LENGTH + 2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def make(
    ranks: Ranks,
    corpus: Corpus,
    stage: int,
    precision: str,
    micro_batch_size: int,
    dropout: float = 0.0,
    packing: PackingConfig = PackingConfig(LENGTH),  # noqa: B008 - it is frozen
    objective: str = "mlm",
    is_grouped: bool = False,
    offloaded: bool = False,
    **changes,
):
    """An engine and a loader of a very small model, as `ds_roberta.training.run` makes them.

    `is_grouped` fixes positions and does not decay biases and norms; `offloaded` puts the optimizer and at stage 3 the
    weights into host memory; `changes` are entries of the JSON.
    """
    path = REPOSITORY / "ds_configs" / f"zero{max(stage, 1)}.json"
    config = DeepSpeedConfig.read(path, train_batch_size=BATCH, learning_rate=1e-3)
    config.content["zero_optimization"]["stage"] = stage
    on_host = ("offload_optimizer", "offload_param")[: 1 + stage // 3] if offloaded else ()
    config.content["zero_optimization"] |= {key: {"device": "cpu"} for key in on_host}
    config.content.update(changes)
    tokenizer = corpus.manifest.tokenizer
    torch.manual_seed(SEED)
    model = find_objective(objective, packing)(small_model(corpus, dropout))
    groups = parameter_groups(model, True, {model.get_parameter(POSITION_EMBEDDINGS)}) if is_grouped else None
    engine = Engine(model, config.resolved(precision, on_gpu()), ranks, SEED, groups)
    engine.set_batch(BatchPlan(config.train_batch_size, micro_batch_size, ranks.world_size))
    packed = open_index(corpus, "train", packing)
    masker = training_masker(MaskingConfig(), tokenizer, SEED, kind=model.masker)
    collator = Collator(packed, masker, tokenizer, LENGTH, padded=on_gpu())
    only = Stage(0, LENGTH, config.train_batch_size)
    stages = [LoaderStage(only, collator, SampleOrder(len(packed), SEED), micro_batch_size)]
    return engine, TrainLoader(stages, ranks.rank, ranks.world_size)


def train(engine: Engine, loader: TrainLoader, first: int, last: int, more_masked: int = 1) -> list[dict[str, float]]:
    """Take steps `first` … `last - 1` as the trainer does; return loss, gradient norm and collective reductions.

    Args:
        more_masked: divide the loss as if the batch had this many times as many masked tokens.
    """
    rows = []
    for step in range(first, last):
        micro_batches = loader.level(step, loader.micro_batches(step), engine.ranks)
        counts = Counts.total([batch.counts for batch in micro_batches], engine.ranks)
        counts = counts._replace(labels=counts.labels * more_masked)
        loss_sum = 0.0
        with Reductions() as reductions:
            with engine.accumulation():
                for micro_step, batch in enumerate(micro_batches):
                    last_one = micro_step == len(micro_batches) - 1
                    loss_sum += float(engine.forward_backward(batch, counts, step, micro_step, last_one)["loss"])
            result = engine.step(1e-3, muon_lr=0.01)
        rows.append(
            {
                "loss": engine.ranks.sum(loss_sum)[0] / counts.labels,
                "grad_norm": result.grad_norm,
                "reduced": reductions.elements,
                "skipped": result.skipped,
                "data": sorted(digest for own in engine.ranks.gather(digests(micro_batches)) for digest in own),
            }
        )
    return rows


def digests(micro_batches: list[MicroBatch]) -> list[str]:
    """Return a hash of the inputs and labels of every sequence."""
    found = []
    for batch in micro_batches:
        labels = torch.full((batch.input_ids.numel(),), -100)
        labels[batch.masked_positions] = batch.labels
        rows = torch.stack([batch.input_ids.flatten(), labels])
        firsts = batch.first_tokens.tolist()
        for first, end in zip(firsts, [*firsts[1:], None], strict=True):
            own = rows[:, first:end]
            own = own[:, own[0] != PAD]
            found.append(hashlib.sha256(own.contiguous().numpy().tobytes()).hexdigest()[:16])
        del found[len(found) - len(firsts) + batch.sequences :]
    return found


def parameters(engine: Engine) -> dict[str, np.ndarray]:
    return {
        name: engine.full_tensors(parameter)["weight"].float().cpu().numpy().copy()
        for name, parameter in engine.module.named_parameters()
    }


def partition(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Three steps of every ZeRO stage and precision; findings and final parameters go to files."""
    findings, cases = {}, [*((stage, "fp32", 4) for stage in (0, 1, 2, 3)), (2, "fp32", 3)]
    if on_gpu() or ranks.world_size in (2, 3):  # on a CPU, low precision is slow
        cases += [(stage, precision, 4) for precision in ("bf16", "fp16") for stage in (1, 2, 3)] + [(2, "bf16", 1)]
    for stage, precision, micro_batch_size in cases:
        engine, loader = make(ranks, corpus, stage, precision, micro_batch_size)
        name = f"{stage}-{precision}-{micro_batch_size}"
        findings[name] = train(engine, loader, 0, 3)
        final = parameters(engine)
        if ranks.is_main:
            np.savez(folder / f"{name}-{ranks.world_size}.npz", **final)
    if ranks.is_main:
        (folder / f"partition-{ranks.world_size}.json").write_text(json.dumps(findings))


def reference(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Record the losses of three steps of ZeRO-0 in fp32."""
    engine, loader = make(ranks, corpus, 0, "fp32", 4)
    (folder / "reference.json").write_text(json.dumps([row["loss"] for row in train(engine, loader, 0, 3)]))


def save(engine: Engine, corpus: Corpus, folder: Path, state: TrainState) -> Path:
    """Save a portable checkpoint, and return it when it is complete."""
    with CheckpointWriter(engine, corpus.folder / "tokenizer", folder, Retention(2)) as writer:
        return writer.save(state)


def resume(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Each stage and precision, dropout on: steps without a break against two, a checkpoint and the others.

    The portable checkpoint is still being written while the unbroken run goes on.
    """
    findings, end = {}, 4 if on_gpu() else 3  # a GPU's test sees the moments in the second loss alone
    in_place = ((0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (2, "fp16"), (3, "bf16"))
    on_host = ((1, "bf16"), (2, "fp32"), (3, "bf16"))
    by_muon = ((0, "fp32", False), (1, "bf16", False), (2, "fp32", True), (2, "fp16", False), (3, "bf16", True))
    cases = [(*c, False, {}) for c in in_place] + [(*c, True, {}) for c in on_host]
    for stage, precision, offloaded, changes in cases + [(*c, {"optimizer": MUON}) for c in by_muon]:
        name = f"{stage}-{precision}{'-offloaded' if offloaded else ''}{'-muon' if changes else ''}"
        unbroken, loader = make(ranks, corpus, stage, precision, 4, dropout=0.1, offloaded=offloaded, **changes)
        rows = train(unbroken, loader, 0, 2)
        state = TrainState({"case": name}, global_step=2, loss_scaler=unbroken.loss_scaler_state)
        theirs = deepspeed_checkpoint.save(unbroken, state, folder / f"{name}-deepspeed", keep_last=2)
        with CheckpointWriter(unbroken, corpus.folder / "tokenizer", folder / name, Retention(2)) as writer:
            path = writer.save(state)
            rows += train(unbroken, loader, 2, end)
        findings[name] = {"unbroken": [row["loss"] for row in rows[2:]]}
        for layout in ("portable", "deepspeed"):
            resumed, loader = make(ranks, corpus, stage, precision, 4, dropout=0.1, offloaded=offloaded, **changes)
            if layout == "portable":
                checkpoint.verify(path)
                assert checkpoint.load(resumed, path) == state
            else:
                assert deepspeed_checkpoint.read_state(theirs, ranks.world_size, stage, precision) == state
                deepspeed_checkpoint.load(resumed, theirs, state)
            again = train(resumed, loader, 2, end)
            difference = max(
                float((a - b).abs().max())
                for p, q in zip(unbroken.module.parameters(), resumed.module.parameters(), strict=True)
                for a, b in zip(unbroken.full_tensors(p).values(), resumed.full_tensors(q).values(), strict=True)
            )
            findings[name][layout] = {
                "losses": [row["loss"] for row in again],
                "largest_difference": difference,
                "loss_scaler": [unbroken.loss_scaler_state, resumed.loss_scaler_state],
            }
    if ranks.is_main:
        (folder / f"resume-{ranks.world_size}.json").write_text(json.dumps(findings))


def elastic(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Go on from the checkpoint that ZeRO-2 in fp32 on other processes wrote, at each stage; dropout off.

    The first call (with no checkpoint there) writes it and also tells how the unbroken run goes on.
    """
    path = folder / "elastic" / "global_step2"
    findings = {}
    if not path.exists():
        engine, loader = make(ranks, corpus, 2, "fp32", 4)
        train(engine, loader, 0, 2)
        save(engine, corpus, path.parent, TrainState({}, global_step=2))
        findings["unbroken"] = train(engine, loader, 2, 4)
    for stage in (0, 1, 2, 3):
        engine, loader = make(ranks, corpus, stage, "fp32", 3)
        checkpoint.load(engine, path)
        findings[f"stage {stage}"] = train(engine, loader, 2, 4)
    if ranks.is_main:
        (folder / f"elastic-{ranks.world_size}.json").write_text(json.dumps(findings))


def overflow(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """fp16 with a loss scale that overflows: the step is skipped, the scale halves, the next steps train."""
    engine, loader = make(ranks, corpus, 2, "fp16", 4)
    engine.loss_scaler_state = {"cur_scale": 2.0**40, "cur_hysteresis": 1}
    before = parameters(engine)
    rows = train(engine, loader, 0, 1)
    after = parameters(engine)
    scales = [engine.loss_scaler_state["cur_scale"]]
    if ranks.is_main:
        unchanged = all(np.array_equal(before[name], after[name]) for name in before)
        content = {"skipped": rows[0]["skipped"], "unchanged": unchanged, "scales": scales}
        (folder / "overflow.json").write_text(json.dumps(content))


def overflow_at_the_floor(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """One weight makes fp16 overflow at any loss scale: what the steps say at each stage, with a scale to lose or not.

    The bias of the vocabulary is no input of a product, so that its gradient alone is infinite.
    """
    messages = {}
    for stage in (1, 2, 3):
        for name, section in (("dynamic", {"initial_scale_power": 1, "hysteresis": 1}), ("fixed", {"loss_scale": 2})):
            engine, loader = make(ranks, corpus, stage, "fp16", 4, fp16={"enabled": True, **section})
            bias = dict(engine.module.named_parameters())["lm_head.bias"]
            if ranks.rank == ranks.world_size - 1:
                bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
            skipped = []
            try:
                for step in range(3):
                    skipped += [row["skipped"] for row in train(engine, loader, step, step + 1)]
            except UserError as error:
                messages[f"{stage}-{name}"] = [skipped, str(error)]
    everyones = ranks.gather(messages)
    if ranks.is_main:
        assert all(found == messages for found in everyones)
        (folder / "overflow_at_the_floor.json").write_text(json.dumps(messages))


class OutOfMemoryInBackward(MaskedLM):
    """Runs out of memory in the backward pass of more than `largest` sequences."""

    largest = 0

    def forward(self, batch):
        sums = super().forward(batch)
        if len(batch.input_ids) > self.largest:
            sums["loss"].register_hook(self._fail)
        return sums

    @staticmethod
    def _fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def trials(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Three steps after trials that ran out of memory, at another size on each rank, against three steps without."""
    OutOfMemoryInBackward.largest = 3 + 2 * ranks.rank
    findings = {}
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "fp16"), (3, "bf16")):
        finals = []
        for tried in (False, True):
            engine, loader = make(ranks, corpus, stage, precision, 4, dropout=0.1)
            rows = train(engine, loader, 0, 1)
            if tried:
                trial = Trial(engine, lambda: OutOfMemoryInBackward(small_model(corpus, 0.1)), LENGTH, MaskingConfig())
                size = largest_size(engine, trial, limit=8)
            rows += train(engine, loader, 1, 3)
            finals.append((rows, {name: value.tobytes() for name, value in parameters(engine).items()}))
        findings[f"{stage}-{precision}"] = {"size": size, "equal": finals[0] == finals[1]}
    if ranks.is_main:
        (folder / "trials.json").write_text(json.dumps(findings))


def recomputation(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Three steps, dropout on, with activations kept and recomputed: losses, norms and a hash of the parameters."""
    findings = {}
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp16"), (3, "fp32"), (3, "bf16")):
        rows = []
        for layers in (0, 1):
            engine, loader = make(ranks, corpus, stage, precision, 4, dropout=0.1)
            engine.module.roberta.encoder.recomputed_layers = layers
            steps = [(row["loss"], row["grad_norm"]) for row in train(engine, loader, 0, 3)]
            content = b"".join(value.tobytes() for value in parameters(engine).values())
            rows.append([*steps, hashlib.sha256(content).hexdigest()])
        findings[f"{stage}-{precision}"] = rows
    (folder / "recomputation.json").write_text(json.dumps(findings))


def accumulation(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Errors against fp32 of the gradient of 256 sequences: in bf16 as 256 micro-steps and as 2; in fp16 as 2, also as
    if they were part of a batch a million times as large.
    """
    gradients = {}
    cases = (("fp32", 128, 1), ("bf16", 128, 1), ("bf16", 1, 1), ("fp16", 128, 1), ("fp16", 128, 2**20))
    for precision, micro_batch_size, more_masked in cases:
        engine, loader = make(ranks, corpus, 2, precision, micro_batch_size, train_batch_size=256)
        train(engine, loader, 0, 1, more_masked)
        moments = [engine.full_tensors(parameter)["exp_avg"].flatten() for parameter in engine.module.parameters()]
        name = f"{precision}-{micro_batch_size}" + ("" if more_masked == 1 else "-large")
        gradients[name] = torch.cat(moments) * more_masked
    exact = gradients.pop("fp32-128")
    errors = {name: float((gradient - exact).norm() / exact.norm()) for name, gradient in gradients.items()}
    (folder / "accumulation.json").write_text(json.dumps(errors))


def compilation(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Three steps without compilation, with compiled layers and with a compiled model, dropout off; then twice with a
    compiled model, dropout on: their losses.
    """
    findings = {}
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16"), (1, "fp16"), (2, "fp16")):
        name, rows = f"{stage}-{precision}", []
        for compiled, dropout in (("", 0.0), ("layers", 0.0), ("model", 0.0), ("model", 0.1), ("model", 0.1)):
            engine, loader = make(ranks, corpus, stage, precision, 4, dropout)
            if compiled == "layers":
                compile_layers(engine.module.roberta.encoder)
            elif compiled:
                compile_model(engine.module)
            rows.append([row["loss"] for row in train(engine, loader, 0, 3)])
        findings[name] = dict(zip(("eager", "layers", "model", "dropout", "dropout_again"), rows, strict=True))
    (folder / "compilation.json").write_text(json.dumps(findings))


def micro_batch(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """The "auto" micro-batch of base at 512 tokens: its size, and the peak memory of a step of that size."""
    config = DeepSpeedConfig.read(REPOSITORY / "ds_configs/zero2.json")
    base = model_config("base", corpus.manifest.tokenizer.vocab_size, 512)
    engine = Engine(MaskedLM(base), config.resolved("bf16", on_gpu()), ranks, SEED)
    free, _ = torch.cuda.mem_get_info(engine.device)
    free += torch.cuda.memory_reserved(engine.device)
    trial = Trial(engine, lambda: MaskedLM(base), 512, MaskingConfig())
    started = time.perf_counter()
    size = largest_size(engine, trial, limit=8192)
    seconds = time.perf_counter() - started
    del trial
    torch.cuda.reset_peak_memory_stats(engine.device)
    for _ in range(2):
        engine.rehearse(full_micro_batch(size, 512, MaskingConfig()))
    peak = torch.cuda.max_memory_allocated(engine.device)
    (folder / "micro_batch.json").write_text(json.dumps({"size": size, "peak": peak, "free": free, "seconds": seconds}))


if __name__ == "__main__":
    set_up_logging()
    cases, corpus_folder, output = sys.argv[1:]
    all_ranks = init_distributed()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    if not on_gpu():
        get_accelerator().is_fp16_supported = lambda: True  # lets a CPU run dynamic loss scaling
    for case in cases.split(","):
        globals()[case](all_ranks, Corpus.open(corpus_folder), Path(output))
    leave(0)
