"""Readers of texts and rows that people bring, with inputs for them and what must hold of everything they read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from benchmarks.fuzz_inputs import (
    Case,
    any_bytes,
    changed_bytes,
    changed_json,
    changed_json_lines,
    one_file,
    scalars,
    texts,
)
from ds_roberta.data.manifest import InputInfo
from ds_roberta.errors import UserError
from ds_roberta.inputs.tables import read_table
from preprocessing.reading.accounts import KEPT, Account, input_infos, kept_documents, refuse_damage, summary_lines
from preprocessing.reading.documents import Document, ReadOptions
from preprocessing.reading.planning import plan_units

SEPARATORS = ("blank-line", "line", "file")
ROWS = [
    {"text": "Grüße, he said.", "label": "a", "id": 7, "score": 0.5, "tags": ["x", None], "more": {"a": {"b": [1]}}},
    {"text": 'a "quote", two\nlines', "label": "b", "id": 8, "score": -1.0, "tags": [], "more": None},
    {"text": "𠮷 it", "label": "a", "id": 9, "score": 0.0, "tags": ["y"], "more": {"a": None}},
]
FLAT = [[str(row[name]) for name in ("text", "label", "id")] for row in ROWS]
HEADER = ["text", "label", "id"]
TEXT = "Erste Zeile.\nZweite, naïve 𠮷.\n\nA document.\r\n \r\nLast one\u2028with no end".encode()


class SilentLoss(Exception):
    """Something was neither read nor reported."""


@dataclass(frozen=True)
class Reader:
    """A reader of files or folders.

    Attributes:
        read: gets a folder with the files of a case; returns what is compared with `Case.expected`, if there is any.
            Raises `SilentLoss` if what it read shows that something is missing.
    """

    cases: SearchStrategy[Case]
    read: Callable[[Path], Any]


def read_documents(path: Path, options: ReadOptions | None = None) -> tuple[list[Document], Account]:
    """The documents of a file as `preprocess shard --allow_damaged_files` reads them, and its account."""
    options = options or ReadOptions()
    account = Account()
    found = [
        document
        for unit in plan_units([str(path)], options, unit_bytes=200)
        for piece in unit.pieces
        for document in kept_documents(piece, options, account)
    ]
    if len(found) != account.counts[KEPT]:
        raise SilentLoss(f"{len(found)} documents, but the account says {account.counts[KEPT]}")
    infos: Sequence[InputInfo] = input_infos({str(path): account}, {})
    summary_lines(infos)
    return found, account


def only(folder: Path) -> Path:
    """The file of a case that has one."""
    return next(folder.iterdir())


def attempt_all(*calls: Callable[[], object]) -> None:
    """Read in several ways; if all refuse, raise the first refusal."""
    refusals = []
    for call in calls:
        try:
            call()
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(calls):
        raise refusals[0]


# Text


def _read_text(folder: Path) -> None:
    path = only(folder)

    def read(separator: str) -> None:
        found, account = read_documents(path, ReadOptions(documents=separator))
        if account.counts.keys() <= {KEPT, "empty"}:
            words = [word for document in found for word in document.text.split()]
            if words != path.read_bytes().decode("utf-8-sig").split():
                raise SilentLoss(f"words are lost where {separator} separates documents")

    attempt_all(*(partial(read, separator) for separator in SEPARATORS))


# Rows


@st.composite
def _rows(draw: DrawFn, values: SearchStrategy[Any], names: SearchStrategy[str]) -> list[dict[str, Any]]:
    columns = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    row = st.fixed_dictionaries(dict.fromkeys(columns, values))
    return draw(st.lists(row, min_size=1, max_size=4))


@st.composite
def _written_json(draw: DrawFn, name: str, write: Callable[[list[Any], bool], str]) -> Case:
    nested = st.recursive(scalars(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner))
    rows = draw(_rows(nested, texts(min_size=1)))
    return Case({name: write(rows, draw(st.booleans())).encode()}, rows)


def _json_lines(rows: list[Any], ascii_only: bool) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def _read_json_lines(folder: Path) -> Any:
    path = only(folder)
    lines = sum(1 for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())
    _, account = read_documents(path)
    found = account.counts.total() + len(account.damage)
    if found != lines and len(account.damage) < 5:
        raise SilentLoss(f"{lines} lines that are not blank, but {found} are accounted for")
    rows = read_table(path).rows
    if len(rows) != lines:
        raise SilentLoss(f"{lines} lines that are not blank, but {len(rows)} rows")
    return rows


def _json_array(rows: list[Any], ascii_only: bool) -> str:
    return json.dumps(rows, ensure_ascii=ascii_only, indent=1 if ascii_only else None)


def _read_json(folder: Path) -> Any:
    return read_table(only(folder)).rows


@st.composite
def _written_csv(draw: DrawFn, name: str) -> Case:
    names = texts("\0\ufeff;", min_size=1).filter(lambda text: text.strip() and not text.startswith('"'))
    # The csv module of Python 3.10 neither writes nor reads the character of number 0.
    rows = draw(_rows(texts("\0" if sys.version_info < (3, 11) else ""), names))
    file = io.StringIO()
    writer = csv.DictWriter(
        file,
        list(rows[0]),
        delimiter="\t" if name.endswith(".tsv") else ",",
        quoting=csv.QUOTE_ALL,
        lineterminator=draw(st.sampled_from(("\n", "\r\n"))),
    )
    writer.writeheader()
    writer.writerows(rows)
    return Case({name: file.getvalue().encode()}, rows)


@st.composite
def _written_tsv(draw: DrawFn) -> Case:
    """As GLUE's files are: nothing is quoted."""
    rows = draw(_rows(texts('\t\r\n"'), texts('\0\ufeff\t\r\n"01', min_size=1)))
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    return Case({"rows.tsv": "".join("\t".join(cells) + "\n" for cells in lines).encode()}, rows)


def _csv(delimiter: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([HEADER, *FLAT])
    return file.getvalue().encode()


def _read_cells(folder: Path) -> Any:
    path = only(folder)
    if path.suffix == ".csv":
        read_documents(path)
    return read_table(path).rows


# Tables

_COLUMNS = {
    "text": (pa.string(), texts()),
    "id": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "number": (pa.float64(), st.floats(allow_nan=False)),
    "flag": (pa.bool_(), st.booleans()),
    "tags": (pa.list_(pa.string()), st.lists(texts(), max_size=3)),
    "bytes": (pa.binary(), st.binary(max_size=4)),
    "more": (pa.struct([("a", pa.int8()), ("b", pa.string())]), st.fixed_dictionaries({"a": st.just(1), "b": texts()})),
}


@st.composite
def _written_table(draw: DrawFn, name: str, write: Callable[[pa.Table], bytes]) -> Case:
    columns = draw(st.lists(st.sampled_from(list(_COLUMNS)), min_size=1, unique=True))
    row = st.fixed_dictionaries({column: st.none() | _COLUMNS[column][1] for column in columns})
    rows = draw(st.lists(row, min_size=1, max_size=5))
    table = pa.Table.from_pylist(rows, pa.schema([(column, _COLUMNS[column][0]) for column in columns]))
    return Case({name: write(table)}, rows)


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2, **options)
    return sink.getvalue()


def _arrow(table: pa.Table, new: Callable[..., Any] = pa.ipc.new_file, **options: Any) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def _table() -> pa.Table:
    rows = [{**row, "words": ["a", "b"]} for row in ROWS] * 3
    table = pa.Table.from_pylist(rows)
    labels, numbers = pa.array([row["label"] for row in rows]), pa.array(range(len(rows)), pa.int64())
    columns = {
        "kind": labels.dictionary_encode(),
        "large": labels.cast(pa.large_string()),
        "time": numbers.cast(pa.timestamp("ns", "UTC")),
        "day": numbers.cast(pa.int32()).cast(pa.date32()),
        "span": numbers.cast(pa.duration("s")),
        "price": numbers.cast(pa.decimal128(22, 2)),
        "map": pa.array([[("a", 1)]] * len(rows), pa.map_(pa.string(), pa.int8())),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


@cache
def _parquet_files() -> tuple[bytes, ...]:
    table = _table()
    options: list[dict[str, Any]] = [
        {"compression": "none", "write_page_checksum": True},
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"compression": "snappy"},
    ]
    return tuple(_parquet(table, **each) for each in options)


@cache
def _arrow_files() -> tuple[bytes, ...]:
    table = _table()
    return tuple(
        _arrow(table, new, **options)
        for new in (pa.ipc.new_file, pa.ipc.new_stream)
        for options in ({}, {"compression": "lz4"})
    )


_FEATURES = {
    "info": {
        "features": {
            "text": {"dtype": "string", "_type": "Value"},
            "label": {"names": ["a", "b"], "_type": "ClassLabel"},
            "tags": {"feature": {"names": ["x", "y"], "_type": "ClassLabel"}, "_type": "List"},
        }
    }
}
"""As `datasets` writes them into a file."""


def _with_features(features: bytes) -> Case:
    table = pa.table({"text": ["a", "b"], "label": [0, None], "tags": [[0, 1], None]})
    return Case({"rows.parquet": _parquet(table.replace_schema_metadata({"huggingface": features}))})


def _read_columns(folder: Path) -> Any:
    path = only(folder)
    for column in ("id", "tags", "kind", "time", "map"):
        _, account = read_documents(path, ReadOptions(id_column=column))
    if path.suffix == ".parquet" and not account.damage:
        rows = pq.ParquetFile(path).metadata.num_rows
        if account.counts.total() != rows:
            raise SilentLoss(f"{rows} rows, but {account.counts.total()} are accounted for")
    return read_table(path).rows


# Compressed streams

_LINES = _json_lines([{"text": f"Document {number}, {number * 7919 % 1000}"} for number in range(30)], True).encode()
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC64),
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@st.composite
def _compressed(draw: DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(COMPRESSORS)))
    whole = COMPRESSORS[kind](_LINES)
    half = _LINES.find(b"\n", len(_LINES) // 2) + 1
    members = COMPRESSORS[kind](_LINES[:half]) + COMPRESSORS[kind](_LINES[half:])
    data = draw(st.sampled_from((whole, members)) | changed_bytes((whole, members)) | any_bytes())
    expected = _LINES.decode().splitlines() if data in (whole, members) else None
    return Case({f"lines.jsonl.{kind}": data}, expected)


def _read_compressed(folder: Path) -> Any:
    path = only(folder)
    found, account = read_documents(path)
    lines = [json.dumps({"text": document.text}) for document in found]
    # Members may be repeated or cut off between two, but no line is made up: each has a checksum.
    if account.damage == [] and not set(lines) <= set(_LINES.decode().splitlines()):
        raise SilentLoss("damage is not noticed")
    refuse_damage({str(path): account})
    read_table(path)
    return lines


def row_readers() -> dict[str, Reader]:
    """The readers of this module, by the names of what they read."""
    lines = changed_json_lines(ROWS) | changed_bytes((_json_lines(ROWS, False).encode(),)) | any_bytes()
    arrays = changed_json(ROWS) | changed_json({"data": ROWS}) | any_bytes()
    cells = {"rows.csv": _csv(","), "rows.tsv": _csv("\t")}
    columns = {"rows.parquet": _parquet_files(), "rows.arrow": _arrow_files()}
    return {
        "text": Reader(one_file("text.txt", changed_bytes((TEXT,)) | any_bytes()), _read_text),
        "JSON lines": Reader(
            one_file("rows.jsonl", lines) | _written_json("rows.jsonl", _json_lines), _read_json_lines
        ),
        "JSON": Reader(one_file("rows.json", arrays) | _written_json("rows.json", _json_array), _read_json),
        "CSV": Reader(
            one_file("rows.csv", changed_bytes((cells["rows.csv"],)) | any_bytes()) | _written_csv("rows.csv"),
            _read_cells,
        ),
        "TSV": Reader(
            one_file("rows.tsv", changed_bytes((cells["rows.tsv"],)) | any_bytes())
            | _written_csv("rows.tsv")
            | _written_tsv(),
            _read_cells,
        ),
        "Parquet": Reader(
            one_file("rows.parquet", changed_bytes(columns["rows.parquet"]) | any_bytes())
            | changed_json(_FEATURES).map(_with_features)
            | _written_table("rows.parquet", _parquet),
            _read_columns,
        ),
        "Arrow": Reader(
            one_file("rows.arrow", changed_bytes(columns["rows.arrow"]) | any_bytes())
            | _written_table("rows.arrow", _arrow)
            | _written_table("rows.arrow", partial(_arrow, new=pa.ipc.new_stream)),
            _read_columns,
        ),
        "gz, bz2, xz, zst": Reader(_compressed(), _read_compressed),
    }
