"""Find the files that a command reads from paths, folders, globs, URLs and data sets, in a fixed order.

Links are followed, loops end, and what cannot be read is an error.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ds_roberta.errors import UserError
from ds_roberta.files import TOKENIZER_FILES
from ds_roberta.inputs.streams import READABLE, file_system, format_of, is_url, readable

FILE, FOLDER, OTHER = "file", "folder", "neither a file nor a folder"
_NAMED_AT_MOST = 5
_NAMED_SOURCE = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
HUB_DATASET = re.compile(r"hf://datasets/([^/@?]+(?:/[^/@?]+)?)(?:@(refs/(?:convert/\w+|pr/\d+)|[^/?]+))?(?:\?(.*))?")
SAVED_SPLITS, _STATE, _INFO, _CACHE = "dataset_dict.json", "state.json", "dataset_info.json", "cache-*.arrow"
"""What `datasets` writes into the folder of a dictionary of splits, of a data set that it saves, of any data set, and
later, as caches, next to a data set's files."""
_LOCAL_URLS = ("file://", "local://")
IGNORED = f"ignored (not {READABLE})"
_HIDDEN = "ignored (hidden)"
_OF_CACHES = "ignored (caches of datasets)"
_UNNAMED = "ignored (not named by the saved data set)"
_OF_TOKENIZERS = "ignored (files of tokenizers)"
_BROKEN = "ignored (broken links)"
_OTHER = "ignored (neither files nor folders)"
REPEATED = "read once, although given or linked more than once"
_PassedOver = dict[str, list[str]]


@dataclass(frozen=True)
class Inputs:
    """The files to read, as the user wrote them and in reading order; their sources; what was skipped, by reason."""

    files: tuple[str, ...]
    passed_over: dict[str, tuple[str, ...]]
    sources: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """One line for each kind of file that was skipped."""
        return [f"{why}: {_enumerate(paths)}" for why, paths in self.passed_over.items()]


def find_inputs(arguments: Sequence[str]) -> Inputs:
    """Expand files, folders (recursively, sorted, through links), globs (sorted), fsspec URLs, and data sets.

    `NAME=PATH` gives the files of PATH the source NAME. A folder that `datasets` saved, and `hf://datasets/OWNER/NAME`
    (`@REVISION`, `?config=CONFIG&split=SPLIT`) stand for the files that the `datasets` library finds in them.

    Raises:
        UserError: an argument names nothing, an unsupported file, or a folder or glob without a readable file; a folder
            cannot be read, or a link in one is broken and has the name of a text file.
    """
    files: dict[str, str] = {}  # by real path, so that overlapping arguments read a file once
    passed_over: _PassedOver = defaultdict(list)
    sources: dict[str, str] = {}
    for argument in arguments:
        source, path = _split_source(argument)
        for file in _expand(path, passed_over):
            _check_name(file)
            identity = _whole_url(file) if is_url(file) else os.path.realpath(file)
            if identity in files:
                passed_over[REPEATED].append(file)
            else:
                files[identity] = file
                if source:
                    sources[file] = source
    return Inputs(
        tuple(files.values()), {why: tuple(dict.fromkeys(paths)) for why, paths in passed_over.items()}, sources
    )


def _split_source(argument: str) -> tuple[str, str]:
    match = _NAMED_SOURCE.fullmatch(argument)
    if match is None or os.path.exists(argument) or glob.glob(argument):  # such as year=2024/part.parquet
        return "", argument
    return match[1], match[2]


def _expand(argument: str, passed_over: _PassedOver) -> list[str]:
    """Return the readable files of one argument."""
    hub = HUB_DATASET.fullmatch(argument)
    if hub:
        return _readable_of(dataset_files(hub[1], hub[2], hub[3] or ""), argument, passed_over)
    if argument.startswith(_LOCAL_URLS):
        argument = argument.partition("://")[2]
    if is_url(argument):
        return _expand_url(argument, passed_over)
    kind = kind_of(argument)
    if kind == FOLDER:
        found = _files_of_folder(Path(argument).as_posix(), passed_over)
    elif kind is not None:
        return _single(Path(argument).as_posix(), kind)
    else:
        matched = matches(argument) if glob.has_magic(argument) else []
        if not matched:
            what = "a broken link" if os.path.islink(argument) else "no such file or folder"
            raise UserError(
                f"{what}: {argument!r}; choose an existing path, folder, glob or URL as --input "
                "(for a data set of the hub write hf://datasets/OWNER/NAME)"
            )
        found = [file for match in matched for file in _files_at(Path(match).as_posix(), passed_over)]
    return _readable_of(found, argument, passed_over)


def _expand_url(url: str, passed_over: _PassedOver) -> list[str]:
    system, name = file_system(url)
    with readable(url):
        if glob.has_magic(name):
            found = system.glob(name)
        elif system.isdir(name):
            found = _visible(name, system.find(name), passed_over)
        elif system.isfile(name):
            return _single(url, FILE)
        else:
            raise UserError(f"no such file or folder: {url!r}; choose an existing path, folder, glob or URL as --input")
    return _readable_of([system.unstrip_protocol(file) for file in sorted(found)], url, passed_over)


def _whole_url(url: str) -> str:
    """A URL as its file system writes it, so that the same file has the same one."""
    system, name = file_system(url)
    return str(system.unstrip_protocol(name))


def _visible(folder: str, files: Sequence[str], passed_over: _PassedOver) -> list[str]:
    """The files of a remote folder that are not hidden, nor in a hidden folder."""
    hidden = {file for file in files if any(part.startswith(".") for part in file.removeprefix(folder).split("/"))}
    if hidden:
        passed_over[_HIDDEN] += sorted(hidden)
    return [file for file in files if file not in hidden]


def dataset_files(name: str, revision: str | None, query: str) -> list[str]:
    """Return the files of one split of a data set, as the `datasets` library resolves its name; nothing is copied.

    Args:
        query: `config=CONFIG&split=SPLIT`, either or both; the default split is `train`.

    Raises:
        UserError: the library does not find the data set, its config or the split, or reading it requires running code.
    """
    import datasets

    asked = asked_of_hub(name, query)
    split = asked.get("split", "train")
    try:
        files = datasets.load_dataset_builder(name, asked.get("config"), revision=revision).config.data_files or {}
    except Exception as error:  # the library and the network have many
        raise UserError(
            f"cannot find the data set {name!r} ({' '.join(str(error).split())[:300]}): check its name and the network"
        ) from error
    if split not in files:
        raise UserError(
            f"the data set {name!r} has no split {split!r}, only {', '.join(map(str, files)) or 'none'}: "
            f"choose one with hf://datasets/{name}?split=SPLIT"
        )
    return [str(file) for file in files[split]]


def asked_of_hub(name: str, query: str) -> dict[str, str]:
    """`config` and `split` of what follows the `?` of a data set. Raises `UserError` if there is anything else."""
    asked = dict(parse_qsl(query))
    if asked.keys() - {"config", "split"}:
        raise UserError(f"{query!r} after the data set {name!r}: only config=CONFIG and split=SPLIT are known")
    return asked


def _single(path: str, kind: str) -> list[str]:
    if kind != FILE:
        raise UserError(f"cannot read {path!r}: it is {kind}; choose a text file as --input")
    if format_of(path) is None:
        raise UserError(f"cannot read {path!r}: inputs are {READABLE} files, convert or rename it")
    return [path]


def _readable_of(found: Sequence[str], argument: str, passed_over: _PassedOver) -> list[str]:
    found = list(dict.fromkeys(found))
    chosen = list(filter(_is_readable, found))
    if not chosen:
        raise UserError(f"{argument!r} contains no {READABLE} file: choose a folder or glob with text as --input")
    for file in found:
        if not _is_readable(file):
            passed_over[IGNORED if format_of(file) is None else _OF_TOKENIZERS].append(file)
    return chosen


def _is_readable(path: str) -> bool:
    # A tokenizer next to the text has a merges.txt, which is not prose.
    return format_of(path) is not None and path.rsplit("/", 1)[-1] not in TOKENIZER_FILES


def _files_at(path: str, passed_over: _PassedOver) -> list[str]:
    """Return the files of a path that was found in a folder or by a glob.

    Raises:
        UserError: it is a broken link whose name is that of a readable file.
    """
    kind = kind_of(path)
    if kind == FILE:
        if not _is_cache(path):
            return [path]
        passed_over[_OF_CACHES].append(path)
        return []
    if kind == FOLDER:
        return _files_of_folder(path, passed_over)
    if kind is None and _is_readable(path):
        raise UserError(f"{path!r} is a broken link: restore what it points to, or remove it")
    passed_over[_BROKEN if kind is None else _OTHER].append(path)
    return []


def _files_of_folder(folder: str, passed_over: _PassedOver) -> list[str]:
    """Return all visible files, in the same order on every file system, and of saved data sets only their data."""
    found: list[str] = []
    again: list[str] = []
    hidden: list[str] = []
    saved: list[str] = []
    named: set[str] = set()
    for current, names in tree(folder, again):
        is_inside = current.startswith(tuple(f"{each}/" for each in saved))
        if not is_inside and is_saved(current):
            found += (data := _saved_dataset(current))
            named |= set(data)
            saved.append(current)
            is_inside = True
        for path in (os.path.join(current, name) for name in names):
            if os.path.basename(path).startswith("."):
                hidden.append(path)
            elif is_inside and path not in named and _is_readable(path):
                passed_over[_OF_CACHES if _is_cache(path) else _UNNAMED].append(path)
            elif not is_inside and kind_of(path) != FOLDER:
                found += _files_at(path, passed_over)
    for why, paths in ((_HIDDEN, hidden), (REPEATED, again)):
        if paths:
            passed_over[why] += sorted(paths)
    return found if folder in saved else sorted(found, key=lambda path: Path(path).parts)


def _is_cache(path: str) -> bool:
    folder, name = os.path.split(path)
    return fnmatchcase(name, _CACHE) and os.path.isfile(os.path.join(folder, _INFO))


def is_saved(folder: str | Path) -> bool:
    """Whether `datasets` saved a folder, with splits or without."""
    has = {name for name in (SAVED_SPLITS, _STATE, _INFO) if os.path.isfile(os.path.join(folder, name))}
    return SAVED_SPLITS in has or has == {_STATE, _INFO}


def _saved_dataset(folder: str) -> list[str]:
    """Return the Arrow files of all splits in a folder that `datasets` saved, without its caches."""
    saved = load_saved(folder)
    parts = saved.values() if isinstance(saved, dict) else [saved]
    root = os.path.abspath(folder)
    files = [os.path.relpath(os.path.abspath(file["filename"]), root) for part in parts for file in part.cache_files]
    return [Path(folder, file).as_posix() for file in files]


def load_saved(folder: str | Path) -> Any:
    """What `datasets` saved in a folder: a data set, or a dictionary of splits.

    Raises:
        UserError: the library cannot read it, or it names a file outside of the folder.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=False)  # else its files have no names
    except Exception as error:  # the library has no narrower type
        raise UserError(f"cannot read {str(folder)!r} as datasets saved it ({error!r}): save it again") from error
    root = os.path.abspath(folder)
    for part in saved.values() if isinstance(saved, dict) else [saved]:
        for name in (os.path.abspath(file["filename"]) for file in part.cache_files):
            if not name.startswith(f"{root}/"):
                raise UserError(f"{str(folder)!r} names {name!r}, outside of the folder: save it again")
    return saved


def _check_name(path: str) -> None:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the name {path!r} is not UTF-8, and prepared data names its inputs in UTF-8: rename the file or folder"
        ) from error


def _enumerate(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED_AT_MOST} more" if len(paths) > _NAMED_AT_MOST else ""
    return ", ".join(path if path.isprintable() else repr(path) for path in paths[:_NAMED_AT_MOST]) + more


def kind_of(path: str) -> str | None:
    """Return `FILE`, `FOLDER` or `OTHER` (a pipe, a device) for a path, following links; None if it does not exist.

    Raises:
        UserError: it cannot be examined.
    """
    with readable(path):
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
    return FILE if stat.S_ISREG(mode) else FOLDER if stat.S_ISDIR(mode) else OTHER


def tree(folder: str, again: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Walk `folder` and every visible folder below it, each once, with its sorted names.

    Links to folders are followed last, so that a file is found by its own path rather than through a link.

    Args:
        again: collects links to folders that have been entered already.

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
        for path in (os.path.join(current, name) for name in names if not name.startswith(".")):
            if kind_of(path) == FOLDER:
                (links if os.path.islink(path) else folders).append(path)
        yield current, names


def matches(pattern: str) -> list[str]:
    """Return what `glob.glob` finds, `**` included, sorted.

    Raises:
        UserError: a folder that must be searched cannot be read.
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
            is_shown = part.startswith(".") or not name.startswith(".")
            if is_shown and fnmatchcase(name, part) and (not rest or kind_of(path) == FOLDER):
                yield from _matches(path, rest)
    else:
        path = os.path.join(base, part)
        if kind_of(path) is not None or os.path.islink(path):
            yield from _matches(path, rest)


def _names(folder: str) -> list[str]:
    with readable(folder):
        return sorted(os.listdir(folder or "."))
