"""Writing that appears whole or not at all, and checksums."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from ds_roberta.errors import UserError


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


TOKENIZER_FILES = frozenset(  # that transformers writes, of any version
    {
        "added_tokens.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, else remove it.

    Raises:
        UserError: `path` is a device or a pipe, which the renamed file would stand in for.
    """
    path = path.resolve()  # a link stays, what it points to is replaced
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"the output {str(path)!r} is a device or a pipe: give a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process numbers repeat among hosts
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def holds_only(folder: Path, names: frozenset[str]) -> bool:
    """Whether a folder has no entry but these."""
    return {path.name for path in folder.iterdir()} <= names


def json_fingerprint(value: Any) -> str:
    """A 128-bit hash (32 hex digits) of a JSON value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def file_checksum(path: Path) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replaced_folder(output: Path, is_ours: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `output`; on success it takes its place, on failure nothing is left.

    Args:
        is_ours: whether an existing, non-empty folder is of the kind that this command writes and may replace.
        kind: that kind in words, for the error.

    Raises:
        UserError: `output` is a file, holds something else, or cannot be written.
    """
    output = output.resolve()  # a link stays, what it points to is replaced
    partial = partial_folder(output)
    with errors_of_the_disk(output), created_parents(output):
        check_replaceable(output, is_ours, kind)
        try:
            if partial.exists():  # a killed job's
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            yield partial
            put_in_place(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_folder(output: Path) -> Path:
    """Where the work on the folder `output` lies until it is whole."""
    return output.parent / f".{output.name}.partial"


def check_replaceable(output: Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Refuse an `output` that must not be replaced, as `replaced_folder` says; mend what a killed job left of one."""
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {str(output)!r} is a file: give a folder as --output")
    if output.exists() and any(output.iterdir()) and not is_ours(output):
        raise UserError(f"the output {str(output)!r} is not empty and not {kind}: empty it or give another --output")
    old = _old_folder(output)
    _put_back(old, output)  # a job was killed between the two renames below
    if old.exists():  # or behind them
        shutil.rmtree(old)


def put_in_place(folder: Path, output: Path) -> None:
    """Make the whole `folder` durable and give it the place and name of `output`, on the same file system."""
    old = _old_folder(output)
    for file in filter(Path.is_file, folder.rglob("*")):
        sync_file(file)
    try:
        if output.exists():
            output.rename(old)
        folder.rename(output)
        sync_directory(output.parent)
    except BaseException:
        _put_back(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def created_parents(path: Path) -> Iterator[None]:
    """On failure remove the parents of `path` that did not exist before, as far as they are empty."""
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


@contextmanager
def errors_of_the_disk(output: Path) -> Iterator[None]:
    """Turn every `OSError` into a `UserError` that says that `output` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {str(output)!r} ({os.strerror(error.errno or 0)}: {error.filename}): "
            "give another --output or mend this"
        ) from error


def _old_folder(output: Path) -> Path:
    return output.parent / f".{output.name}.old"


def _put_back(old: Path, output: Path) -> None:
    if old.exists() and not output.exists():
        old.rename(output)
