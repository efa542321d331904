"""`preprocess verify`: check that a data folder is unchanged since it was made.

Arrow does not notice a flipped bit, so every byte is read and compared with the manifest: shards chunk by chunk, so
that damage is located, small files as a whole, the manifest by its own checksum. The packing index in `index/` is a
cache of training that the manifest does not list; if deleted, it is computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ds_roberta.data import shards
from ds_roberta.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from ds_roberta.data.packing import INDEX_FOLDER
from ds_roberta.data.shards import checksums
from ds_roberta.errors import UserError
from ds_roberta.files import file_checksum, json_fingerprint, load_json
from ds_roberta.options import require_positive
from ds_roberta.progress import byte_bar

DAMAGED_EXIT_CODE = 1


def verify(folder: Path, workers: int = 1) -> list[str]:
    """Return everything that is wrong with a data folder, one line per problem; empty if it is intact.

    Args:
        workers: number of shards read at the same time, in threads, because reading releases the interpreter lock.

    Raises:
        UserError: there is no manifest to compare with.
    """
    try:
        manifest = Manifest.parse(folder)
    except UserError as error:
        if not (folder / MANIFEST_NAME).is_file():
            raise
        return [f"{MANIFEST_NAME}: {error}; without it nothing else can be checked"]
    content = load_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    problems = []
    # Parsing compared the fingerprint with the shards' checksums; this covers the rest.
    if content.pop("checksum", None) != json_fingerprint(content):
        problems.append(f"{MANIFEST_NAME}: does not match its own checksum: damaged or edited")
    try:
        manifest.check_tokenizer(folder)
    except UserError as error:
        problems.append(f"tokenizer: {error}")
    files = content.get("files", {})
    problems += [problem for name, checksum in files.items() for problem in file_problems(folder, name, checksum)]
    infos = [info for split in manifest.splits.values() for info in split]
    with byte_bar(sum(info.bytes for info in infos), "verifying") as bar, ThreadPoolExecutor(workers) as pool:
        for info, found in zip(infos, pool.map(partial(shard_problems, folder), infos), strict=True):
            problems += found
            bar.update(info.bytes)
    return problems + [
        f"{name}: superfluous, not in the manifest"
        for name in _all_files(folder)
        if name not in {MANIFEST_NAME, *files, *(info.file for info in infos)}
    ]


def shard_problems(folder: Path, info: ShardInfo) -> list[str]:
    """Return what is wrong with one shard: a line for every damaged chunk, with its first and last byte."""
    try:
        size, checksum, chunks = checksums(folder / info.file)
    except OSError as error:
        return [_unreadable(info.file, error)]
    problems = []
    if size != info.bytes:
        problems.append(f"{info.file}: has {size} bytes, the manifest says {info.bytes}")
    for number, (found, expected) in enumerate(zip(chunks, info.chunk_checksums, strict=False)):
        if found != expected:
            first = number * shards.CHUNK_BYTES
            last = min(first + shards.CHUNK_BYTES, size, info.bytes) - 1
            problems.append(f"{info.file}: bytes {first}-{last} are damaged (chunk {number})")
    if not problems and checksum != info.checksum:
        problems.append(f"{info.file}: its chunks match the manifest, the whole does not")
    return problems


def file_problems(folder: Path, name: str, checksum: str) -> Iterator[str]:
    """Yield what is wrong with one small file, which is checked as a whole."""
    try:
        if file_checksum(folder / name) != checksum:
            yield f"{name}: damaged or edited somewhere in its {(folder / name).stat().st_size} bytes"
    except OSError as error:
        yield _unreadable(name, error)


def _unreadable(name: str, error: OSError) -> str:
    return f"{name}: missing" if isinstance(error, FileNotFoundError) else f"{name}: unreadable ({error.strerror})"


def _all_files(folder: Path) -> Sequence[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in paths if path.parts[0] != INDEX_FOLDER)


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser("verify", help="compare every byte of prepared data with its checksums")
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="a folder that 'preprocess shard' made")
    parser.add_argument("--workers", type=int, default=1, help="number of shards to read at once (default: 1)")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    require_positive("--workers", arguments.workers)
    problems = verify(arguments.data_dir, arguments.workers)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problem(s) in {arguments.data_dir}: restore a good copy or prepare the data again")
        return DAMAGED_EXIT_CODE
    print(f"{arguments.data_dir} is whole")
    return 0
