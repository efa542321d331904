"""What runs inside the processes of `test_pairs_training.py`: training on pairs, with next sentence prediction."""

import json
import sys
from pathlib import Path

import numpy as np
from worker import LENGTH, digests, make, parameters, save

from ds_roberta.config import PackingConfig
from ds_roberta.data.loader import TrainLoader
from ds_roberta.data.packing import build_index
from ds_roberta.data.shards import Corpus
from ds_roberta.distributed import Ranks, leave, set_up_logging
from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.device import init_distributed
from ds_roberta.training.engine import Engine

PACKING = PackingConfig(LENGTH, "segment-pair")


def train(engine: Engine, loader: TrainLoader, first: int, last: int) -> list[dict]:
    """Steps `first` … `last - 1` as the trainer takes them: the means of both losses, accuracy, and the data."""
    rows = []
    for step in range(first, last):
        micro_batches = loader.micro_batches(step)
        masked, sequences = engine.ranks.sum(
            sum(len(batch.labels) for batch in micro_batches), sum(batch.sequences for batch in micro_batches)
        )
        sums = np.zeros(3)
        with engine.accumulation():
            for number, batch in enumerate(micro_batches):
                last_one = number == len(micro_batches) - 1
                sums += engine.forward_backward(batch, masked, step, number, last_one, masked / sequences).numpy()
        result = engine.step(1e-3)
        masked_lm, next_sentence, correct = engine.ranks.sum(*sums.tolist())
        rows.append(
            {
                "losses": [masked_lm / masked, next_sentence / sequences, correct / sequences],
                "grad_norm": result.grad_norm,
                "data": sorted(digest for own in engine.ranks.gather(digests(micro_batches)) for digest in own),
            }
        )
    return rows


def pairs(ranks: Ranks, corpus: Corpus, folder: Path) -> None:
    """Four steps at ZeRO stages and precisions, and the last two of them again from a checkpoint."""
    ranks.on_main(lambda: build_index(corpus, "train", PACKING))
    findings = {}
    for stage, precision in ((0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")):
        name = f"{stage}-{precision}"
        engine, loader = make(ranks, corpus, stage, precision, 4, packing=PACKING)
        rows = train(engine, loader, 0, 2)
        path = save(engine, corpus, folder / f"{name}-{ranks.world_size}", TrainState({}, global_step=2))
        rows += train(engine, loader, 2, 4)
        resumed, loader = make(ranks, corpus, stage, precision, 4, packing=PACKING)
        checkpoint.load(resumed, path)
        again = train(resumed, loader, 2, 4)
        ends = [parameters(each) for each in (engine, resumed)]
        same = all(np.array_equal(ends[0][key], ends[1][key]) for key in ends[0])
        heads = [key for key in ends[0] if key.startswith("next_sentence_head")]
        findings[name] = {"rows": rows, "resumed": again, "same_end": same, "heads": heads}
    if ranks.is_main:
        (folder / f"pairs-{ranks.world_size}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    set_up_logging()
    _, corpus_folder, output = sys.argv[1:]
    pairs(init_distributed(), Corpus.open(corpus_folder), Path(output))
    leave(0)
