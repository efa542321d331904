"""What is in folders and what globs match: links are followed, loops end, and what cannot be read is an error."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from preprocessing.reading.streams import readable

FILE, FOLDER, OTHER = "file", "folder", "neither a file nor a folder"


def kind_of(path: str) -> str | None:
    """`FILE`, `FOLDER` or `OTHER` (a pipe, a device), of what a link points to; None where it points to nothing.

    Raises:
        UserError: it cannot be looked at.
    """
    with readable(path):
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
    return FILE if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else OTHER


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def tree(folder: str, again: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `folder` down that is not hidden, once, with its sorted names.

    Links to folders are followed after all else, so that a file has its own path rather than a link's.

    Args:
        again: gets the links that lead to a folder which was entered already.

    Raises:
        UserError: a folder cannot be read.
    """
    entered: set[str] = set()
    folders, links = [folder], list[str]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(current)
        if real in entered:
            if again is not None:
                again.append(current)
            continue
        entered.add(real)
        names = _names(current)
        for path in (os.path.join(current, name) for name in names if not is_hidden(name)):
            if kind_of(path) == FOLDER:
                (links if os.path.islink(path) else folders).append(path)
        yield current, names


def matches(pattern: str) -> list[str]:
    """What `glob.glob` finds, `**` included, sorted.

    Raises:
        UserError: a folder in which to look cannot be read.
    """
    parts = [part for part in pattern.split("/") if part]
    found = set(_matches("/" if pattern.startswith("/") else "", parts))
    return sorted(path for path in found if not pattern.endswith("/") or kind_of(path) == FOLDER)


def _matches(base: str, parts: Sequence[str]) -> Iterator[str]:
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for folder, _ in tree(base or "."):
            yield from _matches(folder if base else folder[2:], rest or ["*"])  # without "./"
    elif glob.has_magic(part):
        for name in _names(base):
            path = os.path.join(base, name)
            is_shown = is_hidden(part) or not is_hidden(name)
            if is_shown and fnmatchcase(name, part) and (not rest or kind_of(path) == FOLDER):
                yield from _matches(path, rest)
    else:
        path = os.path.join(base, part)
        if kind_of(path) is not None or os.path.islink(path):
            yield from _matches(path, rest)


def _names(folder: str) -> list[str]:
    with readable(folder):
        return sorted(os.listdir(folder or "."))
