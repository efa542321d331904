"""A transformers folder of a RoBERTa and its tokenizer: the one place where they are opened and checked."""

from __future__ import annotations

import tempfile
from pathlib import Path

import transformers

from ds_roberta.data.tokenizer import (
    PROBES,
    REMEDY,
    SPECIAL_TOKENS,
    TokenizerInfo,
    read_tokenizer_config,
    tokenizer_content,
)
from ds_roberta.data.tokenizer_files import NAMED_TOKENS, class_of, training_tokenizer, write_tokenizer
from ds_roberta.errors import UserError

MOST_PIECES = 2000
"""Tokens of the vocabulary, at most, whose text is compared."""


def open_tokenizer(folder: Path, add_prefix_space: bool | None = None) -> transformers.PreTrainedTokenizerBase:
    """transformers' tokenizer of a folder, completed as `write_tokenizer` does, whatever the folder leaves out.

    Raises:
        UserError: the folder has no tokenizer of RoBERTa's kind.
    """
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(folder, Path(temporary), add_prefix_space=add_prefix_space)
        tokenizer_class = read_tokenizer_config(Path(temporary))["tokenizer_class"]
        try:
            tokenizer = getattr(transformers, tokenizer_class).from_pretrained(temporary, local_files_only=True)
        except Exception as error:  # the libraries raise nothing more precise
            raise UserError(f"the tokenizer in {str(folder)!r} cannot be read ({error}): copy it again") from error
    tokenizer.name_or_path = str(folder)
    return tokenizer


def check_tokenizer(folder: Path, training: Path, add_prefix_space: bool | None = None) -> None:
    """Refuse a folder that transformers' `AutoTokenizer` opens as another tokenizer than the one of training.

    Compared are the class, the special tokens and their ids, the vocabulary, and the ids of texts of many scripts, of
    pairs, of the letters of special tokens, and of a text with a mask in it.

    Args:
        folder: what was written.
        training: the tokenizer's folder in training.
        add_prefix_space: see `training_tokenizer`.

    Raises:
        UserError: they differ.
    """
    try:
        difference = _difference(folder, training, add_prefix_space)
    except UserError:
        raise
    except Exception as error:  # the libraries raise nothing more precise
        difference = repr(error)
    if difference is not None:
        raise UserError(
            f"transformers {transformers.__version__} does not open the tokenizer in {str(training)!r} as training uses"
            f" it ({difference}): nothing was written; try another version of transformers, or {REMEDY}"
        )


def _difference(folder: Path, training: Path, add_prefix_space: bool | None) -> str | None:
    """What differs, in words."""
    opened = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reference, special = training_tokenizer(training, add_prefix_space), TokenizerInfo.read(training)
    expected_class = class_of(tokenizer_content(training))
    if type(opened) is not getattr(transformers, expected_class):
        return f"its class is {type(opened).__name__}, not {expected_class}"
    vocabulary = reference.get_vocab(with_added_tokens=True)
    if opened.get_vocab() != vocabulary:
        return "another vocabulary"
    for name, token in NAMED_TOKENS.items():
        found = (getattr(opened, name), getattr(opened, f"{name}_id"))
        expected = (token, vocabulary[token]) if token in vocabulary else (None, None)
        if found != expected:
            return f"{name} is {found}, not {expected}"

    def ids(text: str) -> list[int]:
        return reference.encode(text, add_special_tokens=False).ids

    bos, eos, mask = special.bos_token_id, special.eos_token_id, special.mask_token_id
    ordinary = sorted(set(vocabulary.values()) - set(special.special_ids))
    pieces = reference.decode(ordinary[:: 1 + len(ordinary) // MOST_PIECES])
    for text in (*PROBES.values(), *(f" {token} Text{token}" for token in SPECIAL_TOKENS), pieces):
        if opened(text, split_special_tokens=True, verbose=False)["input_ids"] != [bos, *ids(text), eos]:
            return f"{text[:40]!r} has other ids"
        pair = opened(text, text, split_special_tokens=True, verbose=False)["input_ids"]
        if pair != [bos, *ids(text), eos, eos, *ids(text), eos]:
            return f"the pair of {text[:40]!r} and itself has other ids"
    if opened("He sat at the <mask>.")["input_ids"] != [bos, *ids("He sat at the"), mask, *ids("."), eos]:
        return "a text with <mask> has other ids"
    return None
