"""The architecture of a transformers `RobertaConfig`, read and checked without transformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_roberta.config import MODEL_TYPES, PRESETS, ModelConfig
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.files import read_json_object
from ds_roberta.model.encoder import ACTIVATIONS

CONFIG_NAME = "config.json"
_REMEDY = f"give the {CONFIG_NAME} of a transformers RobertaConfig"
_VOCABULARY_OF_OTHER_TYPES = 30522
_TOKENIZER_FIELDS = {"vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DEFAULTS: dict[str, Any] = {
    "model_type": "roberta",
    **_TOKENIZER_FIELDS,
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
}
"""RoBERTa's defaults in transformers for the fields of a `ModelConfig` that a file leaves out."""
_ONLY: dict[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "quantization_config": None,
}
"""Fields that would make another model, or compute it differently, with the one value that can be trained here."""
_COUNTS: tuple[str, ...] = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads")
_COUNTS += ("intermediate_size", "max_position_embeddings", "type_vocab_size")
_LARGEST = 2**31 - 1  # the product of two such sizes is a number of elements that torch can express
_VALID: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (_COUNTS, f"a whole number from 1 to {_LARGEST}", lambda value: type(value) is int and 1 <= value <= _LARGEST),
    (
        ("pad_token_id", "bos_token_id", "eos_token_id"),
        "a token's id, a whole number from 0 up",
        lambda value: type(value) is int and value >= 0,
    ),
    (
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "at least 0 and below 1",
        lambda value: type(value) in (int, float) and 0 <= value < 1,
    ),
    (
        ("initializer_range", "layer_norm_eps"),
        "a positive number",
        lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max,
    ),
    (
        ("hidden_act",),
        f"one of {', '.join(ACTIVATIONS)}",
        lambda value: isinstance(value, str) and value in ACTIVATIONS,
    ),
)
"""The fields of a `ModelConfig`, each with what it must be and a check."""


def model_choice(text: str) -> str:
    """Parse a preset's name, or the path of a config or its folder; a `type` for argparse."""
    if text not in PRESETS:
        try:
            config_path(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def config_path(model: str) -> Path:
    """The config that a path names: itself, or the one in a folder.

    Raises:
        UserError: there is no such file.
    """
    path = Path(model) / CONFIG_NAME if Path(model).is_dir() else Path(model)
    if not path.is_file():
        raise UserError(
            f"{model!r} is none of {', '.join(PRESETS)}, and there is no file {str(path)!r}: choose one of them, or "
            f"give the {CONFIG_NAME} of a transformers RobertaConfig, or its folder"
        )
    return path


def read_architecture(path: Path, tokenizer: TokenizerInfo | None = None) -> ModelConfig:
    """The architecture in a `config.json`; see `architecture`.

    Raises:
        UserError: the file is unreadable or a run's, or the architecture cannot be trained.
    """
    content = read_json_object(path, _REMEDY)
    if "model_type" not in content and "run" in content:
        raise UserError(
            f"{str(path)!r} is a run's record: give the config of its model, in {str(path.parent / 'hf')!r}"
        )
    return architecture(content, path, tokenizer)


def unused_fields(path: Path) -> list[str]:
    """The fields of a `config.json` that training does not use."""
    return sorted(read_json_object(path, _REMEDY).keys() - DEFAULTS.keys() - _ONLY.keys())


def architecture(content: Mapping[str, Any], path: Path, tokenizer: TokenizerInfo | None = None) -> ModelConfig:
    """The architecture that the fields of a `RobertaConfig` describe.

    A missing field has transformers' default. Fields that change neither the model nor its training are ignored.

    Args:
        path: named in errors.
        tokenizer: the data's, which then provides the ids and the size of the vocabulary that the content leaves out.
            The vocabulary may be larger than the tokenizer's, such as a multiple of 64; the rest are never inputs.

    Raises:
        UserError: the model cannot be trained; every problem is named on a separate line.
    """
    model_type = content.get("model_type")
    if str(model_type) not in MODEL_TYPES:
        found = "missing" if model_type is None else repr(model_type)
        raise UserError(
            f"{str(path)!r}: model_type is {found}, but only 'roberta' can be trained, and what has its architecture: "
            f"{', '.join(MODEL_TYPES)}; give a transformers RobertaConfig"
        )
    defaults = DEFAULTS if model_type == "roberta" else {**DEFAULTS, "vocab_size": _VOCABULARY_OF_OTHER_TYPES}
    if tokenizer is not None:
        defaults = {**defaults, **{name: getattr(tokenizer, name) for name in _TOKENIZER_FIELDS}}
    values = {name: content.get(name, default) for name, default in defaults.items()}
    problems = [
        f"{name} must be {description}, got {values[name]!r}"
        for names, description, is_valid in _VALID
        for name in names
        if not is_valid(values[name])
    ]
    if not problems:
        problems = _misfits(values, tokenizer)
    problems += [
        f"{name} is {content[name]!r}: only {known!r} can be trained here; set it to that, or remove it"
        for name, known in _ONLY.items()
        if content.get(name, known) not in (known, None)
    ]
    if problems:
        raise UserError(*(f"{str(path)!r}: {problem}" for problem in problems))
    floats = {name: float(values[name]) for name in ("initializer_range", "layer_norm_eps")}  # RobertaConfig's own type
    return ModelConfig(**{**values, **floats})


def stored_architecture(stored: Mapping[str, Any], path: Path) -> ModelConfig:
    """The architecture that a checkpoint's identity describes; fields that it does not have are `ModelConfig`'s.

    Raises:
        TypeError: it describes none.
        UserError: as `architecture`.
    """
    return architecture(asdict(ModelConfig(**stored)), path)


def _misfits(values: Mapping[str, Any], tokenizer: TokenizerInfo | None) -> list[str]:
    """Fields that do not fit each other or the data's tokenizer; each by itself is valid."""
    problems = []
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        problems.append(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}: {width - width % heads} and "
            f"{width + heads - width % heads} are"
        )
    first = values["pad_token_id"] + 1
    if values["max_position_embeddings"] <= first:
        problems.append(
            f"max_position_embeddings {values['max_position_embeddings']} leaves no position for a token, as they are "
            f"counted from pad_token_id + 1: add {first} to the longest sequence"
        )
    problems += [
        f"{name} {values[name]} is not among the {values['vocab_size']} ids of the vocabulary"
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if values[name] >= values["vocab_size"]
    ]
    if tokenizer is None:
        return problems
    if values["vocab_size"] < tokenizer.vocab_size:
        problems.append(
            f"vocab_size {values['vocab_size']} is less than the {tokenizer.vocab_size} ids of the data's tokenizer: "
            "raise it, or remove it"
        )
    problems += [
        f"{name} is {values[name]}, {getattr(tokenizer, name)} in the data's tokenizer: change it, or remove it"
        for name in _TOKENIZER_FIELDS
        if name != "vocab_size" and values[name] != getattr(tokenizer, name)
    ]
    return problems
