"""Which files a command reads: paths, folders and globs as the user wrote them, in an order that is always the same."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_roberta.errors import UserError
from preprocessing.readers import SUFFIXES
from preprocessing.tokenizer import TOKENIZER_FILES

_KINDS = " or ".join(SUFFIXES)
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Inputs:
    """The files to read, as the user wrote them, in reading order; and what was passed over."""

    files: tuple[str, ...]
    ignored: tuple[str, ...]
    repeated: tuple[str, ...]

    def notes(self) -> list[str]:
        """One line for each kind of file that was passed over."""
        kinds = [(self.ignored, f"ignored (not {_KINDS})"), (self.repeated, "read once though given more than once")]
        return [f"{what}: {_enumerate(paths)}" for paths, what in kinds if paths]


def find_inputs(arguments: Sequence[str]) -> Inputs:
    """Expand files, folders (recursively, sorted) and globs (sorted).

    Raises:
        UserError: an argument names nothing, a file of another kind, or a folder or glob without a readable file.
    """
    files: dict[str, str] = {}  # by real path, so that overlapping arguments read a file once
    ignored: list[str] = []
    repeated: list[str] = []
    for argument in arguments:
        found, other = _expand(argument)
        ignored += other
        for path in found:
            if os.path.realpath(path) in files:
                repeated.append(path)
            else:
                files[os.path.realpath(path)] = path
    return Inputs(tuple(files.values()), tuple(dict.fromkeys(ignored)), tuple(dict.fromkeys(repeated)))


def _expand(argument: str) -> tuple[list[str], list[str]]:
    """The readable files that one argument names, and the others that it holds."""
    path = Path(argument)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"cannot read {argument!r}: inputs are {_KINDS} files, convert or rename it")
        return [path.as_posix()], []
    if path.is_dir():
        found = _walk(path)
    else:
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        if not matches:
            raise UserError(f"no such file or folder: {argument!r}; give an existing path, folder or glob as --input")
        found = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
    readable = [file.as_posix() for file in dict.fromkeys(found) if _readable(file)]
    if not readable:
        raise UserError(f"{argument!r} holds no {_KINDS} file: give a folder or glob with text as --input")
    return readable, [file.as_posix() for file in found if not _readable(file)]


def _readable(path: Path) -> bool:
    # A tokenizer beside the text has a merges.txt, which is not prose.
    return path.suffix.lower() in SUFFIXES and path.name not in TOKENIZER_FILES


def _walk(folder: Path) -> list[Path]:
    """Every visible file under `folder`, sorted by its parts: independent of the file system's order."""
    files = (path for path in folder.rglob("*") if path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(visible, key=lambda path: path.parts)


def _enumerate(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED_AT_MOST} more" if len(paths) > _NAMED_AT_MOST else ""
    return ", ".join(paths[:_NAMED_AT_MOST]) + more
