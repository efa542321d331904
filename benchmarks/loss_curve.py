"""Compare the loss of our own kernels with that of torch's plain operations, on the same weights, data, masks and
steps.

    python -m benchmarks.loss_curve

Without dropout the two differ only in rounding. With it they draw different masks: torch's operations with another
dropout seed show how large a difference that alone makes. Writes a Markdown table with the hardware, the versions and
the commit.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.environment import REPOSITORY, cpu_model, publish, versions
from benchmarks.loader import example_corpus
from ds_roberta.config import MaskingConfig, PackingConfig, ScheduleConfig, Stage, model_config
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.masking import training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import TRAIN_SPLIT, Corpus
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks, leave
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.device import choose_precision, init_distributed, on_gpu
from ds_roberta.training.engine import Engine
from ds_roberta.training.micro_batch import BatchPlan
from ds_roberta.training.optimizer import learning_rate

LENGTH, SEQUENCES = 128, 8
PEAK, WARMUP_SHARE, DROPOUT = 1e-3, 0.1, 0.1
ROWS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/loss_curve.md")
    arguments = parser.parse_args()
    ranks = init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.open(example_corpus(Path(folder)))
        own = [losses(corpus, ranks, arguments.steps, dropout) for dropout in (0.0, DROPOUT)]
        with plain_operations():
            plain = [losses(corpus, ranks, arguments.steps, dropout) for dropout in (0.0, DROPOUT)]
            plain.append(losses(corpus, ranks, arguments.steps, DROPOUT, dropout_seed=1))
    publish(lines(own, plain), arguments.output)


def plain_operations() -> ExitStack:
    """Use torch's attention, dropout and cross-entropy in place of this project's."""

    def linear_cross_entropy(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")

    stack = ExitStack()
    for name, function in (
        ("encoder.attention", F.scaled_dot_product_attention),
        ("kernels.Dropout.forward", torch.nn.Dropout.forward),
        ("objectives.linear_cross_entropy", linear_cross_entropy),
    ):
        stack.enter_context(mock.patch(f"ds_roberta.model.{name}", function))
    return stack


def settings() -> DeepSpeedConfig:
    return DeepSpeedConfig.read(REPOSITORY / "ds_configs/zero1.json", SEQUENCES, PEAK)


def losses(corpus: Corpus, ranks: Ranks, steps: int, dropout: float, dropout_seed: int = 0) -> list[float]:
    """Return the loss of each step, in nats per masked token."""
    tokenizer = corpus.manifest.tokenizer
    packing = PackingConfig(LENGTH)
    build_index(corpus, TRAIN_SPLIT, packing)
    packed = open_index(corpus, TRAIN_SPLIT, packing)
    collator = Collator(packed, training_masker(MaskingConfig(), tokenizer, 0), tokenizer, LENGTH)
    loader = TrainLoader([LoaderStage(Stage(0, LENGTH, SEQUENCES), collator, SampleOrder(len(packed), 0), SEQUENCES)])
    torch.manual_seed(0)
    probabilities = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = MaskedLM(model_config("tiny", tokenizer.vocab_size, LENGTH, **probabilities))
    engine = Engine(model, settings().resolved(choose_precision(settings()), on_gpu()), ranks, dropout_seed)
    engine.set_batch(BatchPlan(SEQUENCES, SEQUENCES, ranks.world_size))
    schedule = ScheduleConfig(steps, int(steps * WARMUP_SHARE))
    curve = []
    for step, (batch,) in enumerate(loader.steps(0, steps)):
        with engine.accumulation():
            sums = engine.forward_backward(batch, batch.counts, step, 0, last=True)
        engine.step(learning_rate(schedule, PEAK, step + 1))
        curve.append(sums["loss"].item() / len(batch.labels))
    return curve


def lines(own: list[list[float]], plain: list[list[float]]) -> Iterator[str]:
    """Yield the lines of the report.

    Args:
        own: the curves of our kernels, without dropout and with it.
        plain: the same curves of torch's operations, and one with another dropout seed.
    """
    yield "# Loss: our own kernels and torch's operations"
    yield ""
    yield "| steps | own, no dropout | torch's | difference | own, dropout | torch's | torch's, another seed |"
    yield "|---|---|---|---|---|---|---|"
    size = len(own[0]) // ROWS
    for first in range(0, size * ROWS, size):
        means = [statistics.mean(curve[first : first + size]) for curve in (own[0], plain[0], own[1], *plain[1:])]
        without, with_dropout = means[:2], " | ".join(f"{mean:.4f}" for mean in means[2:])
        yield (
            f"| {first + 1} to {first + size} | {without[0]:.4f} | {without[1]:.4f} | {without[0] - without[1]:+.4f} "
            f"| {with_dropout} |"
        )
    yield ""
    yield (
        f"Mean losses in nats. tiny at {LENGTH} tokens, {SEQUENCES} sequences a step of the corpus in examples/, "
        f"{choose_precision(settings())}, peak learning rate {PEAK:g}, dropout {DROPOUT}; the same weights, order and "
        "masks."
    )
    yield ""
    yield f"{cpu_model()}. {versions('torch', 'deepspeed')}"


if __name__ == "__main__":
    main()
    leave(0)
