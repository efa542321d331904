"""What the name of a file says of it: its format, its compression, and whether it lies behind an fsspec URL."""

from __future__ import annotations

import re
from typing import NamedTuple

TEXT, JSON_LINES, CSV, PARQUET, ARROW = "txt", "jsonl", "csv", "parquet", "arrow"
TABLES = (PARQUET, ARROW)
"""Formats of columns, with a compression of their own: their places are rows."""
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
READABLE = ".txt, .jsonl or .csv (plain or ." + ", .".join(COMPRESSIONS) + "), .parquet or .arrow"

_NAME = re.compile(rf"\.({TEXT}|{JSON_LINES}|{CSV})(?:\.({'|'.join(COMPRESSIONS)}))?$|\.({'|'.join(TABLES)})$")


class Format(NamedTuple):
    """`compression` is None for a plain file and for tables."""

    kind: str
    compression: str | None


def format_of(path: str) -> Format | None:
    """The format that the end of a name tells, None where it is none of ours."""
    match = _NAME.search(path.lower())
    return Format(match[1] or match[3], match[2]) if match else None


def known_format(path: str) -> Format:
    """The format of a file that was chosen as an input."""
    found = format_of(path)
    assert found is not None, path
    return found


def is_url(path: str) -> bool:
    """Whether a path is fsspec's to open, such as `s3://bucket/text.jsonl`."""
    return "://" in path
