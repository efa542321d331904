"""Muon in the processes of the distributed tests: `muon_worker.py CASES CORPUS FOLDER`, started by `run_group`."""

import json
import sys
from pathlib import Path

import torch
from worker import MUON, SEED, make, parameters, save, small_model, train

from ds_roberta.data.loader import TrainLoader
from ds_roberta.data.shards import Corpus
from ds_roberta.distributed import Ranks
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.model.weights import POSITION_EMBEDDINGS
from ds_roberta.process import leave, set_up_logging
from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.device import get_accelerator, init_distributed, on_gpu
from ds_roberta.training.muon import Muon, muon_groups
from ds_roberta.training.optimizer import parameter_groups

FP32 = [(stage, "fp32", "") for stage in (0, 1, 2, 3)]
LOW = [
    *((stage, "bf16", "") for stage in (1, 2, 3)),
    (2, "fp16", ""),
    *((stage, "fp32", "-rounded") for stage in (1, 3)),
]
DTYPES = {"": torch.float32, "-rounded": torch.bfloat16}


def muon(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Three steps at every ZeRO stage and precision; in fp32 the last two also from another engine's checkpoint.

    `-rounded` orthogonalizes in bf16, as devices do that are fast in it.
    """
    findings = {}
    path = ranks.broadcast(folder / "muon" / "global_step1")  # two processes write it, at stage 0
    for stage, precision, rounded in FP32 + (LOW if on_gpu() or ranks.world_size > 1 else []):
        engine, loader = make(ranks, corpus, stage, precision, 4, is_grouped=True, optimizer=MUON)
        engine.optimizer._dtype = DTYPES[rounded]  # as on any device
        rows = train(engine, loader, 0, 1)
        if not ranks.broadcast(path.exists()):
            save(engine, corpus, path.parent, TrainState({}, global_step=1))
        rows += train(engine, loader, 1, 3)
        found = {key: [row[key] for row in rows] for key in ("loss", "grad_norm", "reduced")}
        final = parameters(engine)
        found["from_torch"] = max(float(abs(final[n] - p).max()) for n, p in plain(ranks, corpus, loader).items())
        if precision == "fp32" and not rounded:
            checkpoint.load(engine, path)
            found["elastic"] = [row["loss"] for row in train(engine, loader, 1, 3)]
        findings[f"{stage}-{precision}{rounded}"] = found
    if ranks.is_main:
        (folder / f"muon-{ranks.world_size}.json").write_text(json.dumps(findings))


PLAIN = {}


def plain(ranks: Ranks, corpus: Corpus, loader: TrainLoader) -> dict:
    """Weights after three fp32 steps of the optimizer alone, on whole tensors, without DeepSpeed."""
    if not PLAIN:
        device = torch.device(get_accelerator().current_device_name())
        torch.manual_seed(SEED)
        model = MaskedLM(small_model(corpus, 0.0)).to(device)
        positions = model.get_parameter(POSITION_EMBEDDINGS)
        at_first = positions.detach().clone()
        groups = muon_groups(model, parameter_groups(model, True, {positions}), MUON["params"])
        optimizer = Muon(groups, ranks, device, torch.float32)
        for step in range(3):
            micro_batches = loader.micro_batches(step)
            (masked,) = ranks.sum(sum(len(batch.labels) for batch in micro_batches))
            for batch in micro_batches:
                (model(batch.to(device))["loss"] / masked).backward()
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
            for group in optimizer.param_groups:
                rate = MUON["params"]["muon_lr"] if "momentum" in group else 1e-3
                group["lr"] = rate * group.get("lr_ratio", 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(positions, at_first)
        PLAIN.update({name: parameter.detach().cpu().numpy() for name, parameter in model.named_parameters()})
    return PLAIN


if __name__ == "__main__":
    set_up_logging()
    _, corpus_folder, output = sys.argv[1:]
    all_ranks = init_distributed()
    if not on_gpu():
        get_accelerator().is_fp16_supported = lambda: True  # lets a CPU run dynamic loss scaling
    muon(all_ranks, Corpus.open(corpus_folder), Path(output))
    leave(0)
