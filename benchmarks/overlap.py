"""Which texts of an evaluation are near copies of something in a corpus.

Documents are much longer than such texts, so each text is compared with runs of words of the documents that are about
as long: at a grid of lengths and places, fine enough that a copy shares most of its words with one of the runs. Two
runs are near copies if the Jaccard similarity of their sets of three neighbouring words, estimated by MinHash, is at
least `NEAR_SIMILARITY`: in 14 words one may differ. Only runs most of whose three words in a row occur in some text get
a signature. Memory is that of the texts and one document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rensa import RMinHash, RMinHashLSH

SHINGLE_WORDS = 3
SHORTEST, LONGEST = 5, 64
"""Words of what is compared: a shorter text is a coincidence anywhere, and a longer one is compared in parts."""
NEAR_SIMILARITY = 0.6
KNOWN_SHARE = 0.75
"""Of the shingles of two sets of one size whose similarity is 0.6, the share that both have."""
PERMUTATIONS, BANDS, SEED = 128, 32, 1  # finds 99% of the pairs at similarity 0.6
_WORD = re.compile(r"\w+")
_WORD_BITS = 21  # three words in 63 bits


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def is_too_short(text: str) -> bool:
    """Whether a text has too few words to be compared."""
    return len(words_of(text)) < SHORTEST


def near_copies(texts: Sequence[str], documents: Iterable[str]) -> np.ndarray:
    """Which of the texts, or of their parts, are near copies of something in the documents: (texts,) bool."""
    found = np.zeros(len(texts), bool)
    owners: dict[tuple[str, ...], list[int]] = {}
    for number, text in enumerate(texts):
        for part in _parts(words_of(text)):
            owners.setdefault(part, []).append(number)
    if not owners:
        return found
    parts = list(owners)
    known, shingles = _known_shingles(parts)
    signatures = _signatures(parts)
    index = RMinHashLSH(threshold=NEAR_SIMILARITY, num_perm=PERMUTATIONS, num_bands=BANDS)
    index.insert_many(signatures)
    longest = max(map(len, parts))
    for document in documents:
        words = words_of(document)
        runs = list(dict.fromkeys(_likely_runs(words, known, shingles, longest)))
        for signature in _signatures(runs):
            for number in index.query(signature):
                if signature.jaccard(signatures[number]) >= NEAR_SIMILARITY:
                    found[owners[parts[number]]] = True
    return found


def _parts(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The words, in equal parts if there are too many of them."""
    if len(words) >= SHORTEST:
        for places in np.array_split(np.arange(len(words)), -(-len(words) // LONGEST)):
            yield tuple(words[places[0] : places[-1] + 1])


def _known_shingles(parts: Sequence[tuple[str, ...]]) -> tuple[dict[str, int], np.ndarray]:
    """The number of each word, from 1, and the codes of all shingles, sorted: (shingles,) int64."""
    known: dict[str, int] = {}
    codes = []
    for part in parts:
        numbers = np.array([known.setdefault(word, len(known) + 1) for word in part], np.int64)
        codes.append(_codes(numbers))
    if len(known) >= 1 << _WORD_BITS:
        raise ValueError(f"{len(known):,} different words are too many for codes of {_WORD_BITS} bits")
    return known, np.unique(np.concatenate(codes))


def _codes(numbers: np.ndarray) -> np.ndarray:
    """A code for each three neighbouring words, (words,) int64 to (words - 2,) int64; 0 if a word is unknown (0)."""
    first, second, third = numbers[:-2], numbers[1:-1], numbers[2:]
    codes = (first << 2 * _WORD_BITS) | (second << _WORD_BITS) | third
    codes[(first == 0) | (second == 0) | (third == 0)] = 0
    return codes


def _likely_runs(
    words: Sequence[str], known: dict[str, int], shingles: np.ndarray, longest: int
) -> Iterator[tuple[str, ...]]:
    """Runs of neighbouring words most of whose shingles some text has."""
    if len(words) < SHORTEST:
        return
    codes = _codes(np.fromiter((known.get(word, 0) for word in words), np.int64, len(words)))
    places = np.flatnonzero(codes)
    hits = np.zeros(len(codes), np.int64)
    nearest = np.searchsorted(shingles, codes[places]).clip(max=len(shingles) - 1)
    hits[places] = shingles[nearest] == codes[places]
    before = np.concatenate([[0], np.cumsum(hits)])
    length = SHORTEST
    while length <= longest + length // 8:
        in_run = length - SHINGLE_WORDS + 1
        starts = np.arange(0, len(words) - length + 1, max(1, length // 8))
        likely = starts[before[starts + in_run] - before[starts] >= KNOWN_SHARE * in_run]
        for start in likely.tolist():
            yield tuple(words[start : start + length])
        length += max(1, length // 6)


def _signatures(runs: Sequence[Sequence[str]]) -> list[RMinHash]:
    shingles = [[" ".join(run[i : i + SHINGLE_WORDS]) for i in range(len(run) - SHINGLE_WORDS + 1)] for run in runs]
    return RMinHash.from_token_sets(shingles, PERMUTATIONS, SEED)
