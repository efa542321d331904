"""The usual way to prepare text for masked language modelling, as transformers' `run_mlm` example does it:
one map of `datasets` tokenizes, and a second joins the ids and cuts them into blocks.

    python benchmarks/usual_recipe.py FILE TOKENIZER CACHE_FOLDER

Prints the tokens of all blocks. `benchmarks/preprocessing.py` compares it with `preprocess shard`.
"""

import sys
from itertools import chain
from pathlib import Path

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast

BLOCK = 512


def main(file: str, tokenizer_folder: str, cache: str) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(tokenizer_folder) / "tokenizer.json"),
        **{f"{name}_token": token for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))},
        **{f"{name}_token": token for name, token in (("mask", "<mask>"), ("unk", "<unk>"))},
    )
    if file.endswith(".jsonl"):
        data = load_dataset("json", data_files=file, cache_dir=cache, split="train")
    else:
        data = load_dataset("text", data_files=file, sample_by="paragraph", cache_dir=cache, split="train")
    tokenized = data.map(
        lambda rows: tokenizer(rows["text"], return_special_tokens_mask=True),
        batched=True,
        num_proc=None,
        remove_columns=data.column_names,
    )
    blocks = tokenized.map(group_texts, batched=True, num_proc=None)
    print(len(blocks) * BLOCK)


def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Join all rows of a batch and cut them into blocks; what is left at the end is dropped."""
    joined = {key: list(chain(*values)) for key, values in rows.items()}
    length = len(joined["input_ids"]) // BLOCK * BLOCK
    return {key: [values[i : i + BLOCK] for i in range(0, length, BLOCK)] for key, values in joined.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
