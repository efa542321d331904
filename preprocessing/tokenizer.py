"""Byte-level BPE of RoBERTa's kind: training it, copying it, and loading it for a corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import orjson
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ds_roberta.data.tokenizer import REMEDY, TokenizerInfo, check_text_is_kept
from ds_roberta.errors import UserError
from ds_roberta.files import write_json

FIRST_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK_TOKEN = "<mask>"
MIN_VOCAB_SIZE = 256 + len(FIRST_SPECIAL_TOKENS) + 1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

_MIN_PAIR_FREQUENCY = 2
_CONFIG = {
    "add_prefix_space": False,
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "errors": "replace",
    "mask_token": MASK_TOKEN,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "tokenizer_class": "RobertaTokenizer",
    "trim_offsets": True,
    "unk_token": "<unk>",
}
"""`tokenizer_config.json`: by it transformers' AutoTokenizer opens the folder as a RoBERTa tokenizer."""


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer without what must not be done to a corpus. It is shared, so it must not be changed."""

    content: dict[str, Any]
    """Of `tokenizer.json`."""

    @cached_property
    def library(self) -> Tokenizer:
        """As the library loads it. Raises what the library raises."""
        tokenizer = Tokenizer.from_buffer(orjson.dumps(self.content))
        # By default the letters "</s>" or "<mask>" in a text would become the control id.
        tokenizer.encode_special_tokens = True
        return tokenizer


def corpus_tokenizer(folder: Path, info: TokenizerInfo) -> CorpusTokenizer:
    """The tokenizer in `folder`; the last one again where it is the same, as loading takes long."""
    return _load((folder / "tokenizer.json").read_bytes(), info.special_ids)


@lru_cache(maxsize=1)
def _load(file: bytes, special_ids: tuple[int, ...]) -> CorpusTokenizer:
    content = orjson.loads(file)
    # A folder saved after other uses may cut texts, pad them, or drop merges at random: never here.
    content["truncation"] = content["padding"] = content["model"]["dropout"] = None
    content["added_tokens"] = content.get("added_tokens") or []
    for token in content["added_tokens"]:
        token["special"] = token["id"] in special_ids or token["content"] in FIRST_SPECIAL_TOKENS
    return CorpusTokenizer(content)


def is_tokenizer_folder(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer and nothing else, so that replacing it loses nothing else."""
    names = {path.name for path in folder.iterdir()}
    return "tokenizer.json" in names and names <= set(TOKENIZER_FILES)


def train_bpe(documents: Iterable[list[str]], vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE on the lines of documents and save it in `folder`.

    Special tokens are not looked for in the text: their letters are split as any others, so no merge can make one.

    Returns:
        The number of ids: `vocab_size`, or fewer where the text has no more pairs that occur twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <mask> comes last, behind the merges
        min_frequency=_MIN_PAIR_FREQUENCY,
        special_tokens=list(FIRST_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], MASK_TOKEN: len(model["vocab"])}
    _save(vocabulary, [tuple(pair) for pair in model["merges"]], folder)
    write_json(folder / "tokenizer_config.json", _CONFIG)
    return len(vocabulary)


def copy_tokenizer(source: Path, target: Path) -> TokenizerInfo:
    """Copy a tokenizer folder, completing one that has no `tokenizer.json` or no `tokenizer_config.json`.

    Raises:
        UserError: there is no tokenizer, it is of another kind, or one of RoBERTa's special tokens is missing.
    """
    vocabulary, merges = source / "vocab.json", source / "merges.txt"
    convert = not (source / "tokenizer.json").is_file() and vocabulary.is_file() and merges.is_file()
    info = None if convert else TokenizerInfo.read(source)
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    try:
        if convert:
            _save(*models.BPE.read_file(str(vocabulary), str(merges)), target)
        info = info or TokenizerInfo.read(target)
        tokenizer = corpus_tokenizer(target, info).library
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"cannot use the tokenizer in {str(source)!r} ({error!r}): {REMEDY}") from error
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if tokenizer.token_to_id(letter) is None]
    if missing:
        raise UserError(
            f"the tokenizer in {str(source)!r} lacks {len(missing)} of the 256 bytes, so it would lose text: {REMEDY}"
        )
    change = check_text_is_kept(tokenizer, source)
    if change is not None:
        print(change, flush=True)
    if not (target / "tokenizer_config.json").exists():
        write_json(target / "tokenizer_config.json", _CONFIG)
    return info


def _save(vocabulary: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> None:
    """Write `tokenizer.json` of a RoBERTa tokenizer. Raises `KeyError` where a special token has no id."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    separator, beginning, _ = ((token, vocabulary[token]) for token in ("</s>", "<s>", MASK_TOKEN))
    tokenizer.post_processor = processors.RobertaProcessing(separator, beginning, add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in FIRST_SPECIAL_TOKENS])
    tokenizer.add_special_tokens([AddedToken(MASK_TOKEN, lstrip=True, normalized=False)])  # as RoBERTa's own
    tokenizer.save(str(folder / "tokenizer.json"))
