"""Writing that appears whole or not at all, and checksums."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, else remove it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; on success it becomes `path`, in place of what was there.

    Raises:
        UserError: the place cannot be written.
    """
    path = path.resolve()  # a link stays, what it points to is replaced
    temporary, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        _put_back(old, path)  # a process was killed between the two renames below
        for leftover in (temporary, old):  # or elsewhere
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}): choose another output") from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_directory(path.parent)
    except BaseException:
        _put_back(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)
