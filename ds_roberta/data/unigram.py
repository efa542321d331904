"""SentencePiece's Unigram in a `tokenizer.json`, as transformers has it for XLM-R and CamemBERT.

A text is normalized by SentencePiece's own table of characters and split at white space; every word then begins with
`▁`. Characters that no token has become `<unk>`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORD_START = "▁"
UNKNOWN = "<unk>"
XLM_ROBERTA_CLASS, CAMEMBERT_CLASS = "XLMRobertaTokenizer", "CamembertTokenizer"
_UNUSED_UNKNOWN = "<unk>NOTUSED"
CAMEMBERT_UNUSED = ("<s>NOTUSED", "</s>NOTUSED", _UNUSED_UNKNOWN)
"""Special tokens that `CamembertTokenizer` always has."""
_XLM_ROBERTA_UNKNOWN = 3  # its class takes this id for the one of `<unk>`
_METASPACE = {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": "always", "split": True}
_PRE_TOKENIZERS = [{"type": "WhitespaceSplit"}, _METASPACE]
_ON_SPACES = ("Strip", "Replace")
"""Steps by which files of older versions normalize spaces, which has no effect before a split at white space."""


def is_unigram(content: dict[str, Any]) -> bool:
    """Whether the model of a `tokenizer.json` is a Unigram; old files do not state the type."""
    model = content["model"]
    return bool(model.get("type", "Unigram" if "unk_id" in model else None) == "Unigram")


def is_model(tokenizer: Tokenizer) -> bool:
    """Whether the model of a loaded tokenizer is a Unigram."""
    return type(tokenizer.model).__name__ == "Unigram"


def obstacle(content: dict[str, Any]) -> str | None:
    """What keeps a Unigram from being used, in words; None if it marks words and knows `<unk>`."""
    model = content["model"]
    splits_words = any(map(_marks_words, _steps(content.get("pre_tokenizer"), "pretokenizers")))
    if not splits_words or not any(token.startswith(WORD_START) for token, _ in model["vocab"]):
        return "a model of type Unigram"
    if model.get("byte_fallback"):
        return "a Unigram with byte_fallback"
    if model["vocab"][model["unk_id"]][0] != UNKNOWN:
        return f"a Unigram whose unknown token is not {UNKNOWN}"
    return None


def standard(content: dict[str, Any]) -> dict[str, Any]:
    """The content as transformers 5 writes it: with other steps if these give the same ids, and with one `<unk>`."""
    content = {**content, "model": {**content["model"], "vocab": _with_one_unknown(content["model"])}}
    normalizers = _steps(content.get("normalizer"), "normalizers")
    tables = [step for step in normalizers if step["type"] == "Precompiled"]
    on_spaces = [step for step in normalizers if step["type"] in _ON_SPACES and _is_of_spaces(step)]
    splits = [step for step in _steps(content.get("pre_tokenizer"), "pretokenizers") if not _marks_words(step)]
    if len(tables) > 1 or len(tables) + len(on_spaces) < len(normalizers):
        return content
    if any(step["type"] != "WhitespaceSplit" for step in splits):
        return content
    return {
        **content,
        "normalizer": tables[0] if tables else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS},
        "decoder": _METASPACE,
    }


def _with_one_unknown(model: dict[str, Any]) -> list[list[Any]]:
    """The vocabulary of a model, in which old files of CamemBERT have `<unk>` twice, once unused."""
    return [
        [_UNUSED_UNKNOWN, score] if token == UNKNOWN and number != model["unk_id"] else [token, score]
        for number, (token, score) in enumerate(model["vocab"])
    ]


def is_standard(content: dict[str, Any]) -> bool:
    """Whether words between white space have the same ids in every text, after its normalization."""
    return is_unigram(content) and bool(
        _steps(content["pre_tokenizer"], "pretokenizers")[:2] == _PRE_TOKENIZERS
        and (content.get("normalizer") or {"type": "Precompiled"})["type"] == "Precompiled"
    )


def class_of_unigram(content: dict[str, Any]) -> str | None:
    """transformers' class that rebuilds the tokenizer from vocabulary and table; None if it would lose something."""
    pieces = vocabulary(content)
    if is_standard(content) and pieces.keys() >= set(CAMEMBERT_UNUSED):
        return CAMEMBERT_CLASS
    return XLM_ROBERTA_CLASS if is_standard(content) and pieces[UNKNOWN] == _XLM_ROBERTA_UNKNOWN else None


def vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """The id of each of the model's tokens."""
    return {token: number for number, (token, _) in enumerate(content["model"]["vocab"])}


def keeping_letters(content: dict[str, Any], special: list[str]) -> dict[str, Any]:
    """The content with a step by which the letters of special tokens stay text.

    A Unigram has its special tokens among the others, with the best score: in a text it would take their letters for
    the token. SentencePiece itself does not. The step cuts between their first letter and the rest.
    """
    cuts = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special)
    cut = {"type": "Split", "pattern": {"Regex": cuts}, "behavior": "MergedWithPrevious", "invert": False}
    steps = [*_steps(content["pre_tokenizer"], "pretokenizers"), cut]
    return {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def of_marked_words(content: dict[str, Any]) -> dict[str, Any]:
    """The content, after `keeping_letters`, for words that are normalized already and have their mark."""
    *_, cut = _steps(content["pre_tokenizer"], "pretokenizers")
    steps = [{**_METASPACE, "prepend_scheme": "never"}, cut]
    return {
        **content,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "added_tokens": [],
        "post_processor": None,
    }


def post_processor(bos: int, eos: int) -> dict[str, Any]:
    """The step that puts `<s>` and `</s>` around texts and pairs."""

    def token(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    single = [token("<s>"), text("A"), token("</s>")]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, token("</s>"), text("B"), token("</s>")],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in (("</s>", eos), ("<s>", bos))
        },
    }


def _steps(step: dict[str, Any] | None, of_sequence: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[of_sequence]) if step["type"] == "Sequence" else [step]


def _marks_words(step: dict[str, Any]) -> bool:
    """Whether a step puts the mark before every word; old files have `add_prefix_space` instead of the scheme."""
    always = step.get("prepend_scheme", "always") == "always" and step.get("add_prefix_space", True)
    is_mark = step["type"] == "Metaspace" and step.get("replacement") == WORD_START
    return bool(is_mark and always and step.get("split", True))


def _is_of_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip":
        return True
    spaces = step["pattern"] in ({"Regex": " {2,}"}, {"String": "  "})
    return spaces and step["content"] in (" ", WORD_START)
