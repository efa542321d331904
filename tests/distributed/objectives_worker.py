"""What runs inside the processes of `test_objectives_training.py`: training by other objectives than the default."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from worker import LENGTH, digests, make, parameters, save

from ds_roberta.config import PackingConfig
from ds_roberta.data.loader import Counts, TrainLoader
from ds_roberta.data.packing import build_index
from ds_roberta.data.shards import Corpus
from ds_roberta.distributed import Ranks
from ds_roberta.process import leave, set_up_logging
from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.device import init_distributed
from ds_roberta.training.engine import Engine

PAIRS = PackingConfig(LENGTH, "segment-pair")
OBJECTIVES = {"pairs": {"packing": PAIRS}, "mlm-bow": {"objective": "mlm-bow"}, "rts": {"objective": "rts"}}


def train(engine: Engine, loader: TrainLoader, first: int, last: int) -> list[dict]:
    """Take steps `first` … `last - 1` as the trainer does; return the sums, metrics, gradient norm and data."""
    rows = []
    for step in range(first, last):
        micro_batches = loader.level(step, loader.micro_batches(step), engine.ranks)
        counts = Counts.total([batch.counts for batch in micro_batches], engine.ranks)
        sums = Counter()
        with engine.accumulation():
            for number, batch in enumerate(micro_batches):
                sums.update(engine.forward_backward(batch, counts, step, number, number == len(micro_batches) - 1))
        result = engine.step(1e-3)
        all_sums = engine.ranks.sum_each(sums)
        rows.append(
            {
                "sums": all_sums,
                "metrics": engine.module.metrics(all_sums, counts),
                "grad_norm": result.grad_norm,
                "data": sorted(digest for own in engine.ranks.gather(digests(micro_batches)) for digest in own),
            }
        )
    return rows


def objective(name: str, ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Take three steps at each ZeRO stage and precision, and the last of them again from a checkpoint."""
    findings = {}
    for stage, precision in ((0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")):
        case = f"{stage}-{precision}"
        engine, loader = make(ranks, corpus, stage, precision, 4, **OBJECTIVES[name])
        rows = train(engine, loader, 0, 2)
        path = save(engine, corpus, folder / f"{name}-{case}-{ranks.world_size}", TrainState({}, global_step=2))
        rows += train(engine, loader, 2, 3)
        resumed, loader = make(ranks, corpus, stage, precision, 4, **OBJECTIVES[name])
        checkpoint.load(resumed, path)
        again = train(resumed, loader, 2, 3)
        ends = [parameters(each) for each in (engine, resumed)]
        same = all(np.array_equal(ends[0][key], ends[1][key]) for key in ends[0])
        findings[case] = {"rows": rows, "resumed": again, "same_end": same, "parameters": list(ends[0])}
    if ranks.is_main:
        (folder / f"{name}-{ranks.world_size}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    set_up_logging()
    names, corpus_folder, output = sys.argv[1:]
    all_ranks, opened = init_distributed(), Corpus.open(corpus_folder)
    all_ranks.on_main(lambda: build_index(opened, "train", PAIRS))
    for name in names.split(","):
        objective(name, all_ranks, opened, Path(output))
    leave(0)
