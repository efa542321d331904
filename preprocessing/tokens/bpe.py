"""Training a byte-level BPE like RoBERTa's; copying any tokenizer and loading it for a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ds_roberta.data import unigram
from ds_roberta.data.tokenizer import REMEDY, SPECIAL_TOKENS, TokenizerInfo, check_text_is_kept, roberta_content
from ds_roberta.data.tokenizer_files import DEFAULT_LENGTH, corpus_content, write_files, write_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.files import TOKENIZER_FILES, holds_only

*FIRST_SPECIAL_TOKENS, MASK_TOKEN = SPECIAL_TOKENS
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_MIN_PAIR_FREQUENCY = 2
_LONGEST_WORD = 1024
"""The longest word to learn from, in bytes. Words of a language are shorter; a genome may not be."""


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


def is_tokenizer_folder(folder: Path) -> bool:
    """Return whether `folder` contains a tokenizer and nothing else, so that replacing it loses nothing else."""
    return (folder / "tokenizer.json").is_file() and holds_only(folder, TOKENIZER_FILES)


def train_bpe(documents: Iterable[list[str]], vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE on the lines of documents and save it in `folder`.

    Special tokens are not searched for in the text: their letters are split like any others, so no merge can make one.
    Words longer than 1,024 bytes are split into parts of that length, because the library's time grows with the
    square of a word's length.

    Returns:
        The number of ids: `vocab_size`, or fewer if no other pair of the text occurs twice.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_LONGEST_WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <mask> comes last, after the merges
        min_frequency=_MIN_PAIR_FREQUENCY,
        special_tokens=FIRST_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], MASK_TOKEN: len(model["vocab"])}
    write_files(roberta_content(vocabulary, model["merges"], add_prefix_space=False), {}, DEFAULT_LENGTH, folder)
    return len(vocabulary)


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
