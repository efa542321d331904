"""Writing that appears whole or not at all, and checksums."""

from __future__ import annotations

import json
import os
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
def replaced_folder(output: Path, is_ours: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `output`; on success it takes its place, on failure nothing is left.

    Args:
        is_ours: whether an existing, non-empty folder is of the kind that this command writes and may replace.
        kind: that kind in words, for the error.

    Raises:
        UserError: `output` is a file, holds something else, or cannot be written.
    """
    output = output.resolve()  # a link stays, what it points to is replaced
    partial, old = (output.parent / f".{output.name}.{suffix}" for suffix in ("partial", "old"))
    with _errors_of_the_disk(output):
        if output.exists() and not output.is_dir():
            raise UserError(f"the output {str(output)!r} is a file: give a folder as --output")
        if output.exists() and any(output.iterdir()) and not is_ours(output):
            raise UserError(
                f"the output {str(output)!r} is not empty and not {kind}: empty it or give another --output"
            )
        created = [parent for parent in output.parents if not parent.exists()]
        try:
            _put_back(old, output)  # a job was killed between the two renames below
            for leftover in (partial, old):  # or elsewhere
                if leftover.exists():
                    shutil.rmtree(leftover)
            partial.mkdir(parents=True)
            yield partial
            for file in filter(Path.is_file, partial.rglob("*")):
                sync_file(file)
            if output.exists():
                output.rename(old)
            partial.rename(output)
            sync_directory(output.parent)
        except BaseException:
            _put_back(old, output)
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                for parent in created:
                    parent.rmdir()
            raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, output: Path) -> None:
    if old.exists() and not output.exists():
        old.rename(output)


@contextmanager
def _errors_of_the_disk(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {str(output)!r} ({os.strerror(error.errno or 0)}: {error.filename}): "
            "give another --output or mend this"
        ) from error
