"""A tokenizer of any kind, copied for a corpus and loaded to encode it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer, pre_tokenizers

from ds_roberta.data import unigram
from ds_roberta.data.tokenizer import REMEDY, TokenizerInfo, check_text_is_kept
from ds_roberta.data.tokenizer_files import corpus_content, write_tokenizer
from ds_roberta.errors import UserError


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer without settings that would harm a corpus. It is shared, so it must not be changed."""

    content: dict[str, Any]
    """The content of `tokenizer.json`."""

    @cached_property
    def library(self) -> Tokenizer:
        """The library's tokenizer; loading it raises the library's errors."""
        tokenizer = Tokenizer.from_buffer(orjson.dumps(self.content))
        # By default the letters "</s>" or "<mask>" in a text would become the special id.
        tokenizer.encode_special_tokens = True
        return tokenizer


def corpus_tokenizer(folder: Path) -> CorpusTokenizer:
    """Return the tokenizer in `folder`; loading takes long, so the last one is kept."""
    return _load((folder / "tokenizer.json").read_bytes())


@lru_cache(maxsize=1)
def _load(file: bytes) -> CorpusTokenizer:
    return CorpusTokenizer(corpus_content(orjson.loads(file)))


def copy_tokenizer(source: Path, target: Path) -> TokenizerInfo:
    """Copy a tokenizer folder, completed as `write_tokenizer` does.

    Raises:
        UserError: there is no tokenizer, it is of the wrong kind, or one of RoBERTa's special tokens is missing.
    """
    TokenizerInfo.read(source)  # its errors name the folder that the user gave
    target.mkdir()
    write_tokenizer(source, target)
    info = TokenizerInfo.read(target)
    try:
        tokenizer = corpus_tokenizer(target).library
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"cannot use the tokenizer in {str(source)!r} ({error!r}): {REMEDY}") from error
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if tokenizer.token_to_id(letter) is None]
    if missing and not unigram.is_model(tokenizer):
        raise UserError(
            f"the tokenizer in {str(source)!r} lacks {len(missing)} of the 256 bytes, so it would lose text: {REMEDY}"
        )
    for note in check_text_is_kept(tokenizer, source):
        print(note, flush=True)
    return info
