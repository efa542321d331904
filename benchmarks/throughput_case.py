"""What the trainers that `benchmarks/throughput.py` compares train: a model, micro-batches and data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ds_roberta.config import PRESETS, ModelConfig, PackingConfig, model_config

VOCABULARY = 50_265
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": VOCABULARY - 1}  # RoBERTa's ids


@dataclass(frozen=True)
class Case:
    """What all contenders train.

    Attributes:
        model: a preset's name, or LAYERSxHIDDENxHEADS such as 8x384x6.
        folder: where contenders write; it has the `rows` for transformers' contenders.
        micro_batch_size: sequences per micro-step.
        micro_steps: micro-steps per step.
        data: a data folder, indexed for `packing`.
        filled: the share of a step's places that hold tokens; the others are padding.
    """

    model: str
    max_seq_length: int
    micro_batch_size: int
    micro_steps: int
    folder: str
    data: str
    packing: str = "contiguous"
    vocab_size: int = VOCABULARY
    filled: float = 1.0

    @property
    def config(self) -> ModelConfig:
        if self.model in PRESETS:
            return model_config(self.model, self.vocab_size, self.max_seq_length)
        layers, hidden_size, heads = map(int, self.model.split("x"))
        of_the_length = model_config("tiny", self.vocab_size, self.max_seq_length)
        sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads}
        return replace(of_the_length, **sizes, intermediate_size=4 * hidden_size)

    @property
    def train_batch_size(self) -> int:
        return self.micro_batch_size * self.micro_steps


def write_data(folder: Path, max_seq_length: int, sequences: int) -> None:
    """Write a data folder of full sequences of random ids, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from ds_roberta.data.manifest import TOKENIZER_FOLDER, TRAIN_SPLIT, Manifest
    from ds_roberta.data.packing import build_index
    from ds_roberta.data.shards import Corpus, write_shard
    from ds_roberta.data.tokenizer import TokenizerInfo

    ordinary = {f"t{number}": number for number in range(VOCABULARY) if number not in SPECIAL_TOKENS.values()}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={**SPECIAL_TOKENS, **ordinary}, merges=[])),
        **{f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")},
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
    ).save_pretrained(folder / TOKENIZER_FOLDER)
    tokenizer = TokenizerInfo.read(folder / TOKENIZER_FOLDER)
    inner = np.random.default_rng(0).integers(4, VOCABULARY - 1, (sequences, max_seq_length - 2))
    document = np.append(inner.flatten(), tokenizer.eos_token_id)
    shard = write_shard(folder, TRAIN_SPLIT, 0, [document], [np.array([len(document) - 1])], VOCABULARY)
    Manifest(tokenizer, {}, (), {TRAIN_SPLIT: (shard,)}).write(folder)
    build_index(Corpus.open(folder), TRAIN_SPLIT, PackingConfig(max_seq_length, "contiguous"))


def write_rows(case: Case, most: int) -> float:
    """Write the first packed sequences, padded and at most `most`, as rows for `datasets`; return how full they are."""
    import datasets

    from ds_roberta.data.manifest import TRAIN_SPLIT
    from ds_roberta.data.packing import open_index
    from ds_roberta.data.shards import Corpus

    corpus = Corpus.open(case.data)
    packed = open_index(corpus, TRAIN_SPLIT, PackingConfig(case.max_seq_length, case.packing))
    tokenizer, count = corpus.manifest.tokenizer, min(len(packed), most)
    rows = np.full((count, case.max_seq_length), tokenizer.pad_token_id)
    rows[:, 0] = tokenizer.bos_token_id
    lengths = packed.lengths(np.arange(count)) + 2
    packed.gather(np.arange(count), rows)
    rows[np.arange(count), lengths - 1] = tokenizer.eos_token_id
    is_token = np.arange(case.max_seq_length) < lengths[:, None]
    columns = {
        "input_ids": rows,
        "attention_mask": is_token.astype(np.int64),
        "special_tokens_mask": np.isin(rows, tokenizer.special_ids).astype(np.int64),
    }
    rows_of_lists = datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()})
    rows_of_lists.save_to_disk(Path(case.folder) / "rows")
    return float(is_token.mean())
