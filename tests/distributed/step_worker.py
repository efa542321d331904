"""What runs inside the processes of `test_steps.py`: what DeepSpeed does at the edges of a step."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from deepspeed.accelerator import get_accelerator
from reductions import Reductions
from worker import make, parameters, train

from ds_roberta.data.loader import Counts
from ds_roberta.data.shards import Corpus
from ds_roberta.distributed import Ranks
from ds_roberta.process import leave, set_up_logging
from ds_roberta.training import engine as engine_module
from ds_roberta.training.device import init_distributed

WINDOW = 4
OF_TWO = {
    **dict.fromkeys(("allgather_partitions", "reduce_scatter", "use_multi_rank_bucket_allreduce"), False),
    **dict.fromkeys(("overlap_comm", "enable_sanity_checks"), True),
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), 1000),
}
OF_THREE = {
    **dict.fromkeys(("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "overlap_comm"), True),
    **dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0),
    **dict.fromkeys(("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"), 0),
    **{"reduce_scatter": False, "reduce_bucket_size": 1000, "sub_group_size": 5000},
}


def growth(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """A step after which fp16's loss scale grows, and the same step after which it does not."""
    findings = {}
    for stage in (1, 2, 3):
        steps = []
        for clean_steps in (0, WINDOW):
            fp16 = {"enabled": True, "loss_scale_window": WINDOW}
            engine, loader = make(ranks, corpus, stage, "fp16", 4, fp16=fp16)
            engine.loss_scaler_state = {"cur_scale": 2.0**8, "cur_iter": clean_steps, "last_overflow_iter": -1}
            (row,) = train(engine, loader, 0, 1)
            steps.append((row, parameters(engine), engine.loss_scaler_state["cur_scale"]))
        (row, weights, scale), (row_grown, weights_grown, scale_grown) = steps
        findings[stage] = {
            "scales": [scale, scale_grown],
            "rows": [row, row_grown],
            "same_weights": all(np.array_equal(weights[name], weights_grown[name]) for name in weights),
        }
    if ranks.is_main:
        (folder / "growth.json").write_text(json.dumps(findings))


def layouts(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Two steps as ZeRO divides and sends tensors by default, and as it does with all its other settings changed."""
    findings = {}
    for stage, changes in ((1, OF_TWO), (2, OF_TWO), (3, OF_THREE)):
        ends = []
        for zero in ({}, changes):
            engine, loader = make(ranks, corpus, stage, "fp32", 4, zero_optimization={"stage": stage, **zero})
            ends.append((train(engine, loader, 0, 2), parameters(engine)))
        (rows, weights), (changed_rows, changed_weights) = ends
        same = all(np.array_equal(weights[name], changed_weights[name]) for name in weights)
        findings[stage] = [row["loss"] for row in rows], [row["loss"] for row in changed_rows], same
    if ranks.is_main:
        (folder / "layouts.json").write_text(json.dumps(findings))


def failure(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """A failure between two micro-steps: the gradients that are reduced while it leaves the step."""
    reduced = {}
    for stage, precision in ((1, "fp16"), (2, "fp32"), (3, "bf16")):
        engine, loader = make(ranks, corpus, stage, precision, 4)
        micro_batches = loader.micro_batches(0)
        counts = Counts.total([batch.counts for batch in micro_batches], ranks)
        with Reductions() as reductions, contextlib.suppress(ArithmeticError), engine.accumulation():
            engine.forward_backward(micro_batches[0], counts, 0, 0, last=False)
            raise ArithmeticError
        reduced[f"{stage}-{precision}"] = reductions.elements
    if ranks.is_main:
        (folder / "failure.json").write_text(json.dumps(reduced))


def buckets(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """The bytes that DeepSpeed's buckets should take during a step, and those that they take."""
    findings = {}
    for offloaded in (False, True):
        engine, loader = make(ranks, corpus, 1, "bf16", 4, offloaded=offloaded)
        wrapper = engine.deepspeed.optimizer
        micro_batches = loader.micro_batches(0)
        counts = Counts.total([batch.counts for batch in micro_batches], ranks)
        with engine.accumulation():
            engine.forward_backward(micro_batches[0], counts, 0, 0, last=False)
        found = getattr(wrapper, "ipg_buckets", {}).values()
        taken = sum(buffer.nbytes for bucket in found for buffer in bucket.buffer)
        findings["offloaded" if offloaded else "on the device"] = [engine.bucket_bytes, taken]
    if ranks.is_main:
        (folder / "buckets.json").write_text(json.dumps(findings))


def devices(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """The precision that Muon's directions are exchanged in if only one process's device is fast in bf16, or both."""
    own, found = engine_module.fastest_precision, []
    for fast in ((0,), (0, 1)):
        engine_module.fastest_precision = lambda fast=fast: "bf16" if ranks.rank in fast else "fp32"
        found.append(ranks.gather(str(engine_module._fastest_dtype(ranks))))
    engine_module.fastest_precision = own
    if ranks.is_main:
        (folder / "devices.json").write_text(json.dumps(found))


if __name__ == "__main__":
    set_up_logging()
    cases, corpus_folder, output = sys.argv[1:]
    all_ranks = init_distributed()
    get_accelerator().is_fp16_supported = lambda: True
    for case in cases.split(","):
        globals()[case](all_ranks, Corpus.open(corpus_folder), Path(output))
    leave(0)
