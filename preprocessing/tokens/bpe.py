"""Training a byte-level BPE like RoBERTa's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ds_roberta.data.byte_level import SPECIAL_TOKENS, roberta_content
from ds_roberta.data.tokenizer_files import DEFAULT_LENGTH, write_files
from ds_roberta.files import TOKENIZER_FILES, holds_only

*FIRST_SPECIAL_TOKENS, MASK_TOKEN = SPECIAL_TOKENS
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_MIN_PAIR_FREQUENCY = 2
_LONGEST_WORD = 1024
"""The longest word to learn from, in bytes. Words of a language are shorter; a genome may not be."""


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
