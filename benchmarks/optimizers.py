"""CPU time of the update alone: Muon beside torch's fused AdamW, on one process, whatever the batch.

    python -m benchmarks.optimizers

Writes a Markdown table with the hardware, the versions and the commit.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from ds_roberta.config import PRESETS, model_config
from ds_roberta.distributed import Ranks
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.device import fastest_precision, init_distributed
from ds_roberta.training.muon import Muon, muon_groups

SIZES = ("nano", "tiny", "small", "base")
VOCAB_SIZE, UPDATES = 8_192, 2
WEIGHT_DECAY = 0.01


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """Return the CPU time of an update, after one that makes the states."""
    optimizer.step()
    began = time.process_time()
    for _ in range(UPDATES):
        optimizer.step()
    return (time.process_time() - began) / UPDATES


def row(size: str, ranks: Ranks, dtype: torch.dtype) -> str:
    model = MaskedLM(model_config(size, VOCAB_SIZE, PRESETS[size].max_seq_length))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam = seconds(torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True))
    muon = seconds(Muon(muon_groups(model, None, {"weight_decay": WEIGHT_DECAY}), ranks, torch.device("cpu"), dtype))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"| {size} | {millions:.1f}M | {adam:.3f} | {muon:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/optimizers.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = init_distributed()
    dtype = torch.bfloat16 if fastest_precision() == "bf16" else torch.float32
    lines = [
        "# An update by Muon and by AdamW",
        "",
        "`python -m benchmarks.optimizers`: CPU-seconds of one update of fp32 weights, whatever the batch; "
        f"{VOCAB_SIZE:,} ids; Newton-Schulz in {str(dtype).removeprefix('torch.')}.",
        "",
        "| model | parameters | AdamW | Muon |",
        "|---|---|---|---|",
        *(row(size, ranks, dtype) for size in SIZES),
        "",
        f"{cpu_model()}, one thread. {versions('torch')}",
    ]
    publish(lines, options.output)


if __name__ == "__main__":
    main()
