"""Decide which documents are kept, and count the others: read = kept + rejected by reason, per input file.

A document is normalised and kept, unless it is too short or too long or the user's filter rejects it.

A document is *bad* if the input is broken (its bytes, its syntax, a missing column); documents that the user's options
reject are not bad. Bad documents are skipped unless they are more than a fraction of all. Where a *file* is damaged, an
unknown number of documents is lost: that ends a job unless the user allows it.
"""

from __future__ import annotations

import importlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import add
from pathlib import Path
from typing import Any

from ds_roberta.data.manifest import InputInfo
from ds_roberta.errors import UserError
from ds_roberta.files import file_checksum, json_fingerprint
from ds_roberta.inputs.pieces import Damage, Piece, Reject
from ds_roberta.inputs.places import DAMAGE_REMEDIES as DAMAGE_REMEDIES_OF_FILES
from ds_roberta.inputs.places import REMEDIES, counted_in, located
from ds_roberta.inputs.streams import TEXT, known_format
from preprocessing.reading.documents import Document, ReadOptions
from preprocessing.reading.readers import read_documents

KEPT = "kept"
MAX_BAD_FRACTION = 0.01
PLACES_AT_MOST = 5
_FILES_AT_MOST = 20
MIN_DOCUMENTS_TO_STOP = 10_000
"""A job stops only after this many documents: fewer say little about the whole, and a small job ends soon anyway."""

DAMAGE_REMEDIES = {
    **DAMAGE_REMEDIES_OF_FILES,
    "unclosed_quote": "close the quote, or give a higher --max_characters where a row is that long",
}
"""What a user can do about each kind of damage."""

Filter = Callable[[str, dict[str, Any]], Any]


@dataclass
class Account:
    """Documents of one input file, or of a part of it, ready for JSON.

    Attributes:
        places: where the first bad documents are, and the first one of each reason.
        damage: the first places after which documents were lost.
        too_long_bytes: total bytes of the documents rejected as too long.
        columns: for `id_column` and `source_column`, if the options have them, the documents without a value there and
            those with one.
    """

    counts: Counter[str] = field(default_factory=Counter)
    places: list[dict[str, Any]] = field(default_factory=list)
    damage: list[dict[str, Any]] = field(default_factory=list)
    too_long_bytes: int = 0
    columns: dict[str, list[int]] = field(default_factory=dict)

    def reject(self, path: str, reject: Reject) -> None:
        self.counts[reject.reason] += reject.documents
        self.too_long_bytes += reject.bytes
        if reject.reason in REMEDIES:
            self._add_place(_place(path, reject))

    def damaged(self, path: str, damage: Damage) -> None:
        if damage.documents:
            self.counts[damage.reason] += damage.documents
        self.damage = [*self.damage, _place(path, damage)][:PLACES_AT_MOST]

    def add(self, other: Account) -> None:
        """Add the account of the next part of the file."""
        self.counts += other.counts
        for place in other.places:
            self._add_place(place)
        self.damage = [*self.damage, *other.damage][:PLACES_AT_MOST]
        self.too_long_bytes += other.too_long_bytes
        for option, counts in other.columns.items():
            self.columns[option] = list(map(add, self.columns.get(option, [0, 0]), counts))

    def count_value(self, option: str, value: str | None) -> None:
        """Count a document by whether it has a value in the column of an option."""
        self.columns.setdefault(option, [0, 0])[bool(value)] += 1

    def _add_place(self, place: dict[str, Any]) -> None:
        if len(self.places) < PLACES_AT_MOST or place["reason"] not in {known["reason"] for known in self.places}:
            self.places.append(place)

    @property
    def bad(self) -> int:
        return sum(count for reason, count in self.counts.items() if reason in REMEDIES)

    @property
    def without_value(self) -> dict[str, int]:
        """By option, the number of documents without a value in its column, unless all have one."""
        return {option: without for option, (without, _) in self.columns.items() if without}


def _place(path: str, item: Reject | Damage) -> dict[str, Any]:
    return {"reason": item.reason, counted_in(path): item.offset, "detail": item.detail}


def kept_documents(piece: Piece, options: ReadOptions, account: Account) -> Iterator[Document]:
    """The documents of a piece that are kept; `account` counts what is kept, rejected (by reason), or damaged.

    Raises:
        UserError: the file cannot be read, or the filter fails.
    """
    for item in read_documents(piece, options):
        if isinstance(item, Document):
            if options.id_column is not None:
                account.count_value("id_column", item.id)
            if options.source_column is not None:
                account.count_value("source_column", item.source)
            item = kept_or_rejected(item, piece, options)
        if isinstance(item, Reject):
            account.reject(piece.path, item)
        elif isinstance(item, Damage):
            account.damaged(piece.path, item)
        else:
            account.counts[KEPT] += 1
            yield item


def kept_or_rejected(document: Document, piece: Piece, options: ReadOptions) -> Document | Reject:
    """Return the normalised document if it is kept, otherwise the reason for rejecting it.

    Raises:
        UserError: the filter fails.
    """
    text = document.text
    if options.newlines == "unicode":
        text = "\n".join(text.splitlines())
    if options.normalization != "none" and not text.isascii():
        text = unicodedata.normalize(options.normalization, text)  # type: ignore[arg-type]
    length = len(text.strip())
    if not length:
        return Reject("empty", document.offset)
    if length < options.min_characters:
        return Reject("too_short", document.offset)
    if length > options.max_characters:
        return Reject("too_long", document.offset, bytes=len(text.encode("utf-8")))
    source = document.source or piece.source or None
    if text is not document.text or source != document.source:
        document = Document(text, document.offset, document.id, source)
    if options.filter is not None:
        reason = _rejected_by(options.filter, document, piece.path)
        if reason is not None:
            return Reject(reason, document.offset)
    return document


def _rejected_by(name: str, document: Document, path: str) -> str | None:
    """Return why the user's filter rejects a document, or None if it keeps it."""
    try:
        answer = load_filter(name)(document.text, {"id": document.id, "source": document.source})
    except Exception as error:  # anything may go wrong in a user's function
        raise UserError(
            f"--filter {name} failed in {path!r} at {counted_in(path)} {document.offset}: {error!r}; fix the function"
        ) from error
    if isinstance(answer, str) and answer:
        return f"filter:{answer}"
    if answer in (True, False) and not isinstance(answer, str):
        return None if answer else "filter"
    raise UserError(f"--filter {name} returned {answer!r}: return True to keep a document, False or a reason to reject")


def filter_checksum(name: str | None) -> str | None:
    """Checksum of the files with the user's filter, so that a job notices when the function may have changed: the one
    that is named, and the one that it was imported from.

    Raises:
        UserError: there is no such module or function, or a file has changed since this process imported it.
    """
    if name is None:
        return None
    checksums = {file: file_checksum(Path(file)) for file in _filter_files(name, load_filter(name))}
    for file, checksum in checksums.items():
        if checksum != _checksum_when_imported(file):
            raise UserError(
                f"{file!r} has changed since this process imported --filter {name}, and Python would still call the "
                "old function: restart the process (in a notebook, the kernel)"
            )
    return json_fingerprint(sorted(checksums.values()))


def _filter_files(name: str, function: Filter) -> set[str]:
    modules = {name.partition(":")[0], getattr(function, "__module__", None)}
    files = {getattr(sys.modules.get(module or ""), "__file__", None) for module in modules}
    return {file for file in files if file is not None}


@lru_cache
def _checksum_when_imported(file: str) -> str:
    """The checksum that a file had when `load_filter` first imported a function from it."""
    return file_checksum(Path(file))


@lru_cache
def load_filter(name: str) -> Filter:
    """Import `module:function`, also from the working folder.

    Raises:
        UserError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"{function!r} is not a function")
    except Exception as error:  # importing a module can fail in any way
        raise UserError(
            f"cannot load --filter {name!r}: {error!r}; write module:function of an importable file"
        ) from error
    for file in _filter_files(name, found):
        _checksum_when_imported(file)
    return found


def refuse_damage(accounts: Mapping[str, Account]) -> None:
    """Raise a `UserError` that names the first damaged file, where it is damaged, and how much of it was read."""
    for path, account in accounts.items():
        for place in account.damage:
            raise UserError(
                f"{located(path, place)}; {DAMAGE_REMEDIES[place['reason']]}, or keep what can be read of such "
                "files with --allow_damaged_files"
            )


def total_accounts(files: Iterable[str], parts: Iterable[dict[str, Account]]) -> dict[str, Account]:
    """Combine the accounts of parts, given in the plan's order, into one account per file."""
    totals = {path: Account() for path in files}
    for part in parts:
        for path, account in part.items():
            totals[path].add(account)
    return totals


def input_infos(accounts: dict[str, Account], sources: Mapping[str, str]) -> tuple[InputInfo, ...]:
    """The accounts as they are in the manifest."""
    return tuple(
        InputInfo(
            path,
            account.counts.total(),
            account.counts[KEPT],
            {reason: count for reason, count in sorted(account.counts.items()) if reason != KEPT},
            sources.get(path, ""),
            tuple(account.places),
            tuple(account.damage),
            account.too_long_bytes,
            account.without_value,
        )
        for path, account in accounts.items()
    )


class BadDocuments:
    """Stops a job that has too many bad documents, or whose options name a column in which no document has a value.

    It checks after every unit, in the plan's order, so that the outcome does not depend on which worker did what: after
    `MIN_DOCUMENTS_TO_STOP` documents, and at the end. Columns are checked at the end, because inputs that have them may
    follow others that do not; a note says it sooner.
    """

    def __init__(self, max_fraction: float, options: ReadOptions):
        self._max_fraction, self._options = max_fraction, options
        self._accounts, self._total = dict[str, Account](), Account()
        self._noted: set[str] = set()

    def add(self, part: dict[str, Account]) -> None:
        """Add the next unit of the plan. Raises `UserError` if too many documents are bad already."""
        for path, account in part.items():
            self._total.add(account)
            if account.bad:
                self._accounts.setdefault(path, Account()).add(account)
        if (read := self._total.counts.total()) >= MIN_DOCUMENTS_TO_STOP:
            self.check()
            for column in self._empty_columns() - self._noted:
                self._noted.add(column)
                print(
                    f"note: none of the first {read} documents has a value in {column}; the command fails at its end "
                    "if no document has",
                    flush=True,
                )

    def check_columns(self) -> None:
        """Raise a `UserError` that names the columns in which no document has a value."""
        if columns := self._empty_columns():
            raise UserError(
                f"no document has a value in {' or '.join(sorted(columns))}: write the column's name as in the input, "
                "or leave it out"
            )

    def _empty_columns(self) -> set[str]:
        return {
            f"--{option} {getattr(self._options, option)!r}"
            for option, (_, with_value) in self._total.columns.items()
            if not with_value
        }

    def check(self) -> None:
        """Raise a `UserError` that names the worst file, and its first document with the most common reason."""
        read, bad = self._total.counts.total(), self._total.bad
        if bad > self._max_fraction * read:
            worst = max(self._accounts, key=lambda path: self._accounts[path].bad)  # the first of several
            account = self._accounts[worst]
            reason = max(REMEDIES, key=lambda reason: account.counts[reason])
            place = next(place for place in account.places if place["reason"] == reason)
            raise UserError(
                f"{bad} of {read} documents are bad, more than --max_bad_fraction {self._max_fraction}; "
                f"most ({account.bad}) in {located(worst, place)}; {REMEDIES[place['reason']]}"
            )


def summary_lines(infos: Sequence[InputInfo]) -> list[str]:
    """Format the closing table: totals, then files (if there are many, only those with rejects), then bad documents."""
    read, kept = (sum(getattr(info, f"documents_{what}") for info in infos) for what in ("read", "kept"))
    rejected: Counter[str] = sum((Counter(info.rejected) for info in infos), Counter())
    lines = [f"documents   {_equation(read, kept, rejected)}, from {len(infos)} files"]
    shown = infos if len(infos) <= _FILES_AT_MOST else [info for info in infos if info.rejected][:_FILES_AT_MOST]
    for info in shown:
        source = f" [{info.source}]" if info.source else ""
        lines.append(f"  {info.path}{source}: {_equation(info.documents_read, info.documents_kept, info.rejected)}")
    if len(shown) < len(infos):
        lines.append(f"  … and {len(infos) - len(shown)} more files, all of them in the manifest")
    for info in infos:
        lines += [f"damaged     {located(info.path, place)}" for place in info.damage]
    if too_long := [info for info in infos if info.too_long_bytes]:
        lines += _too_long_lines(too_long, rejected["too_long"])
    lines += without_value_lines(info.without_value for info in infos)
    places = [(info.path, place) for info in infos for place in info.places]
    lines += [f"bad         {located(path, place)}" for path, place in places[:PLACES_AT_MOST]]
    if len(places) > PLACES_AT_MOST:
        lines.append(f"            … the first {PLACES_AT_MOST} of each file are in the manifest")
    return lines


def without_value_lines(counts: Iterable[Mapping[str, int]]) -> list[str]:
    """Say how many documents have no value in the columns of options."""
    total: Counter[str] = sum(map(Counter, counts), Counter())
    return [f"without     {count} documents have no value in the column of --{name}" for name, count in total.items()]


def _too_long_lines(infos: Sequence[InputInfo], documents: int) -> list[str]:
    worst = max(infos, key=lambda info: info.too_long_bytes)
    more = f", most in {worst.path!r} ({worst.too_long_bytes} bytes)" if len(infos) > 1 else f" in {worst.path!r}"
    lines = [
        f"too_long    {documents} documents, {sum(info.too_long_bytes for info in infos)} bytes of text{more}: "
        "--max_characters sets the limit"
    ]
    if known_format(worst.path).kind == TEXT:
        lines.append("            if no blank lines separate documents, --documents line makes every line a document")
    return lines


def _equation(read: int, kept: int, rejected: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "0"
    return f"{read} read = {kept} kept + {reasons} rejected"
