"""A run's sequences: training orders for each length, the held-out sequences, and how both are masked and batched."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ds_roberta.config import PackingConfig
from ds_roberta.data.count_models import NEIGHBOUR_LOSS, UNIGRAM_LOSS, CountModel
from ds_roberta.data.loader import Collator, HeldOutSample, LoaderStage, TrainLoader
from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT
from ds_roberta.data.masking import Masker, evaluation_masker, training_masker
from ds_roberta.data.mixture import MixedOrder, sample_order
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import PackedSplit, build_index, open_index
from ds_roberta.data.stages import places_used
from ds_roberta.data.words import share_without_spaces, word_flags
from ds_roberta.errors import UserError
from ds_roberta.model.objectives import Objective
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.micro_batch import BatchPlan
from ds_roberta.training.schedules import mlm_probability
from ds_roberta.training.settings import WITHIN_DOCUMENTS, Run, RunConfig

_SAMPLE_SEQUENCES = 256
_LARGEST_FLASH_HEAD, _FLASH_CAPABILITY = 256, (8, 0)


@dataclass(frozen=True)
class RunData:
    """The sequences of a run.

    Attributes:
        train: the training sequences by length.
        orders: their orders by length.
        held_out: None if the data has no validation split.
    """

    train: dict[int, PackedSplit]
    orders: dict[int, SampleOrder]
    held_out: PackedSplit | None


def open_data(run: Run) -> RunData:
    """Open the sequences of a run. Rank 0 writes their indices if there are none, and so does the first process of each
    other host that has its own copy of the data.
    """
    config, ranks = run.config, run.ranks

    def packed(split: str, packing: PackingConfig) -> PackedSplit:
        def build() -> None:
            build_index(run.corpus, split, packing)

        ranks.on_main(build)
        ranks.together(build if ranks.local_rank == 0 else lambda: None)
        return ranks.together(lambda: open_index(run.corpus, split, packing))

    lengths = sorted({stage.max_seq_length for stage in config.stages})
    train = {length: packed(TRAIN_SPLIT, replace(config.packing, max_seq_length=length)) for length in lengths}
    held_out = None
    if run.corpus.manifest.splits.get(VALIDATION_SPLIT):
        held_out = packed(VALIDATION_SPLIT, config.packing)
    else:
        ranks.log("no held-out documents: no evaluation (preprocess shard --validation_fraction makes some)")
    orders = {length: sample_order(packed, config.source_weights, config.seed) for length, packed in train.items()}
    return RunData(train, orders, held_out)


def log_sources(run: Run, data: RunData) -> None:
    """Log how much of each source the run trains on, if they have weights."""
    for length, order in data.orders.items():
        if isinstance(order, MixedOrder):
            places = places_used(run.config.stages, length, run.config.schedule.max_steps)
            run.ranks.log(f"sources of {length} tokens over the run: {order.summary(places)}")


def resolve_padding_free(config: RunConfig, compiled: bool, on_gpu: bool, precision: str) -> bool:
    """Whether a run computes no padding: "auto" does on a CPU unless the encoder is compiled.

    Raises:
        UserError: it is "on", or the attention needs it, but it is not possible.
    """
    obstacle = None
    head_size = config.model.hidden_size // config.model.num_attention_heads
    if not on_gpu and compiled:
        obstacle = "on a CPU, compiled layers need shapes that do not change: give --torch_compile off"
    elif on_gpu and precision == "fp32":
        obstacle = "flash attention is in bf16 or fp16 only, and this run is in fp32: choose another precision"
    elif on_gpu and (head_size % 8 or head_size > _LARGEST_FLASH_HEAD):
        obstacle = f"flash attention needs heads of a multiple of 8, up to {_LARGEST_FLASH_HEAD}, not of {head_size}"
    elif on_gpu and (capability := torch.cuda.get_device_capability()) < _FLASH_CAPABILITY:
        obstacle = "flash attention needs a GPU of compute capability 8.0, this one has {}.{}".format(*capability)
    if obstacle and config.padding_free == "on":
        raise UserError(f"--padding_free on cannot work: {obstacle}, or leave it out")
    padding_free = config.padding_free == "on" or (config.padding_free == "auto" and not on_gpu and not obstacle)
    if config.attention == WITHIN_DOCUMENTS and not padding_free:
        raise UserError(
            f"--attention {config.attention} cannot work with padding: {obstacle or 'give --padding_free on'}, or use "
            "--packing doc-sentences"
        )
    return padding_free


def make_loaders(
    run: Run, data: RunData, plans: list[BatchPlan], kind: type[Masker], on_gpu: bool
) -> tuple[TrainLoader, HeldOutSample | None]:
    """The batches to train on, and the held-out sample, masked by the objective's `kind` of masker."""
    config, ranks, tokenizer = run.config, run.ranks, run.corpus.manifest.tokenizer
    words = None
    if config.masking.unit != "token":
        words = word_flags(run.corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
        ranks.on_main(lambda: _log_text_without_words(run, data.train[config.packing.max_seq_length]))
    masker = training_masker(config.masking, tokenizer, config.seed, words, kind)
    shape = {
        "padded": not run.padding_free,
        "within_documents": config.attention == WITHIN_DOCUMENTS,
        "on_gpu": on_gpu,
    }
    collators = {length: Collator(packed, masker, tokenizer, length, **shape) for length, packed in data.train.items()}
    loader = TrainLoader(
        [
            LoaderStage(
                stage, collators[stage.max_seq_length], data.orders[stage.max_seq_length], plan.micro_batch_size
            )
            for stage, plan in zip(config.stages, plans, strict=True)
        ],
        ranks.rank,
        ranks.world_size,
        lambda step: mlm_probability(config.schedule, config.masking, step),
        config.masking.copies,
    )
    if data.held_out is None:
        return loader, None
    masker = evaluation_masker(config.masking, tokenizer, words, kind)
    collator = Collator(data.held_out, masker, tokenizer, config.packing.max_seq_length, **shape)
    return loader, HeldOutSample(collator, config.eval_sequences, plans[-1].micro_batch_size, ranks)


def find_lines(run: Run, state: TrainState, held_out: HeldOutSample | None, objective: Objective) -> None:
    """Log the lines to compare the held-out losses with, if there are any; `state` keeps them."""
    if held_out is None or not objective.predicts_tokens:
        return
    if not state.lines:
        collator, sequences = held_out.collator, held_out.sequences
        state.lines = run.ranks.on_main(lambda: CountModel.of(run.corpus).losses(collator, sequences))
    run.ranks.log(
        f"lines to compare with: held-out loss {state.lines[UNIGRAM_LOSS]:.4f} from the frequencies of tokens alone, "
        f"{state.lines[NEIGHBOUR_LOSS]:.4f} from counts of neighbours"
    )


def _log_text_without_words(run: Run, packed: PackedSplit) -> None:
    """Log the share of the data, estimated from a sample of sequences, in which `--masking` finds no words."""
    sample = np.linspace(0, len(packed) - 1, min(len(packed), _SAMPLE_SEQUENCES)).astype(np.int64)
    special_ids = run.corpus.manifest.tokenizer.special_ids
    ids = np.full((len(sample), run.config.packing.max_seq_length), special_ids[0])
    packed.gather(sample, ids)
    share = share_without_spaces(run.corpus.folder / TOKENIZER_FOLDER, ids[~np.isin(ids, special_ids)])
    if share >= 0.001:
        run.ranks.log(
            f"--masking {run.config.masking.unit}: {share:.1%} of the characters in {len(sample)} sequences in "
            "scripts written without spaces, where words cannot be found: each token counts as a word"
        )
