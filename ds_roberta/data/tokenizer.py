"""What the data must know of a tokenizer, read from its folder without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from ds_roberta.errors import UserError

MAX_UINT16_VOCABULARY = 1 << 16


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The integer type of ids on disk: uint16 where the vocabulary fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= MAX_UINT16_VOCABULARY else np.uint32)


@dataclass(frozen=True)
class TokenizerInfo:
    """What training must know of a tokenizer: the size of its vocabulary, its special ids, its identity."""

    vocab_size: int
    bos_token_id: int
    pad_token_id: int
    eos_token_id: int
    mask_token_id: int
    special_ids: tuple[int, ...]
    fingerprint: str

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> TokenizerInfo:
        """The inverse of `dataclasses.asdict`, behind a way through JSON."""
        return cls(**{**entry, "special_ids": tuple(entry["special_ids"])})

    @classmethod
    def read(cls, folder: Path) -> TokenizerInfo:
        """Read `tokenizer.json` of a Hugging Face tokenizer folder.

        Raises:
            UserError: there is no such file, it is not a tokenizer, or one of RoBERTa's special tokens is missing.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"no tokenizer in {str(folder)!r} (tokenizer.json is missing): "
                "make one with 'preprocess train-tokenizer --input TEXT --output DIR'"
            )
        try:
            content = orjson.loads(path.read_bytes())
            model, added = content["model"], content.get("added_tokens") or []
            vocabulary = dict(model["vocab"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(path)!r} is not a byte-level BPE tokenizer.json: {error!r}") from error
        vocabulary.update({token["content"]: token["id"] for token in added})
        ids = {}
        for name in ("<s>", "<pad>", "</s>", "<mask>"):
            if name not in vocabulary:
                raise UserError(
                    f"the tokenizer in {str(folder)!r} has no {name} token: use a tokenizer of the RoBERTa kind, "
                    "for example one made with 'preprocess train-tokenizer'"
                )
            ids[name] = vocabulary[name]
        specials = {token["id"] for token in added if token.get("special")} | set(ids.values())
        identity = {
            "vocab": vocabulary,
            "merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])],
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }
        return cls(
            vocab_size=max(vocabulary.values()) + 1,
            bos_token_id=ids["<s>"],
            pad_token_id=ids["<pad>"],
            eos_token_id=ids["</s>"],
            mask_token_id=ids["<mask>"],
            special_ids=tuple(sorted(specials)),
            # As `json_fingerprint`, whose canonical form this is too where there are no fractions, but much faster.
            fingerprint=xxhash.xxh3_128_hexdigest(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)),
        )
