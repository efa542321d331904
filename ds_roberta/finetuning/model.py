"""Texts as token ids, and how many of them a sequence may have."""

from __future__ import annotations

from typing import Any

import transformers

from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.finetuning.examples import Examples, Texts
from ds_roberta.transformers_folder import TransformersFolder

SHORTEST = 8


def sequence_length(folder: TransformersFolder, asked: int | None) -> int:
    """Tokens of the longest sequence, the special ones included: what is asked for, or what the model was trained with.

    Raises:
        UserError: it is too short for a text, or the model has fewer positions.
    """
    if asked is not None and asked < SHORTEST:
        raise UserError(f"--max_seq_length must be at least {SHORTEST}, got {asked}")
    return folder.sequence_length(asked)


def encode(tokenizer: transformers.PreTrainedTokenizerBase, texts: Texts, max_seq_length: int) -> list[dict[str, Any]]:
    """`input_ids` and `attention_mask` of each text. One that is too long is cut, the longer text of a pair first, and
    told in a warning with the place of the first. The letters of a special token stay text, as in pretraining."""
    encoded = tokenizer(
        texts.firsts,
        texts.seconds,
        truncation=True,
        max_length=max_seq_length,
        return_attention_mask=True,
        return_token_type_ids=False,
        split_special_tokens=True,
    )
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) == max_seq_length]
    if full:
        uncut = tokenizer(
            [texts.firsts[index] for index in full],
            texts.seconds and [texts.seconds[index] for index in full],
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
        cut = [index for index, ids in zip(full, uncut, strict=True) if len(ids) > max_seq_length]
        if cut:
            logger.warning(
                f"{len(cut)} of {len(texts.firsts)} texts are longer than {max_seq_length} tokens and are cut there, "
                f"first {texts.place(cut[0])}"
            )
    return [
        {"input_ids": input_ids, "attention_mask": mask}
        for input_ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def encode_examples(
    tokenizer: transformers.PreTrainedTokenizerBase, examples: Examples, max_seq_length: int
) -> list[dict[str, Any]]:
    """`encode`'s features with `labels`."""
    features = encode(tokenizer, examples.texts, max_seq_length)
    return [{**feature, "labels": label} for feature, label in zip(features, examples.labels, strict=True)]
