"""Held-out masked-LM loss of a transformers folder: the number that its training logged, comparable between models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ds_roberta.config import EVAL_SEQUENCES, MaskingConfig, PackingConfig
from ds_roberta.data.loader import Collator, HeldOutSample, MicroBatch
from ds_roberta.data.manifest import TOKENIZER_FOLDER, VALIDATION_SPLIT
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer_files import other_token
from ds_roberta.data.words import word_flags
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError
from ds_roberta.evaluation.roberta_folder import PRECISIONS, RobertaFolder, open_roberta
from ds_roberta.files import check_output_file, write_figures
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.options import require_one_of, require_positive

POSITIONS_OF_A_BIN = 64
_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class PositionBin:
    """Masked tokens at positions `first … last` of their sequences (`<s>` at 0) and their mean loss, None if none."""

    first: int
    last: int
    masked_tokens: int
    loss: float | None


@dataclass(frozen=True)
class Perplexity:
    """Loss in nats per masked token."""

    loss: float
    perplexity: float
    masked_tokens: int
    sequences: int
    by_position: tuple[PositionBin, ...]


def evaluate_perplexity(
    model: Path,
    data: Path,
    max_seq_length: int | None = None,
    packing: str = PackingConfig.format,
    masking: MaskingConfig | None = None,
    sequences: int = EVAL_SEQUENCES,
    precision: str = "fp32",
    json_path: Path | None = None,
) -> Perplexity:
    """Print a model's held-out loss and perplexity on a data folder; write them, with the loss by position, as JSON.

    They equal what the run logged if the length, packing, masking and number of sequences are the same.

    Args:
        model: a transformers folder.
        data: a folder made by `preprocess shard`, with held-out documents.
        max_seq_length: the length of the packed sequences; None: the model folder's own.
        masking: the masking options; None: the defaults.
        sequences: the maximum number of sequences in the sample.

    Raises:
        UserError: the model, the data, their tokenizers or the JSON's path is wrong, or the length too large.
    """
    require_one_of("--precision", precision, PRECISIONS)
    require_positive("--eval_sequences", sequences)
    check_output_file("--json", json_path)
    corpus = Corpus.open(data)
    folder = open_roberta(model, precision)
    config = PackingConfig(folder.max_seq_length if max_seq_length is None else max_seq_length, packing)
    masking = masking or MaskingConfig()
    result = held_out_perplexity(folder, corpus, config, masking, sequences)
    for position_bin in result.by_position:
        loss = "-" if position_bin.loss is None else f"{position_bin.loss:.4f}"
        print(f"positions {position_bin.first:>5} to {position_bin.last:>5}: loss {loss}")
    print(
        f"held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f} ({result.masked_tokens:,} masked tokens "
        f"of {result.sequences:,} sequences of {config.max_seq_length} tokens)"
    )
    settings = {
        "model": str(model),
        "data": str(data),
        "data_fingerprint": corpus.manifest.fingerprint,
        "packing": asdict(config),
        "masking": asdict(masking),
        "precision": precision,
    }
    write_figures(json_path, {**settings, **asdict(result)})
    return result


def held_out_perplexity(
    folder: RobertaFolder, corpus: Corpus, packing: PackingConfig, masking: MaskingConfig, sequences: int
) -> Perplexity:
    """The loss on a fixed sample of the validation split; see `HeldOutSample`.

    Raises:
        UserError: the corpus has no such split or another tokenizer, the model has too few positions, or no
            token is masked.
    """
    if not corpus.manifest.splits.get(VALIDATION_SPLIT):
        raise UserError(
            f"the data in {str(corpus.folder)!r} has no held-out documents: "
            "prepare it with 'preprocess shard --validation_fraction'"
        )
    folder.sequence_length(packing.max_seq_length)
    if difference := other_token(corpus.folder / TOKENIZER_FOLDER, folder.path):
        raise UserError(
            f"the data in {str(corpus.folder)!r} was made with another tokenizer than the model's ({difference}): "
            "prepare the text again with 'preprocess shard --tokenizer MODEL'"
        )
    tokenizer = corpus.manifest.tokenizer
    words = None if masking.unit == "token" else word_flags(corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
    build_index(corpus, VALIDATION_SPLIT, packing)
    packed = open_index(corpus, VALIDATION_SPLIT, packing)
    collator = Collator(packed, evaluation_masker(masking, tokenizer, words), tokenizer, packing.max_seq_length)
    micro_batch_size = max(1, _MICRO_BATCH_TOKENS // packing.max_seq_length)
    sample = HeldOutSample(collator, sequences, micro_batch_size, Ranks.of_one_process())
    losses = _LossByPosition(folder, packing.max_seq_length)
    result = sample.evaluate(losses.add)
    assert result is not None  # it is never stopped
    found = MaskedLM.evaluation(*result)
    masked_tokens = int(losses.counts.sum())
    return Perplexity(found["loss"], found["perplexity"], masked_tokens, min(sequences, len(packed)), losses.bins())


class _LossByPosition:
    """Sums of losses by position in the sequence, collected while the total is computed."""

    def __init__(self, folder: RobertaFolder, max_seq_length: int):
        self._folder, self._length = folder, max_seq_length
        self.sums, self.counts = np.zeros(max_seq_length), np.zeros(max_seq_length, dtype=np.int64)

    def add(self, micro_batch: MicroBatch) -> dict[str, float]:
        """The sum of a micro-batch's losses, as `MaskedLM` names it."""
        losses = -self._folder.log_likelihoods(
            micro_batch.input_ids, micro_batch.attention_mask, micro_batch.masked_positions, micro_batch.labels
        ).double()
        positions = micro_batch.masked_positions.numpy() % self._length
        self.sums += np.bincount(positions, losses.numpy(), self._length)
        self.counts += np.bincount(positions, minlength=self._length)
        return {"loss": float(losses.sum())}

    def bins(self) -> tuple[PositionBin, ...]:
        found = []
        for first in range(0, self._length, POSITIONS_OF_A_BIN):
            end = min(first + POSITIONS_OF_A_BIN, self._length)
            count = int(self.counts[first:end].sum())
            loss = float(self.sums[first:end].sum()) / count if count else None
            found.append(PositionBin(first, end - 1, count, loss))
        return tuple(found)
