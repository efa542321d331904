"""Hypothesis strategies for files that nobody should trust: arbitrary bytes, and valid files with errors in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Files = dict[str, bytes]
"""The content of a folder, by path."""


@dataclass(frozen=True)
class Case:
    """An input of a reader.

    Attributes:
        expected: what must be read from a valid file; None: anything, or a refusal.
    """

    files: Files
    expected: Any = None


DEEP, DEEPER, DIGITS = "@deep@", "@deeper@", "@digits@"
"""Stand for values that Python's own writer of JSON refuses: lists in lists, a number with thousands of digits."""
_MARKED = {DEEP: b"[" * 500 + b"]" * 500, DEEPER: b"[" * 3000 + b"]" * 3000, DIGITS: b"9" * 5000}
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "\0", "a", "1", "B-PER", "\ud800", "\ufeff", "é\r\n"),
    *(
        "../outside",
        "/etc/hostname",
        "x" * 300,
        [],
        {},
        [None],
        [[]],
        [1, "a"],
        {"": {}},
        {"a": [{}]},
        DEEP,
        DEEPER,
        DIGITS,
    ),
]
"""Values that a key of JSON should not have."""
_PIECES = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b"\n\n", b"\t", b" ", b'"'),
    *(b",", b"{", b"}", b"[", b"]", b":", b"\\", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"null", b"9" * 400),
    *(b"[" * 2000, b'{"a":' * 2000, b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80" * 8),
]


def texts(excluded: str = "", min_size: int = 0) -> SearchStrategy[str]:
    """Short texts without these characters."""
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters=excluded), min_size=min_size, max_size=8)


def scalars() -> SearchStrategy[Any]:
    """What JSON has besides lists and objects, as far as it is read back equal."""
    numbers = st.integers(-(2**63), 2**63 - 1) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    return st.none() | st.booleans() | numbers | texts()


@st.composite
def changed_bytes(draw: DrawFn, valid: Sequence[bytes]) -> bytes:
    """A valid file with a few bytes changed, removed, inserted or repeated, or in another encoding."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        end = min(len(data), place + draw(st.integers(0, 40)))
        kind = draw(
            st.sampled_from(("flip", "cut", "remove", "insert", "repeat", "lines", "returns", "utf-16", "swap"))
        )
        if kind == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "remove":
            data = data[:place] + data[end:]
        elif kind == "insert":
            data = data[:place] + draw(st.sampled_from(_PIECES) | st.binary(max_size=6)) + data[place:]
        elif kind == "repeat":
            data = data[:end] + data[place:end] * draw(st.integers(1, 5)) + data[end:]
        elif kind == "lines":
            lines = data.split(b"\n")
            chosen = draw(st.integers(0, len(lines) - 1))
            data = b"\n".join([*lines[:chosen], *[lines[chosen]] * draw(st.sampled_from((0, 2))), *lines[chosen + 1 :]])
        elif kind == "returns":
            data = data.replace(b"\n", draw(st.sampled_from((b"\r\n", b"\r"))))
        elif kind == "utf-16":
            data = data.decode("utf-8", "replace").encode(draw(st.sampled_from(("utf-16", "utf-16-be", "utf-8-sig"))))
        else:
            data = data[:place] + draw(st.sampled_from(valid))[place:]
    return data


@st.composite
def changed_value(draw: DrawFn, valid: Any) -> Any:
    """A JSON value with some of its parts missing, repeated, renamed, or of another type."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = None
        key, inner = None, value
        while isinstance(inner, dict | list) and inner and (parent is None or draw(st.integers(0, 3))):
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            parent, key = inner, draw(st.sampled_from(keys))
            inner = inner[key]
        if parent is None:
            return copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "repeat")))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from([*HOSTILE, value])))
        elif kind == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(("", "a", "text", "../x", "\ud800")))] = copy.deepcopy(inner)
            if kind == "rename":
                parent.pop(key, None)
        else:
            parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(inner))
    return value


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON as Python writes it, with what only a hostile file has."""
    data = json.dumps(value, indent=indent).encode()
    for mark, content in _MARKED.items():
        data = data.replace(f'"{mark}"'.encode(), content)
    return data


def changed_json(valid: Any) -> SearchStrategy[bytes]:
    """A JSON file with wrong parts or wrong bytes."""
    return changed_value(valid).map(json_bytes) | changed_bytes((json_bytes(valid, indent=1),))


@st.composite
def changed_json_lines(draw: DrawFn, valid: Sequence[Any]) -> bytes:
    """JSON lines of which one or two have wrong parts."""
    lines = [json_bytes(value) for value in valid]
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = json_bytes(draw(changed_value(valid[place])))
    return b"\n".join(lines) + b"\n"


def any_bytes() -> SearchStrategy[bytes]:
    return st.binary(max_size=64)


def one_file(name: str, content: SearchStrategy[bytes]) -> SearchStrategy[Case]:
    """A folder with one file."""
    return content.map(lambda data: Case({name: data}))


@st.composite
def folder_with_errors(draw: DrawFn, valid: Files, values: dict[str, Any] | None = None) -> Case:
    """A valid folder in which one or two files are wrong or missing.

    Args:
        values: the values in those of its files that are JSON.
    """
    files = dict(valid)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(valid)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            files.pop(name, None)
        elif kind == 1:
            files[name] = draw(any_bytes())
        elif values and name in values and kind > 3:
            files[name] = json_bytes(draw(changed_value(values[name])))
        else:
            files[name] = draw(changed_bytes((valid[name],)))
    return Case(files)
