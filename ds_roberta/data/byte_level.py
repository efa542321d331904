"""RoBERTa's byte-level BPE in a `tokenizer.json`, as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def roberta_content(vocabulary: dict[str, int], merges: list[list[str]], add_prefix_space: bool) -> dict[str, Any]:
    """A `tokenizer.json` of RoBERTa's kind. Raises `KeyError` if a special token has no id."""
    special = {name: vocabulary[name] for name in SPECIAL_TOKENS if name in vocabulary or name != "<unk>"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted((special_token(*entry) for entry in special.items()), key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": _step(add_prefix_space),
        "post_processor": post_processor(vocabulary, True, add_prefix_space),
        "decoder": _step(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def special_token(name: str, token_id: int) -> dict[str, Any]:
    """An entry of `added_tokens`. The mask replaces a word and the space before it, as RoBERTa's does."""
    kind = {"single_word": False, "lstrip": name == "<mask>", "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": name, **kind}


def post_processor(vocabulary: Mapping[str, int], trim_offsets: bool, add_prefix_space: bool) -> dict[str, Any]:
    """The step that puts `<s>` and `</s>` around texts and pairs."""
    return {
        "type": "RobertaProcessing",
        "sep": ["</s>", vocabulary["</s>"]],
        "cls": ["<s>", vocabulary["<s>"]],
        "trim_offsets": trim_offsets,
        "add_prefix_space": add_prefix_space,
    }


def _step(add_prefix_space: bool) -> dict[str, Any]:
    """The step of bytes, as pre-tokenizer and as decoder."""
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}


def obstacle(content: dict[str, Any]) -> str | None:
    """What a `tokenizer.json` has that no byte-level BPE has, in words; None if it is a byte-level BPE's."""
    model = content["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files do not state the type
    if kind != "BPE":
        return f"a model of type {kind}"
    if not isinstance(model["vocab"], dict):
        return "a vocabulary that is not an object"
    prefix = model.get("continuing_subword_prefix")
    return f"tokens with the prefix {prefix!r}" if prefix else None


def letters_of_bytes() -> dict[str, bytes]:
    """Byte-level BPE keeps bytes that are visible in Latin-1, and writes the others as letters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    letters = {chr(byte): bytes([byte]) for byte in visible}
    return letters | {chr(0x100 + number): bytes([byte]) for number, byte in enumerate(hidden)}
