"""transformers' Trainer as its `run_mlm` example uses it, for `benchmarks.time_to_loss`, which starts this file.

    python -m benchmarks.run_mlm JSON FOLDER

The JSON has the fields of `Case`. At each evaluation the folder gets a line of `points.jsonl` (CPU-seconds of training
so far, tokens, loss) and a checkpoint, from which the same command continues, with other masks: Trainer has already
drawn those of a batch ahead when it saves the state of its generator.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ds_roberta.config import MaskingConfig, PackingConfig, model_config
from ds_roberta.data.loader import Collator, HeldOutSample, MicroBatch
from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT
from ds_roberta.data.masking import evaluation_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import Corpus
from ds_roberta.distributed import Ranks
from ds_roberta.finetuning.trainer_checkpoints import last_checkpoint
from ds_roberta.model.export import hf_config

EVALUATED_AT_ONCE = 32
POINTS_NAME = "points.jsonl"


@dataclass(frozen=True)
class Case:
    """What is trained; the names are those of `launch/pretrain.py`. `max_steps` is the end of the linear schedule."""

    data_dir: str
    model: str
    max_seq_length: int
    packing: str
    eval_sequences: int
    train_batch_size: int
    learning_rate: float
    max_steps: int
    evaluations: int
    seed: int

    @property
    def interval(self) -> int:
        """The number of steps between evaluations."""
        return max(1, self.max_steps // self.evaluations)


def blocks(corpus: Corpus, length: int) -> datasets.Dataset:
    """All documents with their special tokens, joined and cut, as `run_mlm` does with lines of text."""
    tokenizer, split, parts = corpus.manifest.tokenizer, corpus.split(TRAIN_SPLIT), []
    for shard in range(len(split.shards)):
        offsets = split.document_offsets(shard).astype(np.int64)
        framed = np.insert(split.values(shard), offsets[:-1], tokenizer.bos_token_id)
        ends = offsets[1:] + np.arange(1, len(offsets))
        parts.append(np.insert(framed, ends, tokenizer.eos_token_id))
    ids = np.concatenate(parts).astype(np.int64)
    return datasets.Dataset.from_dict({"input_ids": ids[: len(ids) // length * length].reshape(-1, length)})


class HeldOutLoss(TrainerCallback):
    """Measures the loss that `launch/pretrain.py` would log for the same weights, outside the seconds of training."""

    def __init__(self, case: Case, corpus: Corpus, points: Path):
        packing, tokenizer = PackingConfig(case.max_seq_length, case.packing), corpus.manifest.tokenizer
        build_index(corpus, VALIDATION_SPLIT, packing)
        packed = open_index(corpus, VALIDATION_SPLIT, packing)
        collator = Collator(packed, evaluation_masker(MaskingConfig(), tokenizer), tokenizer, case.max_seq_length)
        self._sample = HeldOutSample(collator, case.eval_sequences, EVALUATED_AT_ONCE, Ranks.of_one_process())
        self._case, self._points, self._seconds, self._began = case, points, 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock at the first step: batches that a resumed run skips before it do not count."""
        self._began = self._began or time.process_time()

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Drops the points of steps that are not in the checkpoint."""
        tokens = state.global_step * self._case.train_batch_size * self._case.max_seq_length
        kept = [row for row in read_points(self._points) if row["tokens"] <= tokens]
        self._points.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._seconds = kept[-1]["seconds"] if kept else 0.0

    def on_save(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, _: Any, state: Any, __: Any, model: Any, **___: Any) -> None:
        case, step = self._case, state.global_step
        if step % case.interval and step != case.max_steps:
            return
        self._seconds += time.process_time() - self._began
        sums = self._sample.evaluate(lambda batch: {"loss": held_out_loss(model, batch)})
        assert sums is not None  # it is never stopped
        found, counts = sums
        tokens = step * case.train_batch_size * case.max_seq_length
        row = {"seconds": self._seconds, "tokens": tokens, "loss": found["loss"] / counts.labels}
        with self._points.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._began = time.process_time()


def read_points(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def held_out_loss(model: RobertaForMaskedLM, batch: MicroBatch) -> float:
    """The sum of a micro-batch's losses."""
    model.eval()
    with torch.no_grad():
        mask = None if batch.attention_mask is None else batch.attention_mask.long()
        logits = model(batch.input_ids, attention_mask=mask).logits.flatten(0, 1)[batch.masked_positions]
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
    model.train()
    return float(loss)


def main(case: Case, folder: Path) -> None:
    set_seed(case.seed)
    corpus = Corpus.open(case.data_dir)
    ids = corpus.manifest.tokenizer
    config = model_config(case.model, ids.vocab_size, case.max_seq_length, **ids.config_ids)
    tokenizer = AutoTokenizer.from_pretrained(Path(case.data_dir) / TOKENIZER_FOLDER)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=case.train_batch_size,
        max_steps=case.max_steps,
        learning_rate=case.learning_rate,
        seed=case.seed,
        use_cpu=not torch.cuda.is_available(),
        save_steps=case.interval,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MaskingConfig.mlm_probability)
    model, rows = RobertaForMaskedLM(hf_config(config)), blocks(corpus, case.max_seq_length)
    callback = HeldOutLoss(case, corpus, folder / POINTS_NAME)
    trainer = Trainer(model, arguments, collator, rows, callbacks=[callback])
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]))
