"""The properties of a tokenizer that the data depends on, read from its folder without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import xxhash

from ds_roberta.data import byte_level, unigram
from ds_roberta.data.byte_level import SPECIAL_TOKENS, roberta_content, special_token
from ds_roberta.errors import UserError
from ds_roberta.files import read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_UINT16_VOCABULARY = 1 << 16
TOKENIZER_CONFIG = "tokenizer_config.json"
REMEDY = "use a tokenizer of the RoBERTa kind, for example one made with 'preprocess train-tokenizer'"
_KINDS = "a byte-level BPE or a SentencePiece Unigram"
_LARGEST_ID = (1 << 24) - 1
"""The largest id that is taken for one; tables of all ids are kept in memory."""
_SENTENCEPIECE_MODEL = "sentencepiece.bpe.model"

PROBES = {
    "Latin": "Größe, naïve façade: It's 1 234,5 €",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα",
    "Cyrillic": "Съешь же ещё этих мягких булок",
    "Arabic": "نَصٌّ عربيّ",
    "Hebrew": "שָׁלוֹם עולם",
    "Devanagari": "क्षत्रिय हिन्दी",
    "Thai": "ภาษาไทยน้ำ",
    "Chinese": "今天天气很好。𠮷",
    "Japanese": "ガギグ がっこうへ行く",
    "Korean": "한국어 각",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "combining marks": "e\u0301 o\u0308\u0323",
    "control characters": "a\x00b\x1f\x7f\u200b\ufeff",
    "white space": "a  b\t\tc\n\n d\u00a0\u3000e ",
}
"""A text in each script, which a byte-level BPE must reproduce."""


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The integer type of ids on disk: uint16 if the vocabulary fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= MAX_UINT16_VOCABULARY else np.uint32)


@dataclass(frozen=True)
class TokenizerInfo:
    """What training needs to know about a tokenizer: the size of its vocabulary, its special ids, its identity."""

    vocab_size: int
    bos_token_id: int
    pad_token_id: int
    eos_token_id: int
    mask_token_id: int
    special_ids: tuple[int, ...]
    fingerprint: str

    @property
    def config_ids(self) -> dict[str, Any]:
        """The special ids that a model's config has, by their names there."""
        return {name: getattr(self, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> TokenizerInfo:
        """The inverse of `dataclasses.asdict`, after a round trip through JSON."""
        return cls(**{**entry, "special_ids": tuple(entry["special_ids"])})

    @classmethod
    def read(cls, folder: Path) -> TokenizerInfo:
        """Read `tokenizer.json` of a Hugging Face tokenizer folder.

        Raises:
            UserError: as `tokenizer_content`; or one of RoBERTa's special tokens is missing.
        """
        content = tokenizer_content(folder)
        model, added = content["model"], content.get("added_tokens") or []
        vocabulary = model_vocabulary(content)
        for token in added:
            if (number := vocabulary.setdefault(token["content"], token["id"])) != token["id"]:
                raise UserError(
                    f"the tokenizer in {str(folder)!r} gives {token['content']} the ids {number} and {token['id']}: "
                    f"{REMEDY}"
                )
        ids = {}
        for name in ("<s>", "<pad>", "</s>", "<mask>"):
            if name not in vocabulary:
                raise UserError(f"the tokenizer in {str(folder)!r} has no {name} token: {REMEDY}")
            ids[name] = vocabulary[name]
        specials = {token["id"] for token in added if token.get("special")} | set(ids.values())
        of_unigram = unigram.is_unigram(content)
        if of_unigram:
            specials.add(model["unk_id"])
        identity = {
            "vocab": vocabulary,
            "merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []],
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
            **({"scores": [score for _, score in model["vocab"]]} if of_unigram else {}),
        }
        return cls(
            vocab_size=max(vocabulary.values()) + 1,
            bos_token_id=ids["<s>"],
            pad_token_id=ids["<pad>"],
            eos_token_id=ids["</s>"],
            mask_token_id=ids["<mask>"],
            special_ids=tuple(sorted(specials)),
            # The same as `json_fingerprint` if there are no fractions, but much faster.
            fingerprint=xxhash.xxh3_128_hexdigest(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)),
        )


def tokenizer_content(folder: Path) -> dict[str, Any]:
    """The content of a `tokenizer.json` of RoBERTa's kind: a byte-level BPE, or a Unigram as `unigram.standard` says.

    If there is no such file, it is made from `vocab.json` and `merges.txt`.

    Raises:
        UserError: the files are missing or are not a tokenizer's, or the tokenizer is of another kind.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _content_of_vocabulary(folder)
    if not path.is_file() and (folder / _SENTENCEPIECE_MODEL).is_file():
        raise UserError(
            f"{str(folder)!r} has {_SENTENCEPIECE_MODEL}, but no tokenizer.json, which is read here: make it with "
            "transformers and sentencepiece: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    if not path.is_file():
        raise UserError(
            f"no tokenizer in {str(folder)!r} (tokenizer.json is missing, and so is vocab.json or merges.txt): copy "
            "the model's own there, or make one with 'preprocess train-tokenizer --input TEXT --output DIR'"
        )
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
        of_unigram = unigram.is_unigram(content)
        obstacle = unigram.obstacle(content) if of_unigram else byte_level.obstacle(content)
        if obstacle is None:
            _check_form(content)
        if of_unigram and obstacle is None:
            content = unigram.standard(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the tokenizer in {str(folder)!r} cannot be read ({str(path)!r} is not {_KINDS}: {error!r}): copy it again"
        ) from error
    if obstacle is not None:
        raise UserError(f"{str(path)!r} is not {_KINDS}, but has {obstacle}: {REMEDY}")
    return content


def model_vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """The id of each token of the model, as a new object; tokens that were added later may be missing."""
    return unigram.vocabulary(content) if unigram.is_unigram(content) else dict(content["model"]["vocab"])


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    return read_json_object(path, "copy it again or remove it")


def _content_of_vocabulary(folder: Path) -> dict[str, Any]:
    """The content made from `vocab.json`, `merges.txt` and `added_tokens.json`, as transformers does."""
    try:
        vocabulary = dict(orjson.loads((folder / "vocab.json").read_bytes()))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        further = {}
        if (folder / "added_tokens.json").is_file():
            further = dict(orjson.loads((folder / "added_tokens.json").read_bytes()))
        named = {name: further.pop(name) for name in SPECIAL_TOKENS if name in further}
        prefix_space = read_tokenizer_config(folder).get("add_prefix_space") is True
        content = roberta_content({**vocabulary, **named}, merges, prefix_space)
        content["added_tokens"] += [
            {**special_token(name, number), "special": False}
            for name, number in sorted(further.items(), key=lambda entry: entry[1])
        ]
        _check_form(content)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"vocab.json and merges.txt in {str(folder)!r} cannot be read ({error}): {REMEDY}") from error
    except KeyError as error:
        raise UserError(f"the tokenizer in {str(folder)!r} has no {error.args[0]} token: {REMEDY}") from error
    return content


def _check_form(content: dict[str, Any]) -> None:
    """Raise `TypeError` if something in a `tokenizer.json` has another type than `tokenizers` writes, as far as it is
    read without the library, or an id is larger than any vocabulary."""
    vocabulary, merges = content["model"]["vocab"], content["model"].get("merges") or []
    added = content.get("added_tokens") or []
    numbers: list[Any] = []
    if isinstance(vocabulary, dict):
        numbers += vocabulary.values()
    elif not all(isinstance(token, str) and isinstance(score, int | float) for token, score in vocabulary):
        raise TypeError("a token of the vocabulary is not a text with a score")
    if not isinstance(merges, list) or not all(map(_is_pair, merges)):
        raise TypeError("the merges are not pairs of texts")
    if isinstance(vocabulary, dict):
        for left, right in (merge.split(" ") if isinstance(merge, str) else merge for merge in merges):
            if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
                raise TypeError(f"{left!r} and {right!r} are merged, but they or what they make are no tokens")
    if not isinstance(added, list) or not all(isinstance(token.get("content"), str) for token in added):
        raise TypeError("an added token has no text")
    numbers += [token.get("id") for token in added]
    for number in numbers:
        if type(number) is not int or not 0 <= number <= _LARGEST_ID:
            raise TypeError(f"a token has the id {number!r}")
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        if content.get(name) is not None and not _is_step(content[name]):
            raise TypeError(f"the {name} is {content[name]!r}")
    settings = {name: value for name, value in content["model"].items() if name not in ("vocab", "merges")}
    orjson.dumps({**content, "model": settings})  # raises where something is nested too deeply to be written


def _is_pair(merge: Any) -> bool:
    """Whether a merge is two texts, or one with a space between them."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)


def _is_step(step: Any) -> bool:
    """Whether a value is a step of a tokenizer, and so are the steps within it."""
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return False
    inner = [step[name] for name in ("normalizers", "pretokenizers", "processors") if name in step]
    return all(isinstance(steps, list) and all(map(_is_step, steps)) for steps in inner)


def token_bytes(folder: Path) -> dict[int, bytes]:
    """The text of each of the model's ids, as UTF-8; a byte-level BPE's token may hold only part of a character.

    Raises:
        UserError: as `tokenizer_content`.
    """
    content = tokenizer_content(folder)
    vocabulary = model_vocabulary(content)
    if unigram.is_unigram(content):
        return {number: token.replace(unigram.WORD_START, " ").encode() for token, number in vocabulary.items()}
    letters = byte_level.letters_of_bytes()
    return {
        number: b"".join(letters.get(letter) or letter.encode() for letter in token)
        for token, number in vocabulary.items()
    }


def in_the_alphabet_of(model: Path, vocabulary: Mapping[str, int], data: Path) -> dict[str, int]:
    """The tokens of a vocabulary as another tokenizer writes their texts, such as `▁a` for `Ġa`, with their ids.

    Args:
        model: the folder of the tokenizer in whose alphabet they are returned.
        vocabulary: all tokens of the tokenizer in the folder `data`. A token that holds only part of a character is
            left out if `model` has no token for such a part.
    """
    to_unigram, from_unigram = (unigram.is_unigram(tokenizer_content(folder)) for folder in (model, data))
    if to_unigram == from_unigram:
        return dict(vocabulary)
    letters = {byte: letter for letter, byte in byte_level.letters_of_bytes().items()}
    texts, written = token_bytes(data), {}
    for token, number in vocabulary.items():
        text = texts.get(number, token.encode())
        if from_unigram:
            written["".join(letters[bytes([byte])] for byte in text)] = number
        elif (decoded := text.decode(errors="ignore")).encode() == text:
            written[decoded.replace(" ", unigram.WORD_START)] = number
    return written


@lru_cache(maxsize=4)
def ids_inside_characters(folder: Path) -> np.ndarray:
    """Which ids are text that begins inside a character: (vocab_size,) bool.

    Raises:
        UserError: as `TokenizerInfo.read`.
    """
    table = np.zeros(TokenizerInfo.read(folder).vocab_size, dtype=bool)
    table[[number for number, data in token_bytes(folder).items() if data and is_continuation(data[0])]] = True
    return table


def is_continuation(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character that began before it."""
    return 0x80 <= byte < 0xC0


def check_text_is_kept(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Check that texts of many scripts survive encoding and decoding.

    Args:
        tokenizer: the one of `folder`, which neither cuts nor pads texts.

    Returns:
        What a user should know, in words: what its normalizer changes; if it is a Unigram, the scripts with characters
        that it does not know.

    Raises:
        UserError: a byte-level BPE loses a text: decoding does not give what the normalizer left, or the normalizer
            left nothing.
    """
    changed, unknown = [], []
    # A Unigram cannot know all characters, and keeps of white space only that there is some.
    unknown_id = tokenizer.token_to_id(unigram.UNKNOWN) if unigram.is_model(tokenizer) else None
    for script, text in PROBES.items():
        text = f" {text}"  # some tokenizers put a space before a text that has none
        kept = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if unknown_id is not None:
            if unknown_id in encoded.ids:
                start, end = encoded.offsets[encoded.ids.index(unknown_id)]
                unknown.append(f"{script} ({text[start:end].strip()!r})")
            text, kept = " ".join(text.split()), " ".join(kept.split())
        elif (found := tokenizer.decode(encoded.ids, skip_special_tokens=False)) != kept or not kept.strip():
            raise UserError(
                f"the tokenizer in {str(folder)!r} would lose text ({script}: {text!r} becomes {found!r}): {REMEDY}"
            )
        if kept != text:
            changed.append(f"{script} ({text.strip()!r} becomes {kept.strip()!r})")
    notes = [f"the tokenizer's normalizer changes text: {', '.join(changed)}"] if changed else []
    if unknown:
        notes.append(
            f"the tokenizer has {unigram.UNKNOWN} for characters that it does not know; the first of them in texts of "
            f"many kinds: {', '.join(unknown)}"
        )
    return notes
