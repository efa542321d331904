"""Named sources mixed by weights: an order of places in which each source has its share, whatever its size.

The places are dealt to the sources one after the other, from the heaviest to the lightest: of the first n places that
are left, a source of weight w gets round(n * w / r), where r is the sum of its own and all later weights, and the rest
go to the next. As n grows by one, each count grows by one or not at all, so every place belongs to one source, and its
number within the source is the count before it. In every prefix of the places each of K sources is within
1 + ln(K) / 2 sequences of its share, so every batch has the same mixture.

Each source has its own `SampleOrder` for its numbers: its epochs follow one another, each with a new permutation, and
do not depend on the other sources. Everything is integer arithmetic on the place, so there is no state and no drift.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import TypeVar

import numpy as np

from ds_roberta.data.hashing import derive_key
from ds_roberta.data.manifest import TRAIN_SPLIT, Manifest
from ds_roberta.data.order import MAX_LANES, SampleOrder
from ds_roberta.data.packing import PackedSplit
from ds_roberta.errors import UserError, unknown_key_message

MAX_TOTAL_WEIGHT = 1 << 30
"""The largest sum of weights: twice its square fits int64, so the shares of any place are exact."""
_WEIGHT = re.compile(r"-?(\d+\.?\d*|\.\d+)", re.ASCII)
_Places = TypeVar("_Places", int, np.ndarray)


def parse_source_weights(text: str | None, manifest: Manifest) -> dict[str, int] | None:
    """The weights in `NAME=WEIGHT,NAME=WEIGHT,…` as the smallest whole numbers of the same proportions, by name.

    None, which means no weights, stays None. A source's name may contain `,` and `=`.

    Raises:
        UserError: the text has another form; a name is not in the data, occurs twice, or is missing; a weight is
            negative or has too many digits; all are zero; a source with a positive weight has no training sequence.
    """
    if text is None:
        return None
    given: dict[str, Fraction] = {}
    for entry, name, weight in _entries(text, _known_sources(manifest)):
        if not name or not _WEIGHT.fullmatch(weight):
            raise UserError(
                f"--source_weights {text!r}: {entry!r} is not NAME=WEIGHT with a number; write it like wiki=2,books=1"
            )
        if name in given:
            raise UserError(f"--source_weights {text!r} names {name!r} twice: give each source one weight")
        given[name] = Fraction(weight)
        if given[name] < 0:
            raise UserError(f"--source_weights {text!r}: the weight of {name!r} is negative; 0 leaves a source out")
    _check_names(given, manifest)
    if not any(given.values()):
        raise UserError(f"--source_weights {text!r}: all weights are 0; give at least one source a positive weight")
    multiple = lcm(*(weight.denominator for weight in given.values()))
    whole = {name: int(weight * multiple) for name, weight in sorted(given.items())}
    divisor = gcd(*whole.values())
    weights = {name: weight // divisor for name, weight in whole.items()}
    if sum(weights.values()) > MAX_TOTAL_WEIGHT:
        raise UserError(
            f"--source_weights {text!r}: as whole numbers they add up to {sum(weights.values())}, but shares are "
            f"exact only up to {MAX_TOTAL_WEIGHT}; round them to fewer digits"
        )
    return weights


def _entries(text: str, known: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each text between commas, its name and its weight; the longest known name is tried first."""
    names = "|".join([*map(re.escape, sorted(known, key=len, reverse=True)), "[^,]*"])
    pattern = re.compile(rf"({names})=([^,=]*)(,|\Z)")
    place, more = 0, True
    while more:
        match = pattern.match(text, place)
        if match is None:
            yield text[place:].split(",")[0], "", ""
            return
        yield f"{match[1]}={match[2]}", match[1], match[2]
        place, more = match.end(), bool(match[3])


def _known_sources(manifest: Manifest) -> list[str]:
    return sorted({source for split in manifest.splits for source in manifest.sources(split)})


def shown_source(name: str) -> str:
    """A source's name in a line of text: quoted if it has characters that end a name there."""
    return name if name.isprintable() and not set(name) & set(",=") else repr(name)


def _check_names(given: Mapping[str, Fraction], manifest: Manifest) -> None:
    train = manifest.sources(TRAIN_SPLIT)
    known = _known_sources(manifest)
    unnamed = sum(not shard.source for shard in manifest.splits.get(TRAIN_SPLIT, ()))
    listed = f"the data's sources are {', '.join(map(shown_source, known))}"
    if unnamed:
        raise UserError(
            f"--source_weights needs a source for every document, but {unnamed} training shards have none"
            f"{f' ({listed})' if known else ''}: prepare the data with --input NAME=PATH for each, or --source_column"
        )
    for name, weight in given.items():
        if name not in known:
            raise UserError(f"--source_weights: {unknown_key_message('source', name, known)}; {listed}")
        if weight and name not in train:
            raise UserError(f"--source_weights: {name!r} has no training sequence: give it weight 0; {listed}")
    missing = [name for name in train if name not in given]
    if missing:
        raise UserError(
            f"--source_weights does not name {', '.join(map(shown_source, missing))}: give every source a weight, "
            f"0 to leave it out; {listed}"
        )


def sample_order(packed: PackedSplit, source_weights: Mapping[str, int] | None, seed: int) -> SampleOrder:
    """The order of a run's sequences: sources mixed by weights, or, without weights, all sequences equally often."""
    if source_weights is None:
        return SampleOrder(len(packed), seed)
    return MixedOrder(packed.source_ranges(), source_weights, seed)


class _Source:
    """A source with a positive weight.

    Attributes:
        order: the order of its own sequences, which are numbered from 0 across its shards.
        first: (shards,) int64, the first of its own numbers in each of its shards.
        shift: (shards,) int64, what to add to the source's number of a sequence to get the split's.
    """

    def __init__(self, name: str, weight: int, ranges: np.ndarray, seed: int):
        ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
        self.name, self.weight = name, weight
        self.order = SampleOrder(int(ends[-1]), derive_key("source", seed, name))
        self.first = np.append(0, ends[:-1])
        self.shift = ranges[:, 0] - self.first

    def sequences(self, numbers: np.ndarray) -> np.ndarray:
        """The split's sequences at places of this source's own stream: (places,) int64."""
        own = self.order.sequences(numbers)
        return own + self.shift[np.searchsorted(self.first, own, side="right") - 1]


class MixedOrder(SampleOrder):
    """The `SampleOrder` of a packed split with weighted sources.

    Args:
        ranges: for each source, the bounds of its runs of sequences in the split, not all empty: (runs, 2) int64.
        weights: for each source, a whole number; they add up to at most `MAX_TOTAL_WEIGHT`. At least one is positive,
            and sources with a positive weight have ranges.
        seed: the run's seed.
    """

    def __init__(self, ranges: Mapping[str, np.ndarray], weights: Mapping[str, int], seed: int):
        drawn = sorted((-weight, name) for name, weight in weights.items() if weight)
        self._sources = [_Source(name, -weight, ranges[name], seed) for weight, name in drawn]
        self._total_weight = -sum(weight for weight, _ in drawn)
        super().__init__(sum(source.order.size for source in self._sources), seed)

    def sequences(self, places: np.ndarray) -> np.ndarray:
        return self._of_sources(places, _Source.sequences)

    def epochs(self, places: np.ndarray) -> np.ndarray:
        """How often the sequence at each place came before, which differs by source: int64, of the same shape."""
        return self._of_sources(places, lambda source, own: source.order.epochs(own))

    def _of_sources(self, places: np.ndarray, find: Callable[[_Source, np.ndarray], np.ndarray]) -> np.ndarray:
        numbers = np.asarray(places, dtype=np.int64)
        result = np.empty_like(numbers)
        for source, chosen, own in self._dealt(numbers):
            result[chosen] = find(source, own)
        return result

    def lane_order(self, places: np.ndarray) -> np.ndarray:
        """The places of one batch, sorted by lane within their source, with the sources' lanes interleaved.

        Consecutive parts of the result have about the batch's mixture. From batch to batch, each part takes the same
        lanes of every source, except a few at its borders, because a source's part of a batch is not a multiple of its
        lanes: a block is read by 1.2 of 8 processes on average, 2.3 of 64.
        """
        lanes = np.empty_like(places)
        for source, chosen, own in self._dealt(places):
            order = source.order
            lanes[chosen] = own % order.size % order.lanes * MAX_LANES // order.lanes
        return places[np.argsort(lanes, kind="stable")]

    def summary(self, places: int) -> str:
        """Describe what the first `places` places draw, in one line: each source's share, sequences and epochs."""
        parts, left, rest = [], places, self._total_weight
        for source in self._sources:
            drawn = _share(left, source.weight, rest)
            size = source.order.size
            parts.append(
                f"{source.name} {source.weight / self._total_weight:.2%}, {drawn:,} of {size:,} sequences "
                f"({drawn / size:.2f} epochs)"
            )
            left, rest = left - drawn, rest - source.weight
        return "; ".join(parts)

    def _dealt(self, places: np.ndarray) -> Iterator[tuple[_Source, tuple[np.ndarray, ...], np.ndarray]]:
        """For each source, which places belong to it, as an index into `places`, and their numbers in the source."""
        left, numbers, rest = np.arange(places.size), places.ravel(), self._total_weight
        for source in self._sources:
            before = _share(numbers, source.weight, rest)
            taken = _share(numbers + 1, source.weight, rest) > before
            yield source, np.unravel_index(left[taken], places.shape), before[taken]
            left, numbers, rest = left[~taken], (numbers - before)[~taken], rest - source.weight


def _share(places: _Places, weight: int, rest: int) -> _Places:
    """round(places * weight / rest), halves rounded up, without a product larger than `places` or 2 * rest**2."""
    return places // rest * weight + (2 * (places % rest) * weight + rest) // (2 * rest)
