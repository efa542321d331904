"""A tokenizer's folder that any program can open: `tokenizer.json` and `tokenizer_config.json`, both complete.

Training reads `tokenizer.json` only, so that file is the reference. transformers also needs the class and the special
tokens, which many folders leave out: it then opens them without mask, padding and `<s>`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from ds_roberta.data import byte_level, unigram
from ds_roberta.data.byte_level import SPECIAL_TOKENS, special_token
from ds_roberta.data.tokenizer import (
    TOKENIZER_CONFIG,
    model_vocabulary,
    read_tokenizer_config,
    tokenizer_content,
)
from ds_roberta.errors import UserError
from ds_roberta.files import write_json

ROBERTA_CLASS, GENERIC_CLASS = "RobertaTokenizer", "PreTrainedTokenizerFast"
NAMED_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
}
"""RoBERTa's special tokens by transformers' names."""
DEFAULT_LENGTH = 512
_KEPT = {
    "clean_up_tokenization_spaces": (True, False),
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
}
"""The settings of `tokenizer_config.json` that are kept, with their values, because they do not change any id."""
_NO_LIMIT = 1e18  # transformers writes 1e30 if there is none, others infinity


def corpus_content(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a `tokenizer.json` without settings that would harm a corpus.

    A file that was saved after other uses may cut texts, pad them, drop merges at random, or take the letters of a
    special token for the token.
    """
    content = _without_settings(content)
    if not unigram.is_unigram(content):
        return content
    special = {*SPECIAL_TOKENS, *(token["content"] for token in content["added_tokens"] if token["special"])}
    return unigram.keeping_letters(content, sorted(special & model_vocabulary(content).keys()))


def training_tokenizer(folder: Path, add_prefix_space: bool | None = None) -> Tokenizer:
    """The tokenizer of a folder as it encodes a corpus, in which the letters of a special token are text.

    Args:
        add_prefix_space: whether a text is given a space before its first word; None: as the folder says.

    Raises:
        UserError: the folder has no tokenizer of RoBERTa's kind.
    """
    content = _with_prefix_space(corpus_content(tokenizer_content(folder)), add_prefix_space)
    try:
        tokenizer = Tokenizer.from_buffer(orjson.dumps(content))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(
            f"the tokenizer in {str(folder)!r} cannot be read ({error}): replace it with the one that the model was "
            "trained with"
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def write_tokenizer(
    source: Path, target: Path, max_seq_length: int | None = None, add_prefix_space: bool | None = None
) -> None:
    """Complete a folder's tokenizer and write it into another folder.

    Args:
        source: a folder with `tokenizer.json`, or `vocab.json` and `merges.txt`.
        target: an existing folder.
        max_seq_length: the length to truncate to, `<s>` and `</s>` included; None: what `source` says, else 512.
        add_prefix_space: see `training_tokenizer`.

    Raises:
        UserError: as `tokenizer_content` and `stated_length`.
    """
    content = completed(_with_prefix_space(_without_settings(tokenizer_content(source)), add_prefix_space))
    length = max_seq_length or stated_length(source) or DEFAULT_LENGTH
    write_files(content, read_tokenizer_config(source), length, target)


def write_files(content: dict[str, Any], before: dict[str, Any], max_seq_length: int, folder: Path) -> None:
    """Write the two files of a completed tokenizer.

    Args:
        content: the content of `tokenizer.json`.
        before: the earlier `tokenizer_config.json`; some of its settings are kept.
    """
    added = [token["content"] for token in content["added_tokens"] if token["special"]]
    further = [token for token in added if token not in SPECIAL_TOKENS]
    config = {
        **{name: before[name] for name, values in _KEPT.items() if before.get(name) in values},
        **{name: token if token in added else None for name, token in NAMED_TOKENS.items()},
        **({"additional_special_tokens": further} if further else {}),
        "add_prefix_space": has_prefix_space(content),
        "errors": "replace",
        "model_max_length": max_seq_length,
        "tokenizer_class": class_of(content),
        "trim_offsets": content["post_processor"].get("trim_offsets"),
    }
    if unigram.is_unigram(content):
        del config["errors"], config["trim_offsets"]
    (folder / "tokenizer.json").write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    write_json(folder / TOKENIZER_CONFIG, config)


def completed(content: dict[str, Any]) -> dict[str, Any]:
    """Add RoBERTa's missing special tokens, and the processor that puts them around texts and pairs."""
    vocabulary = {**model_vocabulary(content), **{token["content"]: token["id"] for token in content["added_tokens"]}}
    added = {token["content"]: token for token in content["added_tokens"]}
    is_camembert = class_of(content) == unigram.CAMEMBERT_CLASS
    for name in (*SPECIAL_TOKENS, *(unigram.CAMEMBERT_UNUSED if is_camembert else ())):
        if name in vocabulary:
            added[name] = {**special_token(name, vocabulary[name]), **added.get(name, {})}
    added["<mask>"] = {**added["<mask>"], "lstrip": True}  # it replaces a word and the space before it
    if unigram.is_unigram(content):
        processor = unigram.post_processor(vocabulary["<s>"], vocabulary["</s>"])
    else:
        trim_offsets = (content.get("post_processor") or {}).get("trim_offsets", True)
        processor = byte_level.post_processor(vocabulary, trim_offsets, has_prefix_space(content))
    return {
        **content,
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
        "post_processor": processor,
    }


def class_of(content: dict[str, Any]) -> str:
    """transformers' class of tokenizer that produces the ids of a `tokenizer.json`.

    `RobertaTokenizer` takes only vocabulary and merges from the file (transformers 5), the classes of Unigrams only the
    vocabulary and the table of characters, the generic class everything.
    """
    if unigram.is_unigram(content):
        return unigram.class_of_unigram(content) or GENERIC_CLASS
    model, before = content["model"], content.get("pre_tokenizer") or {}
    other = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not content.get("normalizer")
    return ROBERTA_CLASS if plain and not any(model.get(name) for name in other) else GENERIC_CLASS


def other_token(data: Path, model: Path) -> str | None:
    """A token whose id differs between the tokenizers of two folders, in words; None if they give the same ids.

    Vocabularies are compared, not fingerprints: files that give the same ids may differ in settings that do not
    affect ids, as copies made by several versions of transformers do.
    """
    in_data, in_model = (training_tokenizer(folder).get_vocab(with_added_tokens=True) for folder in (data, model))
    different = sorted(in_data.items() ^ in_model.items())
    if not different:
        return None
    token = different[0][0]
    return f"the token {token!r} has the id {in_data.get(token)} there, {in_model.get(token)} in the model"


def stated_length(folder: Path) -> int | None:
    """The length that a folder's tokenizer truncates to, `<s>` and `</s>` included; None if it sets no limit.

    Raises:
        UserError: the length is not a number of tokens.
    """
    length = read_tokenizer_config(folder).get("model_max_length")
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise UserError(
            f"{str(folder / TOKENIZER_CONFIG)!r} has the model_max_length {length!r}: it must be a number of tokens"
        )
    return int(length) if length < _NO_LIMIT else None


def has_prefix_space(content: dict[str, Any]) -> bool:
    """Whether a text is given a space before its first word."""
    steps = _byte_levels(content.get("pre_tokenizer"))
    return unigram.is_unigram(content) or any(step.get("add_prefix_space", False) for step in steps)


def _without_settings(content: dict[str, Any]) -> dict[str, Any]:
    """The content with all special tokens marked as such, and without truncation, padding and dropout."""
    added = [
        {**token, "special": token.get("special", False) or token["content"] in SPECIAL_TOKENS}
        for token in content.get("added_tokens") or []
    ]
    model = content["model"] if unigram.is_unigram(content) else {**content["model"], "dropout": None}
    return {**content, "truncation": None, "padding": None, "model": model, "added_tokens": added}


def _with_prefix_space(content: dict[str, Any], add_prefix_space: bool | None) -> dict[str, Any]:
    if add_prefix_space is None:
        return content
    before = copy.deepcopy(content.get("pre_tokenizer"))
    for step in _byte_levels(before):
        step["add_prefix_space"] = add_prefix_space
    return {**content, "pre_tokenizer": before}


def _byte_levels(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    return [step for step in steps if step.get("type") == "ByteLevel"]
