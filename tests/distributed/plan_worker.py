"""Count what an engine of each ZeRO stage holds and sends: `plan_worker.py - CORPUS FOLDER`."""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worker import SEED

from ds_roberta.config import MaskingConfig, ModelConfig
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.process import leave
from ds_roberta.training.device import init_distributed
from ds_roberta.training.engine import Engine
from ds_roberta.training.micro_batch import full_micro_batch

CONFIGS = Path(__file__).parents[2] / "ds_configs"
MODEL = ModelConfig(2_000, 2, 256, 2, 66)  # its weight matrices are above and below what stage 3 divides
MICRO_STEPS = 2


class Traffic(TorchDispatchMode):
    """Counts the elements of large collective operations by name and type."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d."):
            tensors = [[leaf for leaf in tree_leaves(each) if torch.is_tensor(leaf)] for each in args]
            dtype = next(found[0].dtype for found in tensors if found)
            self.elements[f"{function} {dtype}"] += max(sum(leaf.numel() for leaf in found) for found in tensors)
        return function(*args, **(kwargs or {}))


def fp32_bytes() -> int:
    """Return the bytes of all live fp32 tensors, counting each storage once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (each, each.grad if each.is_leaf else None, getattr(each, "grad_accum", None)):
                if tensor is not None and tensor.dtype == torch.float32:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of the working weights between micro-steps, counting each storage once."""
    tensors = [t for p in engine.module.parameters() for t in (p.data, getattr(p, "ds_tensor", None)) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def count(ranks: Ranks, stage: int) -> tuple[dict, Engine]:
    before = fp32_bytes()
    torch.manual_seed(SEED)
    config = DeepSpeedConfig.read(CONFIGS / f"zero{stage}.json")
    engine = Engine(MaskedLM(MODEL), config.resolved("bf16", False), ranks, SEED)
    batch = full_micro_batch(1, 64, MaskingConfig())
    with Traffic() as traffic:
        with engine.accumulation():
            for micro_step in range(MICRO_STEPS):
                engine.forward_backward(batch, batch.counts, 0, micro_step, micro_step == MICRO_STEPS - 1)
                if micro_step == 0:
                    held = {"weights": weight_bytes(engine), "fp32": fp32_bytes() - before}
        engine.step(1e-4)
    return {**held, "sent": dict(traffic.elements)}, engine


if __name__ == "__main__":
    all_ranks = init_distributed()
    # Engines stay alive: DeepSpeed's are freed at some later time, which would be counted.
    counted = {stage: count(all_ranks, stage) for stage in (1, 2, 3)}
    findings = {stage: found for stage, (found, _) in counted.items()}
    if all_ranks.is_main:
        (Path(sys.argv[3]) / f"plan-{all_ranks.world_size}.json").write_text(json.dumps(findings))
    leave(0)
