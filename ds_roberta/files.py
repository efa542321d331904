"""Atomic writing of files and folders, JSON files, and checksums."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import numpy as np
import xxhash

from ds_roberta.errors import DiskError, UserError, disk_refusal, standard_output_is_refused
from ds_roberta.lease import leases_folder, refuse_others, sole_writer


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable, so that a rename in it survives a power cut."""
    sync_file(path)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


TOKENIZER_FILES = frozenset(  # the files that any version of transformers may write
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
    """Yield a temporary path next to `path`; on success sync it and rename it to `path`, else remove it.

    Raises:
        UserError: `path` is a device or a pipe, which the renamed file would replace.
    """
    path = path.resolve()  # a link stays, and what it points to is replaced
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"the output {str(path)!r} is a device or a pipe: choose a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process ids repeat across hosts
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def load_json(data: str | bytes, **options: Any) -> Any:
    """As `json.loads`, which does not say `ValueError` where something is nested too deeply."""
    try:
        return json.loads(data, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files in which killed processes were writing `name` (a pattern) by `atomic_path`."""
    for path in folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):  # they do no harm
            path.unlink()


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises `UserError` if it cannot be read."""
    try:
        return load_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}): fix this") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}): fix or remove it") from error


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; raises `UserError`, which ends with `remedy`, if it cannot be read or is not one."""
    try:
        content = load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a JSON object: {remedy}")
    return content


def is_within(name: str) -> bool:
    """Whether a relative path that a file names is one that the system can have, and cannot leave the file's folder."""
    path = PurePosixPath(name)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def value_at(tree: Any, place: Sequence[str | int]) -> Any:
    """The value in a JSON tree at a place given by keys and indexes; None if there is no such place."""
    for key in place:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_array(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array as a `.npy`, by the file's own `write`.

    numpy writes to a file of the system through a stream of C, and ignores that its last bytes may be refused.
    """
    np.save(cast(Any, SimpleNamespace(write=file.write)), array)


def check_output_file(option: str, path: Path | None) -> None:
    """Raise `UserError` if an option's file could not be written; call it before the work rather than after."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"{option} {str(path)!r} is a folder, or its folder is missing: choose a file in a folder that exists"
        )
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {str(path)!r} is a device or a pipe: choose a file")
    with errors_of_the_disk(path), tempfile.TemporaryFile(dir=path.resolve().parent):
        pass


def write_figures(path: Path | None, figures: Any) -> None:
    """Write the results of a command as JSON, atomically; do nothing if `path` is None.

    Raises:
        UserError: the file cannot be written.
    """
    if path is not None:
        with errors_of_the_disk(path):
            write_json(path, figures)


def append_line(path: Path, line: str) -> None:
    """Append `line` and a newline to a file, completely or not at all."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        left = f"{line}\n".encode()
        try:
            while left:  # a nearly full disk takes only a part
                left = left[file.write(left) :]
        except BaseException:
            file.truncate(end)
            raise


def honour_umask(files: Iterable[Path]) -> None:
    """Give files the permissions that new ones get in their folders, from the umask and a folder's default ACL.

    A library that renames a temporary file, as safetensors 0.8 does, leaves it readable only by its owner.
    """
    modes: dict[Path, int] = {}
    for file in files:
        if file.parent not in modes:
            modes[file.parent] = _mode_of_new_files(file.parent)
        if stat.S_IMODE(file.stat().st_mode) != modes[file.parent]:
            file.chmod(modes[file.parent])


def _mode_of_new_files(folder: Path) -> int:
    """Find the mode by creating a file: Python can read the umask only by changing it, for all threads at once."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def holds_only(folder: Path, names: frozenset[str]) -> bool:
    """Whether every entry of a folder is one of `names`."""
    return {path.name for path in folder.iterdir()} <= names


def json_fingerprint(value: Any) -> str:
    """A 128-bit hash (32 hex digits) of a JSON value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode("utf-8", "surrogatepass"))


def file_checksum(path: Path) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replaced_folder(output: Path, is_ours: Callable[[Path], bool], kind: str, is_held: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder next to `output`; on success it replaces `output`, on failure it is removed.

    Args:
        is_ours: whether an existing, non-empty folder is of the kind that this command writes and may replace.
        kind: that kind in words, for the error.
        is_held: whether the caller holds the lease on `output`.

    Raises:
        UserError: `output` is a file, holds something else, or cannot be written; or another job is writing it.
    """
    output = output.resolve()  # a link stays, and what it points to is replaced
    partial = partial_folder(output)
    held = nullcontext() if is_held else sole_writer(output, leases_folder(output))
    with errors_of_the_disk(output), created_parents(output), held:
        check_replaceable(output, is_ours, kind)
        refuse_others(partial / "leases", output)
        try:
            if partial.exists():  # left by a killed job
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            yield partial
            put_in_place(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_folder(output: Path) -> Path:
    """The folder in which `output` is made until it is complete."""
    return output.parent / f".{output.name}.partial"


def check_replaceable(output: Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Raise `UserError` if `output` must not be replaced, or cannot; otherwise finish an exchange that a kill broke."""
    if os.path.ismount(output):
        raise UserError(f"the output {str(output)!r} is a mount point, which cannot be replaced: choose a folder in it")
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {str(output)!r} is a file: choose a folder")
    if output.exists() and any(output.iterdir()) and not is_ours(output):
        raise UserError(f"the output {str(output)!r} is not empty and not {kind}: empty it or choose another folder")
    finish_exchange(output)


def put_in_place(folder: Path, output: Path) -> None:
    """Make the complete `folder` durable and move it to `output`, on the same file system."""
    inside = [folder, *folder.rglob("*")]
    honour_umask(list(filter(Path.is_file, inside)))
    for path in inside:
        sync_file(path)
    exchange(folder, output)


def exchange(folder: Path, output: Path) -> None:
    """Move the durable `folder` to `output` and remove the old content; on failure the old content stays."""
    old = _old_folder(output)
    try:
        if output.exists():
            output.rename(old)
        folder.rename(output)
        sync_directory(output.parent)
    except BaseException:
        if output.exists() and not folder.exists():
            output.rename(folder)
        _put_back(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def finish_exchange(output: Path) -> None:
    """Finish an `exchange` that a kill interrupted, so that `output` exists, old or new."""
    old = _old_folder(output)
    _put_back(old, output)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def created_parents(path: Path) -> Iterator[None]:
    """On failure remove the parents of `path` that did not exist before, if they are empty."""
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


@contextmanager
def errors_of_the_disk(
    output: Path, kind: str = "", remedy: str = "fix this or choose another output"
) -> Iterator[None]:
    """Turn every `OSError`, and what libraries raise for one, into a `DiskError` about `output`.

    Errors of standard output do not concern `output` and are not changed.

    Args:
        kind: what the output is, such as "the plot ".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_refusal(error) or (isinstance(error, OSError) and _in_words(error))
        if not reason or standard_output_is_refused():
            raise
        raise DiskError(f"cannot write {kind}{str(output)!r} ({reason}): {remedy}") from error


def _in_words(error: OSError) -> str:
    return str(error) if error.errno is None else f"{os.strerror(error.errno)}: {error.filename}"


def _old_folder(output: Path) -> Path:
    return output.parent / f".{output.name}.old"


def _put_back(old: Path, output: Path) -> None:
    if old.exists() and not output.exists():
        old.rename(output)
