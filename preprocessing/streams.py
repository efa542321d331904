"""Bytes of files, local or behind an fsspec URL, decompressed on the way, in blocks and in constant memory."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import zstandard

from ds_roberta.errors import UserError
from preprocessing.formats import is_url

BLOCK_BYTES = 1 << 20
_COMPRESSED_BLOCK_BYTES = 1 << 16
_ZSTD_BLOCK_BYTES = 1 << 11
"""zstandard has no bound for what one call returns; a run of one byte grows 32,000-fold."""

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


class Damaged(Exception):
    """What follows in a file cannot be read; `reason` is that of the rejected document that begins here."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn errors of the disk or the network into a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or f"{type(error).__name__} {error}"
        raise UserError(f"cannot read {path!r}: {why}; make it readable or leave it out") from error


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    import fsspec  # slow to import, and local files need it not

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot read {url!r}: {error}; install what it needs or copy the files") from error


def open_binary(path: str) -> BinaryIO:
    """Open a local path or a URL; the file can seek."""
    if not is_url(path):
        return open(path, "rb")
    system, name = file_system(path)
    return system.open(name, "rb")


def file_size(file: BinaryIO) -> int:
    """The size of an open file in bytes; its position is at the start afterwards."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def read_blocks(path: str, start: int, end: int, compression: str | None) -> Iterator[bytes]:
    """The bytes `start … end` of a plain file, or the whole content of a compressed one.

    Raises:
        UserError: the file cannot be read or has become shorter.
        Damaged: the compressed bytes end too early or are not valid.
    """
    blocks = _raw_blocks(path, start, end, BLOCK_BYTES if compression is None else _COMPRESSED_BLOCK_BYTES)
    yield from blocks if compression is None else _decompress(blocks, compression)


def _raw_blocks(path: str, start: int, end: int, block_bytes: int) -> Iterator[bytes]:
    with readable(path), open_binary(path) as file:
        file.seek(start)
        while start < end:
            block = file.read(min(block_bytes, end - start))
            if not block:
                raise UserError(f"{path!r} became shorter while it was read: run the command again once it is complete")
            start += len(block)
            yield block


def _decompress(blocks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Decompress all members (frames, streams) of a file, in pieces of at most about `BLOCK_BYTES`."""
    decompressor, complete = None, False
    for block in blocks:
        while block:
            if decompressor is None:
                if complete and not (block := block.lstrip(b"\0")):  # padding between members
                    break
                decompressor = _DECOMPRESSORS[compression]()
            try:
                content, block = _step(decompressor, compression, block)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError) as error:
                raise Damaged("corrupt", f"the .{compression} data are damaged ({error})") from error
            if content:
                yield content
            if decompressor.eof:
                decompressor, complete = None, True
    if decompressor is not None or not complete:
        raise Damaged("truncated", f"the .{compression} data end before their end mark")


def _step(decompressor: Any, compression: str, block: bytes) -> tuple[bytes, bytes]:
    """Some content, and the compressed bytes that are still to be fed."""
    if compression == "zst":
        content = decompressor.decompress(block[:_ZSTD_BLOCK_BYTES])
        return content, (decompressor.unused_data if decompressor.eof else b"") + block[_ZSTD_BLOCK_BYTES:]
    if compression == "gz":
        content = decompressor.decompress(block, BLOCK_BYTES)
        return content, decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    # bz2 and lzma keep what they could not give yet themselves, and must be asked for it before they are fed again.
    content = decompressor.decompress(block, BLOCK_BYTES)
    while not decompressor.eof and not decompressor.needs_input:
        content += decompressor.decompress(b"", BLOCK_BYTES)
    return content, decompressor.unused_data if decompressor.eof else b""
