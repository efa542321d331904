"""Removing repeated documents: exact copies by a 128-bit hash, near copies by MinHash.

Every unit writes, next to its shards, a table of its documents' keys: a hash of the text, and for near copies one key
for each band of a MinHash signature. When all units are done, the tables are merged range by range, which finds the
documents that resemble an earlier one in the order of the plan, and the units' shards are rewritten without them.
Which documents are kept depends only on the plan, and no process ever holds more than one range of keys.

A near copy is a document that shares a band with an earlier one and whose signature agrees with it in at least
`NEAR_SIMILARITY` of its components, an estimate of the Jaccard similarity of their sets of five neighbouring words.
It is compared with the first document of the band and with the one just before it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex
import xxhash

from ds_roberta.errors import UserError
from ds_roberta.files import save_array

DEDUP_KINDS = ("none", "exact", "near")
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"
NEAR_SIMILARITY = 0.8
BANDS, BAND_ROWS = 16, 8  # finds 95% of the pairs at similarity 0.8 and all but 0.01% of those at 0.9
SHINGLE_WORDS = 5
WORD_VERSION = 2
"""Of what counts as a word; raised when that changes."""
RANGE_ROWS = 1 << 21
"""Number of keys that one merge holds in memory: about 250 MB with everything else it needs."""

_SEED = 1
# Unlike re, regex keeps the marks of Indic scripts and of Arabic with their letters. A formula has its symbols.
_WORD = regex.compile(r"\w+|[\p{Sm}\p{Sc}\p{So}]")
_ROW = np.dtype(
    [
        *(("split", "u1"), ("part", "<u4"), ("piece", "<u4"), ("source", "<u4"), ("bytes", "<u4"), ("special", "u1")),
        ("unknown", "<u4"),
    ]
)
_PACKED_ROW = struct.Struct("<BIIIIBI")
_DROP = np.dtype([("unit", "<u4"), ("row", "<u4")])
_PAIRS_AT_ONCE = 1 << 15


def dedup_options(kind: str) -> dict[str, Any]:
    """Return the manifest's entry about deduplication: all settings that decide which documents are dropped.

    Raises:
        UserError: the library that finds near copies is missing.
    """
    if kind != "near":
        return {"dedup": kind}
    return {
        "dedup": kind,
        "near_similarity": NEAR_SIMILARITY,
        "near_bands": [BANDS, BAND_ROWS],
        "near_shingle_words": SHINGLE_WORDS,
        "near_word_version": WORD_VERSION,
        "near_algorithm": f"rensa.RMinHash {_minhash().ALGORITHM_VERSION}",
    }


@dataclass
class DocumentTable:
    """The documents of a unit, in order, with what deduplication needs to know about them."""

    kind: str

    def __post_init__(self) -> None:
        # Bytes, not objects: an input that cannot be divided may have millions of documents.
        self._rows, self._hashes, self._signatures = bytearray(), bytearray(), bytearray()
        self._sources: dict[str, int] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, in the order of their numbers."""
        return tuple(self._sources)

    def add(self, document: bytes, split: int, part: int, piece: int, source: str, special: bool, unknown: int) -> None:
        """Add a document: its text, where it went (split, and which shard of it), where it came from, whether it has
        the letters of a special token, and how many of its tokens are `<unk>`.
        """
        number = self._sources.setdefault(source, len(self._sources))
        self._rows += _PACKED_ROW.pack(split, part, piece, number, len(document), special, unknown)
        self._hashes += xxhash.xxh3_128_digest(document)
        if self.kind == "near":
            self._signatures += _signature(document.decode("utf-8")).tobytes()

    def write(self, folder: Path, unit: int) -> None:
        """Write the unit's tables.

        rows: (documents,), as `load_rows` says. keys: (tables, 3, documents) uint64: for each table the key, check and
        row, sorted by key; two documents are the same if both key and check are. signatures: (documents, places)
        uint32.
        """
        _save(folder / "rows", unit, np.frombuffer(self._rows, _ROW))
        hashes = np.frombuffer(self._hashes, ">u8").astype(np.uint64).reshape(-1, 2)
        tables = np.empty((1 + BANDS * (self.kind == "near"), 3, len(hashes)), np.uint64)
        _fill(tables[0], hashes[:, 0], hashes[:, 1])
        if self.kind == "near":
            signatures = np.frombuffer(self._signatures, "<u4").reshape(-1, BANDS * BAND_ROWS)
            _save(folder / "signatures", unit, signatures)
            for band, table in enumerate(tables[1:]):
                part = signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]
                keys = np.fromiter((xxhash.xxh3_64_intdigest(row.tobytes()) for row in part), np.uint64, len(part))
                _fill(table, keys, 0)
        _save(folder / "keys", unit, tables)


def _fill(table: np.ndarray, key: np.ndarray, check: np.ndarray | int) -> None:
    """Write key, check and row into a table, (3, documents), sorted by key."""
    table[2] = np.argsort(key, kind="stable")
    table[0] = key[table[2]]
    table[1] = check if isinstance(check, int) else check[table[2]]


def merge_count(kind: str, documents: int) -> int:
    """Return the number of merges into which the keys of this many documents are divided."""
    return (1 + BANDS * (kind == "near")) * _ranges(documents)


def merge(folder: Path, target: Path, units: int, documents: int, index: int) -> dict[str, Any]:
    """Find the documents to drop according to one range of one table, and write them under `target`, sorted.

    The rows of `drops/NNNNN.npy` are (unit, row) of documents that resemble an earlier one.
    """
    table, part = divmod(index, _ranges(documents))
    low, high = (place * 2**64 // _ranges(documents) for place in (part, part + 1))
    found = []
    for unit in range(units):
        keys = _load(folder / "keys", unit)[table]
        begin = np.searchsorted(keys[0], np.uint64(low))
        end = np.searchsorted(keys[0], np.uint64(high)) if high < 2**64 else keys.shape[1]
        found.append(np.vstack([keys[:, begin:end], np.full((1, end - begin), unit, np.uint64)]))
    key, check, row, unit_of = np.concatenate(found, axis=1)
    order = np.lexsort((check, key))  # stable: the same keys stay in the order of the plan
    key, check, row, unit_of = key[order], check[order], row[order], unit_of[order]
    again = np.flatnonzero((key[1:] == key[:-1]) & (check[1:] == check[:-1])) + 1
    if table > 0:
        opens = np.ones(len(key), bool)
        opens[again] = False
        first = np.maximum.accumulate(np.where(opens, np.arange(len(key)), 0))
        places = np.stack([unit_of, row], axis=1).astype(np.int64)
        close = [
            (_signatures(folder, places[chunk]) == _signatures(folder, places[other])).mean(axis=1) >= NEAR_SIMILARITY
            for chunk in np.array_split(again, len(again) // _PAIRS_AT_ONCE + 1)
            for other in (first[chunk], chunk - 1)
        ]
        again = again[np.concatenate(close[::2]) | np.concatenate(close[1::2])]
    drops = np.empty(len(again), _DROP)
    drops["unit"], drops["row"] = unit_of[again], row[again]
    _save(target / "drops", index, np.sort(drops, order=["unit", "row"]))
    return {"drops": len(drops)}


def dropped_rows(folder: Path, kind: str, documents: int, unit: int) -> dict[str, np.ndarray]:
    """Return the rows of a unit to drop, by reason and ascending; an exact copy does not also count as a near one."""
    rows = []
    for index in range(merge_count(kind, documents)):
        drops = _load(folder / "drops", index)
        begin, end = np.searchsorted(np.ascontiguousarray(drops["unit"]), [unit, unit + 1])
        rows.append(drops["row"][begin:end])
    exact = np.unique(np.concatenate(rows[: _ranges(documents)]))
    near = np.unique(np.concatenate(rows))
    return {DUPLICATE: exact, NEAR_DUPLICATE: np.setdiff1d(near, exact)}


def load_rows(folder: Path, unit: int) -> np.ndarray:
    """Load the table of a unit's documents: (documents,) records of `_ROW`."""
    return _load(folder / "rows", unit)


def _ranges(documents: int) -> int:
    return documents // RANGE_ROWS + 1


def _minhash() -> Any:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise UserError(
            f"--dedup near needs the library rensa, which cannot be imported ({error}): pip install 'ds_roberta[dedup]'"
        ) from error
    return RMinHash


def _signature(text: str) -> np.ndarray:
    words = _WORD.findall(text.lower()) or [text]
    shingles = [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]
    sketch = _minhash()(num_perm=BANDS * BAND_ROWS, seed=_SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), np.uint32)


def _signatures(folder: Path, places: np.ndarray) -> np.ndarray:
    """Load the signatures, (documents, components) uint32, of documents given as (unit, row)."""
    signatures = np.empty((len(places), BANDS * BAND_ROWS), np.uint32)
    for unit in np.unique(places[:, 0]):
        here = places[:, 0] == unit
        signatures[here] = _load(folder / "signatures", unit)[places[here, 1]]
    return signatures


def _save(folder: Path, index: int, array: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{index:05d}.npy").open("wb") as file:
        save_array(file, array)


def _load(folder: Path, index: int) -> np.ndarray:
    return np.load(folder / f"{index:05d}.npy", mmap_mode="r")
