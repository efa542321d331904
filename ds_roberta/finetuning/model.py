"""The transformers folder: its tokenizer, its positions, and texts as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ds_roberta.data.tokenizer import check_text_is_kept
from ds_roberta.distributed import logger
from ds_roberta.errors import UserError
from ds_roberta.evaluation import roberta_folder
from ds_roberta.finetuning.examples import Examples, Texts
from ds_roberta.transformers_folder import open_tokenizer


def read_config(folder: Path) -> transformers.RobertaConfig:
    """
    Raises:
        UserError: `folder` is no transformers folder of a RoBERTa model with weights.
    """
    content = roberta_folder.read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{str(folder)!r} has no weights (*.safetensors): give a folder that launch/export_hf.py or "
            "launch/finetune.py wrote as --model"
        )
    try:
        config = transformers.RobertaConfig.from_dict(content)
    except Exception as error:  # the library's validators raise their own kinds
        raise UserError(f"{str(folder / 'config.json')!r} is not a RoBERTa's ({error}): mend it") from error
    if not isinstance(config.pad_token_id, int):
        raise UserError(f"{str(folder / 'config.json')!r} has the pad_token_id {config.pad_token_id!r}: give its id")
    return config


def read_tokenizer(
    folder: Path, config: transformers.RobertaConfig, add_prefix_space: bool | None = None
) -> transformers.PreTrainedTokenizerBase:
    """
    Args:
        add_prefix_space: see `tokenizer_files.training_tokenizer`.

    Raises:
        UserError: the folder lacks its tokenizer, or the tokenizer is broken, of another kind or has ids that the model
            lacks.
    """
    tokenizer = open_tokenizer(folder, add_prefix_space)
    check_text_is_kept(tokenizer.backend_tokenizer, folder)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {str(folder)!r} has {len(tokenizer)} ids, the model {config.vocab_size}: "
            "give the folder the tokenizer that the model was trained with"
        )
    return tokenizer


def sequence_length(config: transformers.RobertaConfig, asked: int | None) -> int:
    """Tokens of the longest sequence, the special ones included: what is asked for, or all that the model has.

    Raises:
        UserError: the model has fewer positions.
    """
    positions = config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa counts from the pad id on
    if asked is not None and not 8 <= asked <= positions:
        raise UserError(f"--max_seq_length {asked} is not within 8 and the model's {positions} positions: change it")
    return asked or positions


def encode(tokenizer: transformers.PreTrainedTokenizerBase, texts: Texts, max_seq_length: int) -> list[dict[str, Any]]:
    """`input_ids` and `attention_mask` of each text. One that is too long is cut, the longer text of a pair first, and
    told in a warning with the place of the first."""
    encoded = tokenizer(
        texts.firsts,
        texts.seconds,
        truncation=True,
        max_length=max_seq_length,
        return_attention_mask=True,
        return_token_type_ids=False,
    )
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) == max_seq_length]
    if full:
        uncut = tokenizer(
            [texts.firsts[index] for index in full],
            texts.seconds and [texts.seconds[index] for index in full],
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
