"""The same documents from every format; what is broken is counted and located, and the rest is read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ds_roberta.inputs import streams
from ds_roberta.inputs.pieces import Piece, Reject
from ds_roberta.inputs.rows import Row, csv_rows
from preprocessing.reading.accounts import Account, kept_documents
from preprocessing.reading.documents import ReadOptions
from preprocessing.reading.planning import plan_units

TEXTS = [f"Document {i}\nhas é, two \u2028 lines{' and words' * (i % 70)}" for i in range(900)]
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
TABLE = pa.table({"id": [f"d{i}" for i in range(900)], "text": TEXTS, "n": list(range(900))})


def read(path, unit_bytes=20_000, **options):
    """The documents and the account of a file, by its plan."""
    options, account, found = ReadOptions(**options), Account(), []
    for unit in plan_units([str(path)], options, unit_bytes):
        for piece in unit.pieces:
            part = Account()
            found += kept_documents(piece, options, part)
            account.add(part)
    return found, account


def texts(path, **options):
    return [document.text.strip() for document in read(path, **options)[0]]


def csv_bytes():
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["id", "text", "n"])
    writer.writerows((f"d{i}", text + (', "so"' if i % 3 else ""), i) for i, text in enumerate(TEXTS))
    return file.getvalue().encode()


PLAIN = {
    "txt": "\n\n".join(TEXTS).encode(),
    "jsonl": "".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode(),
}


def write_arrow(path, new, **options):
    with new(str(path), TABLE.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(TABLE, max_chunksize=100)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", PLAIN)
def test_a_compressed_file_of_several_members_reads_as_the_plain_one(tmp_path, suffix, compression):
    data, compress = PLAIN[suffix], COMPRESS[compression]
    path = tmp_path / f"a.{suffix}.{compression}"
    path.write_bytes(compress(data[:9999]) + compress(b"") + compress(data[9999:]) + b"\0" * 8 * (compression != "zst"))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_what_comes_before_the_damage_of_a_compressed_file_is_kept(tmp_path, compression):
    data, compress = PLAIN["jsonl"], COMPRESS[compression]
    first, second = compress(data[:50_000]), compress(data[50_000:])
    whole = data[:50_000].count(b"\n")
    for damage, reason in [(second[:-5], "truncated"), (b"not compressed", "corrupt"), (second[:2], "truncated")]:
        path = tmp_path / f"a.jsonl.{compression}"
        path.write_bytes(first + damage)
        found, account = read(path)
        assert account.counts == {"kept": len(found)}
        assert len(found) >= whole
        assert [document.text for document in found] == TEXTS[: len(found)]
        (place,) = account.damage
        assert (place["reason"], place["byte"]) == (reason, len(b"\n".join(data.split(b"\n")[: len(found)])) + 1)
        assert (f"all {len(first + damage)} bytes" if reason == "truncated" else "% of the file") in place["detail"]
    path.write_bytes(b"")
    account = Account()
    assert list(kept_documents(Piece(str(path), 0, 0), ReadOptions(), account)) == []
    assert (account.counts, account.damage[0]["reason"]) == ({}, "truncated")


def test_a_stream_longer_than_any_block_is_cut_at_borders_only(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1 << 16)
    data = PLAIN["txt"] * 4  # 900 kB
    for newline in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data.replace(b"\n", newline), 1))
        (tmp_path / "a.txt").write_bytes(data.replace(b"\n", newline))
        documents = [document.text for document in read(tmp_path / "a.txt.gz")[0]]
        assert documents == [document.text for document in read(tmp_path / "a.txt", unit_bytes=1 << 30)[0]]
        assert len(documents) > 3_500


def test_an_endless_document_is_skipped_in_bounded_memory(tmp_path):
    endless = b"x" * 3_000_000
    content = b"before\n\n" + endless + b" \n \nafter\n\n" + endless
    for path, compress in (("a.txt", bytes), ("a.txt.zst", zstandard.compress)):
        (tmp_path / path).write_bytes(compress(content))
        found, account = read(tmp_path / path, max_characters=100)
        assert [document.text.strip() for document in found] == ["before", "after"]
        assert account.counts == {"kept": 2, "too_long": 2}


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_what_compresses_well_is_read_in_small_blocks(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1 << 16)
    data, path = b"one line as the other\n" * 100_000, tmp_path / f"a.txt.{compression}"
    path.write_bytes(COMPRESS[compression](data))
    blocks = list(streams.read_blocks(str(path), 0, path.stat().st_size, compression))
    assert b"".join(blocks) == data
    assert max(map(len, blocks)) <= 1 << 16


def test_tables_give_texts_ids_and_rows(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    write_arrow(tmp_path / "stream.arrow", pa.ipc.new_stream)
    write_arrow(tmp_path / "file.arrow", pa.ipc.new_file)
    write_arrow(tmp_path / "packed.arrow", pa.ipc.new_stream, compression="zstd")
    for name in ("a.parquet", "stream.arrow", "file.arrow", "packed.arrow"):
        for unit_bytes in (1, 20_000, 1 << 30):
            found, account = read(tmp_path / name, unit_bytes=unit_bytes, id_column="id")
            assert [(d.text, d.offset, d.id) for d in found] == [(t, i, f"d{i}") for i, t in enumerate(TEXTS)]
            assert account.counts == {"kept": 900}
    assert len(plan_units([str(tmp_path / "a.parquet")], ReadOptions(), 20_000)) > 2
    assert len(plan_units([str(tmp_path / "stream.arrow")], ReadOptions(), 20_000)) > 2


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_type_of_string_column_is_read(tmp_path, kind):
    column = pa.array(TEXTS, kind)
    table = pa.table({"text": column})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == TEXTS


def test_a_corrupt_row_group_loses_only_its_own_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=100, write_page_checksum=True, compression="none")
    column = pq.ParquetFile(path).metadata.row_group(4).column(1)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    found, account = read(path)
    assert account.counts == {"kept": 800, "corrupt": 100}
    assert [document.offset for document in found] == [*range(400), *range(500, 900)]
    (place,) = account.damage
    assert (place["row"], place["reason"], account.places) == (400, "corrupt", [])
    assert "row group 4 of 9" in place["detail"]
    assert place["detail"].endswith("100 of 900 rows are lost")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_damaged_table_is_an_account_and_not_a_crash(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(TABLE, path)
    else:
        write_arrow(path, pa.ipc.new_stream if name == "stream.arrow" else pa.ipc.new_file)
    data = path.read_bytes()
    for cut in (len(data) // 2, 5, 0):
        path.write_bytes(data[:cut])
        found, account = read(path)
        assert len(account.damage) == 1
        assert account.counts == Counter(kept=len(found))
        assert [document.text for document in found] == TEXTS[: len(found)]
        assert bool(found) == (name == "stream.arrow" and cut > 5)


def test_bytes_of_an_arrow_column_are_not_trusted(tmp_path):
    def column(*offsets):
        buffers = [None, pa.py_buffer(np.array(offsets, "i4").tobytes()), pa.py_buffer(b"a\xff\xfeb")]
        return pa.table({"text": pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)})

    for table, counts in [
        (column(0, 1, 3, 4), {"kept": 2, "not_utf8": 1}),
        (column(0, 1, 3_000_000, 4), {"corrupt": 3}),
    ]:
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert read(tmp_path / "a.arrow")[1].counts == counts


def test_a_missing_column_is_counted_row_by_row_and_null_is_an_empty_text(tmp_path):
    table = pa.table({"text": ["one", None, "two"], "n": [1, 2, 3], "nulls": pa.nulls(3)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        for column, counts in [
            ("text", {"kept": 2, "empty": 1}),
            ("nulls", {"empty": 3}),
            ("n", {"missing_column": 3}),
            ("body", {"missing_column": 3}),
        ]:
            account = read(path, text_column=column)[1]
            assert account.counts == counts
            assert all(repr(column) in place["detail"] for place in account.places)


def test_csv_rows_with_quotes_and_line_ends_are_documents(tmp_path):
    expected = [text + (', "so"' if i % 3 else "") for i, text in enumerate(TEXTS)]
    for path, data in (("a.csv", csv_bytes()), ("a.csv.gz", gzip.compress(csv_bytes()))):
        (tmp_path / path).write_bytes(data)
        found = read(tmp_path / path, id_column="id")[0]
        assert [(d.text, d.id) for d in found] == [(text, f"d{i}") for i, text in enumerate(expected)]
        assert csv_bytes()[found[500].offset :].startswith(b"d500,")


def test_each_bad_csv_row_has_its_reason_and_position(tmp_path):
    rows = [
        b"\xef\xbb\xbfid,text",
        b'1,"a\r\nb"',
        b"2,x,y",
        b"3,caf\xe9",
        b"",
        b'4,"ok"z',
        b"5,fine",
        b'6,"open',
        b"7,x",
    ]
    data = b"\r\n".join(rows) + b"\r\n"
    (tmp_path / "a.csv").write_bytes(data)
    found, account = read(tmp_path / "a.csv")
    assert [document.text for document in found] == ["a\nb", "fine"]
    assert account.counts == {"kept": 2, "bad_csv": 2, "not_utf8": 1}
    places = [data.index(row) for row in (b"2,x,y", b"3,caf", b'4,"ok', b'6,"open')]
    assert [place["byte"] for place in [*account.places, *account.damage]] == places
    assert "the quote that opens here is not closed, so the 14 bytes from this row on" in account.damage[0]["detail"]


def test_csv_rows_with_lines_that_are_too_long_are_rejected_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 256)
    generator, path, longest = random.Random(1), tmp_path / "a.csv", 2000
    pieces = (
        "a",
        'say ""',
        '"',
        ",",
        "é" * 90,
        '"",x"\n' + "b" * 5000,
        'c"' * 3 + "d" * 6000 + '"',
        "\n",
        ' "e" ' * 20,
    )
    for delimiter in ",\t":
        rows = [["".join(generator.choices(pieces, k=generator.randint(0, 3))) for _ in "ab"] for _ in range(400)]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([["one", "two"], *rows])
        data = path.read_bytes()
        found = list(csv_rows(Piece(str(path), 0, len(data)), longest, lambda _: None, delimiter))
        assert len(found) == 400
        assert {type(row) for row in found} == {Row, Reject}
        for row, expected, following in zip(found, rows, [*found[1:], None], strict=True):
            if isinstance(row, Row):
                assert list(row.values.values()) == expected
            else:
                assert row.reason == "too_long"
                assert row.offset + row.bytes == (following.offset if following else len(data))


def test_files_at_a_url_are_read_like_local_ones(tmp_path):
    system = fsspec.filesystem("memory")
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    write_arrow(tmp_path / "s.arrow", pa.ipc.new_stream)
    write_arrow(tmp_path / "f.arrow", pa.ipc.new_file)
    contents = {"a.txt": PLAIN["txt"], "b.jsonl.gz": gzip.compress(PLAIN["jsonl"])}
    contents |= {name: (tmp_path / name).read_bytes() for name in ("a.parquet", "s.arrow", "f.arrow")}
    for name, content in contents.items():
        system.pipe_file(f"/formats/{name}", content)
        assert texts(f"memory://formats/{name}") == TEXTS
