"""Which documents are kept: normalisation, bounds of length, and the user's own filter."""

from __future__ import annotations

import importlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import file_checksum
from preprocessing.reading.accounts import KEPT, Account
from preprocessing.reading.documents import Damage, Document, Piece, ReadOptions, Reject
from preprocessing.reading.readers import read_documents

Filter = Callable[[str, dict[str, Any]], Any]


def accepted_documents(piece: Piece, options: ReadOptions, account: Account) -> Iterator[Document]:
    """The documents of a piece that are kept; `account` says what was kept, rejected (by reason), or is damaged.

    Raises:
        UserError: the file cannot be read, or the filter fails.
    """
    for item in read_documents(piece, options):
        if isinstance(item, Document):
            item = judge(item, piece, options)
        if isinstance(item, Reject):
            account.reject(piece.path, item)
        elif isinstance(item, Damage):
            account.damaged(piece.path, item)
        else:
            account.counts[KEPT] += 1
            yield item


def judge(document: Document, piece: Piece, options: ReadOptions) -> Document | Reject:
    """The document as it is kept, normalised, or why it is not.

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
    """The reason for which the user's filter rejects a document, None where it keeps it."""
    try:
        answer = load_filter(name)(document.text, {"id": document.id, "source": document.source})
    except Exception as error:  # anything may go wrong in a user's function
        raise UserError(
            f"--filter {name} failed at {path!r}, place {document.offset}: {error!r}; mend the function"
        ) from error
    if isinstance(answer, str) and answer:
        return f"filter:{answer}"
    if answer in (True, False) and not isinstance(answer, str):
        return None if answer else "filter"
    raise UserError(f"--filter {name} returned {answer!r}: return True to keep a document, False or a reason to reject")


def filter_checksum(name: str | None) -> str | None:
    """Of the file that holds the user's filter, so that a job notices when the function may have changed."""
    if name is None:
        return None
    file = sys.modules[load_filter(name).__module__].__file__
    return None if file is None else file_checksum(Path(file))


@lru_cache
def load_filter(name: str) -> Filter:
    """Import `module:function`, looking in the working folder too.

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
    except Exception as error:  # a module may fail in any way while it is imported
        raise UserError(
            f"cannot load --filter {name!r}: {error!r}; give module:function of an importable file"
        ) from error
    return found
