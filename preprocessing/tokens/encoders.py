"""Encode documents as ids. `tokenizers` is the reference; `gigatoken`, if installed, gives the same ids much faster.

A document is given as its sentences (see `sentence_bytes`). The tokenizer sees one line for each (see
`tokenizer_lines`).

If a text contains the letters of a special token, they stay text: no encoder turns them into the special id.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import xxhash
from tokenizers import Tokenizer

from ds_roberta.data import unigram
from ds_roberta.data.byte_level import SPECIAL_TOKENS
from ds_roberta.data.tokenizer import TokenizerInfo, token_type
from ds_roberta.errors import UserError
from preprocessing.tokens.corpus_tokenizer import CorpusTokenizer, corpus_tokenizer
from preprocessing.tokens.encoded import Encoded, close_documents
from preprocessing.tokens.sentence_splitting import tokenizer_lines

HUGGINGFACE, GIGATOKEN, AUTO = "huggingface", "gigatoken", "auto"
BACKENDS = (AUTO, HUGGINGFACE, GIGATOKEN)

_INSTALL = "pip install 'ds_roberta[fast]'"
_CALL_CHARACTERS = 1 << 18
"""Text given to the reference in one call: it needs about 100 bytes of memory for each character."""
_KNOWN_PIECES, _KNOWN_CHARACTERS = 500_000, 32
"""How many pieces of text the reference remembers, and up to what length: less than 100 MB."""
_SAMPLE_BYTES = 512
"""How much of a batch both backends encode: for a batch of 1 MB, a thirtieth of the faster one's time."""
_LINE_FEED, _RETURN = "Ċ", "č"
"""The letters by which byte-level BPE names `\\n` and `\\r`."""
_WHITE_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
"""Unicode's White_Space, at which `tokenizers` splits; `str.split` also splits at separators of files and records."""
_CACHE_BYTES = 128 << 20
"""gigatoken 0.10 remembers every word; it is created again after the process has grown by this much."""


class BackendDifference(Exception):
    """The fast backend failed or gave other ids than the reference: its ids of this unit must not be used."""


def choose_backend(requested: str, folder: Path) -> tuple[str, str]:
    """Return the backend for the tokenizer in `folder`, and a line that says which one it is and why.

    Raises:
        UserError: gigatoken is requested but is not installed, or cannot replace this tokenizer.
    """
    if requested == HUGGINGFACE:
        return HUGGINGFACE, f"{HUGGINGFACE} (tokenizers {version('tokenizers')})"
    if find_spec("gigatoken") is None:
        if requested == GIGATOKEN:
            raise UserError(f"--tokenizer_backend gigatoken: gigatoken is not installed; install it with {_INSTALL}")
        return HUGGINGFACE, f"{HUGGINGFACE} (gigatoken is not installed; {_INSTALL} makes this many times faster)"
    obstacle = beyond_plain(corpus_tokenizer(folder).content)
    if obstacle is None:
        return GIGATOKEN, f"{GIGATOKEN} {version('gigatoken')}, compared with tokenizers {version('tokenizers')}"
    if requested == GIGATOKEN:
        raise UserError(
            f"--tokenizer_backend gigatoken cannot replace this tokenizer, which has {obstacle}: "
            f"use --tokenizer_backend {HUGGINGFACE}"
        )
    return HUGGINGFACE, f"{HUGGINGFACE} (this tokenizer has {obstacle}, which gigatoken has not been tested with)"


class SpecialLetters:
    """Finds the letters of any special token in the bytes of a text."""

    def __init__(self, tokens: Iterable[str]):
        letters = sorted(token.encode() for token in tokens)
        self._pattern = re.compile(b"|".join(map(re.escape, letters)))
        openings = {token[:1] for token in letters}
        self._opening = openings.pop() if len(openings) == 1 else b""  # usually "<", found much faster than a pattern

    def occur_in(self, text: bytes) -> bool:
        return self._opening in text and self._pattern.search(text) is not None


def make_encoder(backend: str, folder: Path, info: TokenizerInfo) -> tuple[Encoder, SpecialLetters]:
    """An encoder, and a finder of the letters of special tokens."""
    tokenizer = corpus_tokenizer(folder)
    content = tokenizer.content
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    letters = SpecialLetters({*SPECIAL_TOKENS, *special})
    words_are_independent = unigram.is_standard(content) and len(special) == len(content["added_tokens"])
    reference = (UnigramEncoder if words_are_independent else HuggingFaceEncoder)(tokenizer, info)
    return (GigatokenEncoder(content, info, reference) if backend == GIGATOKEN else reference), letters


class HuggingFaceEncoder:
    """The reference: `tokenizers`, which is called only once for each frequent word.

    The pattern with which plain byte-level BPE splits a text into words never makes a word across a boundary between
    another character and a space, and looks ahead only from white space. So the ids of a line are those of the pieces
    between such boundaries, and the ids of a piece that was seen before are looked up.
    """

    def __init__(self, tokenizer: CorpusTokenizer, info: TokenizerInfo):
        # Work is spread over processes: threads in each would only compete with them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        splitter = tokenizer.content.get("pre_tokenizer") or {}
        plain = {**tokenizer.content, "pre_tokenizer": {**splitter, "add_prefix_space": False}}
        self._cuts = beyond_plain(plain) is None
        # The library would put one before every sentence, also where the text has none.
        self._puts_space_first = self._cuts and bool(splitter.get("add_prefix_space"))
        self._tokenizer = (CorpusTokenizer(plain) if self._puts_space_first else tokenizer).library
        self._info = info
        self._dtype = token_type(info.vocab_size)
        self._known: dict[str, bytes] = {}
        self._unknown_id: int = tokenizer.content["model"]["unk_id"] if unigram.is_unigram(tokenizer.content) else -1

    @property
    def shows_spaces(self) -> bool:
        """Whether the ids of a sentence show if it begins with a space."""
        return self._cuts or self._whole(["a"]) != self._whole([" a"])

    def unknown_tokens(self, encoded: Encoded) -> np.ndarray:
        """How many `<unk>` each document has, (documents,) int64; byte-level BPE makes none."""
        ends = np.cumsum(encoded.lengths)
        return np.diff(np.append(0, np.cumsum(encoded.ids == self._unknown_id))[ends], prepend=0)

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Encode documents, each as `sentence_bytes` gives it."""
        texts = list(map(self._text, documents))
        lines = b"\n".join(texts).decode().split("\n")
        sentence_counts = np.fromiter((text.count(b"\n") + 1 for text in texts), np.int64, len(texts))
        return close_documents(*self.encode_lines(lines), sentence_counts, self._info)

    def _text(self, document: bytes) -> bytes:
        text = tokenizer_lines(document)
        return b" " + text if self._puts_space_first and not text.startswith(b" ") else text

    def encode_lines(self, lines: Sequence[str], known: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all lines, (tokens,), and how many each line has, (lines,) int64; no line holds a newline.

        Args:
            known: whether to use and fill the memory of words, which pays off with many lines.
        """
        encoded = self._by_pieces(lines) if known and self._cuts else self._whole(lines)
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded)) // self._dtype.itemsize
        return np.frombuffer(b"".join(encoded), self._dtype), counts

    def _by_pieces(self, lines: Sequence[str]) -> list[bytes]:
        pieces = [line.replace(" ", "\n ").removeprefix("\n").split("\n") for line in lines]
        if len(self._known) > _KNOWN_PIECES:
            self._known.clear()
        # There is no such boundary after white space: a line with a piece that ends in white space is encoded whole.
        new = [piece for piece in set(chain.from_iterable(pieces)) - self._known.keys() if not piece[-1:].isspace()]
        ids = dict(zip(new, self._whole(new), strict=True))
        self._known.update((piece, row) for piece, row in ids.items() if len(piece) <= _KNOWN_CHARACTERS)
        encoded = []
        for line, own in zip(lines, pieces, strict=True):
            try:
                encoded.append(b"".join(map(self._known.__getitem__, own)))
            except KeyError:
                if any(piece[-1:].isspace() for piece in own):
                    encoded += self._whole([line])
                else:
                    encoded.append(b"".join(ids[piece] if piece in ids else self._known[piece] for piece in own))
        return encoded

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        encoded: list[bytes] = []
        for call in _calls(texts):
            for encoding in self._tokenizer.encode_batch_fast(call, add_special_tokens=False):
                encoded.append(np.array(encoding.ids, self._dtype).tobytes())
        return encoded


class UnigramEncoder(HuggingFaceEncoder):
    """The reference with a SentencePiece Unigram, which is called only once for each frequent word.

    A line is normalized as a whole, because a character's neighbours may decide what becomes of it. Then each word
    between white space has the same ids wherever it is. A sentence that follows another without white space begins
    without the mark of a word's start.
    """

    def __init__(self, tokenizer: CorpusTokenizer, info: TokenizerInfo):
        super().__init__(tokenizer, info)
        self._normalizer = self._tokenizer.normalizer
        self._tokenizer = Tokenizer.from_buffer(orjson.dumps(unigram.of_marked_words(tokenizer.content)))
        self._cuts = True

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """As the base does, without sentences of which the normalizer leaves nothing."""
        return super().encode(documents).without_empty_sentences(filler=self._unknown_id)

    def _text(self, document: bytes) -> bytes:
        return b" " + tokenizer_lines(document)

    def _by_pieces(self, lines: Sequence[str]) -> list[bytes]:
        if len(self._known) > _KNOWN_PIECES:
            self._known.clear()
        words = [self._words(line) for line in lines]
        new = list(set(chain.from_iterable(words)) - self._known.keys())
        ids = dict(zip(new, self._whole(list(map(_marked, new))), strict=True))
        self._known.update((word, row) for word, row in ids.items() if len(word) <= _KNOWN_CHARACTERS)
        return [b"".join(ids[word] if word in ids else self._known[word] for word in own) for own in words]

    def _words(self, line: str) -> list[str]:
        """The words of a line, normalized; a first one that continues a word has a space before it."""
        text = line.removeprefix(" ")
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        first, *others = _WHITE_SPACE.split(text)
        words = list(filter(None, others))
        if first:
            words.insert(0, first if line.startswith(" ") else f" {first}")
        return words


def _marked(word: str) -> str:
    if word.startswith(" "):
        return word[1:]
    return word if word.startswith(unigram.WORD_START) else unigram.WORD_START + word


class GigatokenEncoder:
    """`gigatoken`, compared with the reference on a sample of every batch.

    It gets a batch as one text, because its own batches are slower and need a library that is slow to import. A
    `\\r` ends each document. The pattern of plain byte-level BPE makes a `\\n` or `\\r` between lines a word of its
    own, or puts it at the start of a run of white space; without the merges that join it to what follows it is one id,
    and the ids around it are those of the separate lines.
    """

    def __init__(self, content: dict[str, Any], info: TokenizerInfo, reference: HuggingFaceEncoder):
        model, newlines = content["model"], {_LINE_FEED, _RETURN}
        merges = [pair for pair in model["merges"] if newlines.isdisjoint("".join(pair))]
        # It knows no special token, so it cannot find one in the text.
        self._json = orjson.dumps(
            {**content, "model": {**model, "merges": merges}, "added_tokens": [], "post_processor": None}
        )
        self._line_end, self._document_end = (model["vocab"][letter] for letter in (_LINE_FEED, _RETURN))
        self._reference = reference
        self._info = info
        self._process = psutil.Process()
        self._characters = _KnownCharacters()
        self._load()

    def encode(self, documents: Sequence[bytes]) -> Encoded:
        """Encode documents as the reference does.

        Raises:
            BackendDifference: the ids are not the reference's.
        """
        text = b"\r".join([*map(tokenizer_lines, documents), b""])
        letters = np.frombuffer(text, np.uint8)
        if not self._characters.cover(letters):
            return self._reference.encode(documents)
        try:
            ids = self._tokenizer.encode(text).astype(token_type(self._info.vocab_size))
        except Exception as error:  # whatever the error, the reference may succeed
            raise BackendDifference(f"failed ({error!r})") from error
        text_ends = np.flatnonzero((letters == ord("\n")) | (letters == ord("\r")))
        inside = ids == self._line_end
        ends = np.flatnonzero(inside | (ids == self._document_end))
        if not np.array_equal(inside[ends], letters[text_ends] == ord("\n")):
            raise BackendDifference(f"gave {len(ends)} rows of ids for {len(text_ends)} sentences")
        self._compare(text, text_ends, ids, ends)
        self._bound_memory()
        return self._close_documents(ids, inside, ends)

    def unknown_tokens(self, encoded: Encoded) -> np.ndarray:
        return self._reference.unknown_tokens(encoded)

    def _close_documents(self, ids: np.ndarray, inside: np.ndarray, ends: np.ndarray) -> Encoded:
        """Make documents ended by `</s>` from ids in which `ends` are the positions of line ends.

        Args:
            inside: where `ids` are line ends within a document, (tokens,) bool.
        """
        closes = ~inside[ends]
        ids = ids[~inside]
        ends = ends - (np.cumsum(~closes) - ~closes)
        last_lines = np.flatnonzero(closes)
        document_ends, sentence_counts = ends[last_lines], np.diff(last_lines, prepend=-1)
        ids[document_ends] = self._info.eos_token_id
        lengths = np.diff(document_ends, prepend=-1)
        sentence_ends = ends - np.repeat(document_ends + 1 - lengths, sentence_counts)
        return Encoded(ids, lengths, sentence_ends.astype(np.uint32), sentence_counts)

    def _compare(self, text: bytes, text_ends: np.ndarray, ids: np.ndarray, ends: np.ndarray) -> None:
        """Raise `BackendDifference` unless the backends agree on a sample, from a line chosen by the text's hash.

        Args:
            text_ends: the positions of line ends in `text`, (lines,); `ends`: those in `ids`.
        """
        line = np.searchsorted(text_ends, xxhash.xxh3_64_intdigest(text) % len(text))
        start, begin = (positions[line - 1] + 1 if line else 0 for positions in (text_ends, ends))
        sample = text[start : start + _SAMPLE_BYTES].decode(errors="ignore").replace("\r", "\n")
        if start + _SAMPLE_BYTES < len(text):
            sample = sample[: max(_safe_cut(sample), sample.rfind("\n"), 0)]
        if not sample:  # a long line without a space: all of it
            sample = text[start : text_ends[line]].decode()
        lines = sample.removesuffix("\n").split("\n")
        expected, _ = self._reference.encode_lines(lines, known=False)
        own = ids[begin : begin + len(expected) + len(lines) - 1]
        if not np.array_equal(own[(own != self._line_end) & (own != self._document_end)], expected):
            raise BackendDifference(f"gave other ids than {HUGGINGFACE} near {sample[:60]!r}")

    def _load(self) -> None:
        import gigatoken

        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(self._json)
        except Exception as error:  # whatever the error, the reference could load it
            raise BackendDifference(f"cannot load this tokenizer ({error!r})") from error
        self._resident = self._process.memory_info().rss

    def _bound_memory(self) -> None:
        resident = self._process.memory_info().rss
        self._resident = min(self._resident, resident)
        if resident - self._resident > _CACHE_BYTES:
            self._load()


Encoder = HuggingFaceEncoder | GigatokenEncoder


class _KnownCharacters:
    """Check whether a text has only characters that are assigned in this Python's Unicode.

    A newer character may be a letter to one backend and unassigned to the other, as their tables have different
    versions.
    """

    def __init__(self) -> None:
        self._verdicts = np.zeros(0x110000, np.int8)  # 0 not asked yet, 1 assigned, -1 unassigned

    def cover(self, text: np.ndarray) -> bool:
        """Return whether a text in UTF-8, (bytes,) uint8, has only assigned characters."""
        # Below U+0800, where UTF-8 has one or two bytes, no two versions since 3.2 differ in a letter.
        leads = np.flatnonzero(text >= 0xE0)
        if not len(leads):
            return True
        first, second, third = (text[leads + offset].astype(np.uint32) for offset in range(3))
        points = (first & 0x0F) << 12 | (second & 0x3F) << 6 | third & 0x3F
        four = first >= 0xF0
        fourth = text[leads[four] + 3]
        points[four] = (points[four] & 0x7FFF) << 6 | fourth & 0x3F
        verdicts = self._verdicts[points]
        if not verdicts.all():
            for point in np.unique(points[verdicts == 0]).tolist():
                self._verdicts[point] = -1 if unicodedata.category(chr(point)) == "Cn" else 1
            verdicts = self._verdicts[points]
        return bool(verdicts.min() > 0)


def beyond_plain(content: dict[str, Any]) -> str | None:
    """What a tokenizer has beyond plain byte-level BPE, the only kind for which the backends were compared."""
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    if unigram.is_unigram(content):
        return "a Unigram model"
    if any(not token["special"] for token in content["added_tokens"]):
        return "added tokens that are not special"
    if content.get("normalizer") is not None:
        return "a normalizer"
    if splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space") or not splitter.get("use_regex", True):
        return "a pre-tokenizer other than GPT-2's"
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return "subword marks or ignore_merges"
    return None


def _calls(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts in groups of bounded size, one group for each call."""
    begin = characters = 0
    for end, text in enumerate(texts):
        if characters + len(text) > _CALL_CHARACTERS and end > begin:
            yield texts[begin:end]
            begin, characters = end, 0
        characters += len(text)
    if begin < len(texts):
        yield texts[begin:]


def _safe_cut(text: str) -> int:
    """Return the last position inside a text at which cutting changes no id (see `HuggingFaceEncoder`), or 0."""
    for position in range(len(text) - 1, 0, -1):
        if text[position] == " " and not text[position - 1].isspace():
            return position
    return 0
