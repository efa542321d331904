"""Files as streams of bytes, local or at an fsspec URL, decompressed in blocks and in constant memory.

A file's name is interpreted here too: its format, its compression, and whether it is a URL.
"""

from __future__ import annotations

import bz2
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

import zstandard

from ds_roberta.errors import UserError

TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET, ARROW = "txt", "jsonl", "json", "csv", "tsv", "parquet", "arrow"
TABLES = (PARQUET, ARROW)
"""Columnar formats with their own compression: positions in them are rows."""
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
DOCUMENTS = (TEXT, JSON_LINES, CSV, *TABLES)
"""What can be read in constant memory, as a corpus is."""
READABLE = ".txt, .jsonl or .csv (plain or ." + ", .".join(COMPRESSIONS) + "), .parquet or .arrow"

_NAME = re.compile(rf"\.(\w+?)(?:\.({'|'.join(COMPRESSIONS)}))?$")

BLOCK_BYTES = 1 << 20
_COMPRESSED_BLOCK_BYTES = 1 << 16
_ZSTD_BLOCK_BYTES = 1 << 11
"""zstandard does not bound what one call returns: a run of one repeated byte grows 32,000-fold."""
_ZSTD_LONGEST_WINDOW = 1 << 31
"""The longest window that zstd writes (`--long=31`): a worker then needs 2 GiB for it, whatever the file's length."""
_MAGIC = {
    "gz": (b"\x1f\x8b",),
    "bz2": (b"BZh",),
    "xz": (b"\xfd7zXZ\0", b"\x5d\0\0"),  # the second is .lzma's
    "zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),  # and skippable frames
}
_HEAD_BYTES = 1 << 12
"""What a first look at a file reads."""
_OTHER_ENCODINGS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
"""Names of refused encodings by their byte-order marks."""

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zst": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_LONGEST_WINDOW).decompressobj(),
}


class Format(NamedTuple):
    """`compression` is None for a plain file and for tables."""

    kind: str
    compression: str | None


def format_of(path: str, kinds: Collection[str] = DOCUMENTS) -> Format | None:
    """Return the format that a file name's ending stands for, or None if it is not one of these kinds."""
    match = _NAME.search(path.lower())
    if match is None or match[1] not in kinds or (match[2] and match[1] in TABLES):
        return None
    return Format(match[1], match[2])


def known_format(path: str) -> Format:
    """The format of a file that was chosen as an input."""
    match = _NAME.search(path.lower())
    assert match is not None, path
    return Format(match[1], match[2])


def suffix_of(path: str) -> str:
    """A file name's ending without that of its compression, such as `.conll` of `train.conll.gz`; lower case."""
    match = _NAME.search(path.lower())
    return f".{match[1]}" if match else ""


def without_format(name: str) -> str:
    """A file's name without the endings of its format and compression, such as `train` of `train.conll.gz`."""
    match = _NAME.search(name.lower())
    return name[: match.start()] if match else name


def is_url(path: str) -> bool:
    """Return whether fsspec must open a path, such as `s3://bucket/text.jsonl`."""
    return "://" in path


class Damaged(Exception):
    """The rest of a file cannot be read, because it is `truncated`, `corrupt` or has an `unclosed_quote`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def share_read(read: int, total: int) -> str:
    """Say how much of a file was read, rounded down."""
    return f"{math.floor(1000 * read / total) / 10 if total else 0.0:g}% of the file was read"


@contextmanager
def readable(path: str, place: str = "") -> Iterator[None]:
    """Turn errors of the disk or the network into a `UserError` that names `path` and, if given, the place in it."""
    try:
        yield
    except Exception as error:  # of a URL's package and the network, which have many
        if isinstance(error, UserError | Damaged) or not (is_url(path) or isinstance(error, OSError)):
            raise
        why = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
        raise UserError(f"cannot read {path!r}{place}: {why}; make it readable or leave it out") from error


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is unknown, its package is not installed, or it is a chain of several (`::`).
    """
    import fsspec  # slow to import, and not needed for local files

    if "::" in url:  # fsspec closes an archive whose file system nothing refers to any more
        raise UserError(f"cannot read {url!r}: URLs within others (::) are not opened; unpack or copy the files")
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot read {url!r}: {error}; install the missing package or copy the files") from error


def open_binary(path: str) -> BinaryIO:
    """Open a local path or a URL; the file can seek."""
    if not is_url(path):
        return open(path, "rb")
    system, name = file_system(path)
    return system.open(name, "rb")


def file_size(file: BinaryIO) -> int:
    """The size of an open file in bytes; leaves its position at the start."""
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
    content = blocks if compression is None else _decompress(blocks, compression, end - start)
    for number, block in enumerate(content):
        if number == start == 0:
            _check_encoding(path, block)
        yield block


def begins_well(path: str, file: BinaryIO, compression: str | None) -> bool:
    """Check, before the work starts, whether the first bytes of an open file are those of its format.

    Raises:
        UserError: it is text in another encoding than UTF-8, as far as its first bytes (of a compressed file, those
            that they decompress to) show.
    """
    head = file.read(_HEAD_BYTES)
    if compression is None:
        _check_encoding(path, head)
        return True
    if not head.startswith(_MAGIC[compression]):
        return False
    with suppress(Damaged):  # the head ends within the compressed data
        _check_encoding(path, next(_decompress([head], compression, len(head)), b""))
    return True


def _check_encoding(path: str, content: bytes) -> None:
    found = _other_encoding(content[:_HEAD_BYTES])
    if found is not None:
        raise UserError(
            f"{path!r} is {found} by its first bytes, not UTF-8: "
            f"convert it, for example with iconv -f {found} -t UTF-8, or leave it out"
        )


def _other_encoding(head: bytes) -> str | None:
    """The name of a refused encoding in which a text begins so, by its byte-order mark or its zeros.

    Without a mark, each unit's most significant bytes are compared: in UTF-32 they are small and those before them
    zero; in UTF-16 some are zero (of spaces, line ends and ASCII) and nearly all, in the alphabets whose UTF-16 could
    be valid UTF-8, at most 32. In UTF-8 that would be a text of control characters and spaces.
    """
    for encoding, marks in _OTHER_ENCODINGS.items():
        if head.startswith(marks):
            return encoding
    if len(head) >= 4 and head.strip(b"\0"):
        for order, places in (("LE", (3, 2)), ("BE", (0, 1))):
            if not any(head[places[0] :: 4]) and max(head[places[1] :: 4]) <= 0x10:
                return f"UTF-32{order}"
        for order, place in (("LE", 1), ("BE", 0)):
            high = head[place::2]
            if 0 in high and sum(byte <= 32 for byte in high) > 0.9 * len(high):
                return f"UTF-16{order}"
    return None


def _raw_blocks(path: str, start: int, end: int, block_bytes: int) -> Iterator[bytes]:
    with readable(path), open_binary(path) as file:
        file.seek(start)
        while start < end:
            with readable(path, f" at byte {start} of {end}"):
                block = file.read(min(block_bytes, end - start))
            if not block:
                raise UserError(f"{path!r} became shorter while it was read: repeat the command when it is complete")
            start += len(block)
            yield block


def _decompress(blocks: Iterable[bytes], compression: str, size: int) -> Iterator[bytes]:
    """Decompress all members (frames, streams) of a file of `size` bytes, in pieces of at most about `BLOCK_BYTES`.

    The standard library's files of bz2 and xz ignore everything after the first member that cannot be decompressed, and
    fsspec's of zst end without an error where a file is cut; here both count as damage.
    """
    decompressor, complete, read = None, False, 0
    for block in blocks:
        before, read = read, read + len(block)
        while block or _holds_output(decompressor):
            if decompressor is None:
                if complete and not (block := block.lstrip(b"\0")):  # padding between members
                    break
                decompressor = _DECOMPRESSORS[compression]()
            try:
                content, block = _step(decompressor, compression, block)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError) as error:
                detail = f"the .{compression} data are damaged ({error}), {share_read(before, size)}"
                raise Damaged("corrupt", detail) from error
            if content:
                yield content
            if decompressor.eof:
                decompressor, complete = None, True
    if decompressor is not None or not complete:
        detail = f"the .{compression} data end before their end mark, all {size} bytes of the file were read"
        raise Damaged("truncated", detail)


def _step(decompressor: Any, compression: str, block: bytes) -> tuple[bytes, bytes]:
    """Decompress a block; return some content and the compressed bytes that must be fed next."""
    if compression == "zst":
        content = decompressor.decompress(block[:_ZSTD_BLOCK_BYTES])
        return content, (decompressor.unused_data if decompressor.eof else b"") + block[_ZSTD_BLOCK_BYTES:]
    if compression == "gz":
        content = decompressor.decompress(block, BLOCK_BYTES)
        return content, decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    content = decompressor.decompress(block, BLOCK_BYTES)
    return content, decompressor.unused_data if decompressor.eof else b""


def _holds_output(decompressor: Any) -> bool:
    """Whether one of bz2 or lzma keeps output that did not fit, and must be asked for it before it is fed again."""
    return decompressor is not None and not decompressor.eof and not getattr(decompressor, "needs_input", True)
