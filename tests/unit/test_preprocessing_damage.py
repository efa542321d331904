"""A damaged file ends a job with the file's name, before the work begins if possible, unless damage is allowed."""

import gzip
import io
import itertools
import json
import lzma
import os
import re

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFile

from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.inputs import streams
from ds_roberta.inputs.pieces import Piece, Reject
from ds_roberta.inputs.tables import read_table
from preprocessing import sharding
from preprocessing.cli import main
from preprocessing.reading import planning
from preprocessing.reading.accounts import Account, BadDocuments, kept_documents
from preprocessing.reading.documents import ReadOptions
from preprocessing.reading.planning import plan_units

ROWS = [{"text": f"Row {i} has {'many ' * (i % 40)}words."} for i in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKED = gzip.compress(LINES, mtime=0)


def run(*command):
    with pytest.raises(SystemExit) as exit_:
        main([str(part) for part in command])
    return exit_.value.code


@pytest.fixture
def shard(tokenizer_folder, tmp_path, monkeypatch, capsys):
    """A function that prepares the files in `text`: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()

    def run_shard(*options, workers=1, text="text"):
        command = ["shard", "--input", text, "--tokenizer", tokenizer_folder, "--output", "out"]
        code = run(*command, "--workers", workers, *options)
        return code, *capsys.readouterr()

    return run_shard


def account_of(path, **options):
    options, account = ReadOptions(**options), Account()
    kept = list(kept_documents(Piece(str(path), 0, path.stat().st_size), options, account))
    return kept, account


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_file_ends_the_job_and_the_option_resumes_it(shard, tmp_path, workers):
    (tmp_path / "text/a.jsonl.gz").write_bytes(PACKED[:-900])
    (tmp_path / "text/b.txt").write_text("Another text.")
    (tmp_path / "text/c.jsonl.gz").write_bytes(PACKED)
    code, _, error = shard(workers=workers)
    assert (code, len(error.splitlines())) == (2, 1)
    assert re.search(r"'text/a.jsonl.gz', line \d+ \(byte \d+\): .* all \d+ bytes of the file were read", error)
    assert "--allow_damaged_files" in error
    assert not (tmp_path / "out").exists()
    assert "1 of 1 units are kept" in error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "shard_unit", None)  # nothing is left to do
        code, output, error = shard("--allow_damaged_files", workers=workers)
    assert code == 0
    first, *others = Corpus.open("out").manifest.inputs
    assert 0 < first.documents_read == first.documents_kept < 500
    assert first.rejected == {}
    assert [place["reason"] for place in first.damage] == ["truncated"]
    assert [entry.damage for entry in others] == [(), ()]
    assert "damaged     'text/a.jsonl.gz', line" in output


def test_every_task_of_an_array_meets_the_damage_of_its_share(shard, tmp_path):
    (tmp_path / "text/a.jsonl.gz").write_bytes(PACKED[:-9])
    assert shard("--task", "1/1")[0] == 2
    assert shard("--task", "1/1", "--allow_damaged_files")[0] == 0


def test_a_tokenizer_is_not_trained_on_half_a_file(tmp_path, capsys):
    (tmp_path / "a.jsonl.gz").write_bytes(PACKED[:-9])
    command = ["train-tokenizer", "--input", tmp_path / "a.jsonl.gz", "--vocab_size", 270, "--output", tmp_path / "t"]
    assert run(*command) == 2
    assert "a.jsonl.gz', line" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert run(*command, "--allow_damaged_files") == 0


def parquet(cut=None):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()[:cut]


def arrow(cut=None, new=pa.ipc.new_stream):
    file = io.BytesIO()
    table = pa.Table.from_pylist(ROWS)
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return file.getvalue()[:cut]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl.gz", b"<html>not found</html>", "0% of the file"),
        ("a.jsonl.zst", b"", "all 0 bytes"),
        ("a.parquet", parquet(-20), "0% of the file"),
        ("a.parquet", b"", "0% of the file"),
        ("a.arrow", arrow(-3000), "row 400"),
        ("a.txt", "Text.".encode("utf-16"), "is UTF-16 by its first bytes"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "is UTF-16LE by its first bytes"),
        ("a.csv.gz", gzip.compress("text\nText".encode("utf-16"), mtime=0), "is UTF-16 by its first bytes"),
        ("a.txt", "Съешь же ещё этих мягких булок\n".encode("utf-16-le"), "is UTF-16LE by its first bytes"),
        ("a.txt.xz", lzma.compress("“Съешь ещё”\n".encode("utf-16-be")), "is UTF-16BE by its first bytes"),
        ("a.txt", "Text".encode("utf-32-le"), "is UTF-32LE by its first bytes"),
        ("a.txt", "Text".encode("utf-32-be"), "is UTF-32BE by its first bytes"),
    ],
)
def test_what_the_ends_of_a_file_show_is_reported_before_the_work(shard, tmp_path, name, content, named, monkeypatch):
    (tmp_path / "text/0.txt").write_text("A text.")
    (tmp_path / "text" / name).write_bytes(content)
    monkeypatch.setattr(sharding, "opened_job", None)
    code, _, error = shard()
    assert (code, len(error.splitlines())) == (2, 1)
    assert f"'text/{name}'" in error
    assert named in error


@pytest.mark.parametrize("text", ["a\0b\0 hello", "\0\0\0\0", "\0 and some words", "a\0", "один\0два\n"])
def test_zeros_in_utf_8_are_no_other_encoding(tmp_path, text):
    for name, content in (("a.txt", text.encode()), ("b.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        (document,) = account_of(tmp_path / name)[0]
        assert document.text.rstrip("\n") == text.rstrip("\n")


def test_a_zstandard_window_of_2_gib_is_read(tmp_path):
    window = bytes([(31 - 10) << 3])
    frame = b"\x28\xb5\x2f\xfd\0" + window + (len(LINES) << 3 | 1).to_bytes(3, "little") + LINES  # one raw block
    (tmp_path / "a.jsonl.zst").write_bytes(frame * 2)
    kept, account = account_of(tmp_path / "a.jsonl.zst")
    assert [document.text for document in kept] == [row["text"] for row in ROWS] * 2
    assert account.damage == []


def csv_of(rows):
    return "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(rows))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_quote_that_nothing_closes_names_its_row_and_what_follows(tmp_path, newline):
    rows = [f"row {i}" for i in range(100)]
    rows[40] = '"unclosed'
    data = csv_of(rows).replace("\n", newline).encode()
    start = data.index(b"40,")
    for name, content in (("a.csv", data), ("a.csv.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        kept, account = account_of(tmp_path / name)
        assert [document.text for document in kept] == rows[:40]
        assert account.counts == {"kept": 40}
        (place,) = account.damage
        assert (place["reason"], place["byte"]) == ("unclosed_quote", start)
        assert (
            f"the quote that opens here is not closed, so the {len(data) - start} bytes from this row on"
            in place["detail"]
        )
        assert f"{100 * start / len(data):.0f}" in place["detail"].split()[-6]


def test_a_quote_that_is_open_for_too_long_ends_the_reading_of_its_file(tmp_path):
    rows = ["good", '"open', *(["x" * 1000] * 3000), '"']
    (tmp_path / "a.csv").write_text(csv_of(rows))
    kept, account = account_of(tmp_path / "a.csv", max_characters=1000)
    assert [document.text for document in kept] == ["good"]
    assert "the quote that opens here is not closed within 1056576 bytes" in account.damage[0]["detail"]
    kept, account = account_of(tmp_path / "a.csv")
    assert (account.counts, account.damage) == ({"kept": 1, "too_long": 1}, [])


def test_a_line_that_is_too_long_spoils_only_its_row(tmp_path):
    rows = ["good", '"a line', *["b"], "c" * 3_000_000, '"', "last"]
    text = csv_of(rows)
    (tmp_path / "a.csv").write_text(text)
    kept, account = account_of(tmp_path / "a.csv", max_characters=100)
    assert [document.text for document in kept] == ["good", "last"]
    assert (account.counts, account.damage) == ({"kept": 2, "too_long": 1}, [])
    assert account.too_long_bytes > 3_000_000


def test_a_csv_of_lone_returns_is_read_row_by_row(tmp_path):
    rows = [f"row {i}" for i in range(2000)]
    rows[7] = '"a\rb"'
    (tmp_path / "a.csv").write_bytes(csv_of(rows).replace("\n", "\r").encode())
    kept, account = account_of(tmp_path / "a.csv")
    assert [document.text for document in kept][6:9] == ["row 6", "a\nb", "row 8"]
    assert account.counts == {"kept": 2000}


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "s.arrow", "f.arrow"])
def test_a_column_that_is_there_twice_is_named_in_an_error(tmp_path, name):
    table = pa.table([["x"], ["y"], ["z"]], names=["text", "text", "n"])
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("text,text,n\nx,y,z\n")
    elif name == "a.parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if name == "s.arrow" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)

    def read():
        (unit,) = plan_units([str(path)], ReadOptions())
        list(kept_documents(unit.pieces[0], ReadOptions(), Account()))

    with pytest.raises(UserError, match=rf"{name}' has 2 columns named 'text'"):
        read()
    options = ReadOptions(text_column="n")
    (unit,) = plan_units([str(path)], options)
    assert [document.text for document in kept_documents(unit.pieces[0], options, Account())] == ["z"]


def test_a_file_that_changes_while_it_is_read_is_an_error(shard, tmp_path, monkeypatch):
    path = tmp_path / "text/a.txt"
    path.write_text("Some text.")
    work = sharding.shard_unit

    def append_and_work(*arguments):
        path.write_text("Some text.\n\nMore text.")
        return work(*arguments)

    monkeypatch.setattr(sharding, "shard_unit", append_and_work)
    code, _, error = shard()
    assert code == 2
    assert "'text/a.txt' changed while it was read" in error
    assert "are kept" not in error  # the plan of the next call is another
    monkeypatch.setattr(sharding, "shard_unit", work)
    assert shard()[0] == 0
    assert Corpus.open("out").manifest.inputs[0].documents_kept == 2


def test_an_array_in_one_line_is_not_one_bad_document(shard, tmp_path):
    (tmp_path / "text/a.jsonl").write_bytes(LINES + json.dumps(ROWS).encode())
    code, _, error = shard()
    assert code == 2
    assert re.search(r"'text/a.jsonl', line 501 .* an array of 500 documents in one line .* jq -c '\.\[\]'", error)
    assert shard("--allow_damaged_files")[0] == 0
    assert Corpus.open("out").manifest.inputs[0].rejected == {}


def test_a_read_error_names_file_and_place(shard, tmp_path, monkeypatch):
    (tmp_path / "text/a.jsonl").write_bytes(LINES)

    class Disk(io.BytesIO):
        def read(self, size=-1):
            if size > 1000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(streams, "open_binary", lambda path: Disk(LINES))
    code, _, error = shard("--allow_damaged_files")
    assert (code, len(error.splitlines())) == (2, 1)
    assert f"'text/a.jsonl' at byte 0 of {len(LINES)}: Input/output error" in error


@pytest.mark.parametrize(
    ("name", "content", "failure"),
    [
        ("a.parquet", parquet(), FSTimeoutError()),
        ("a.arrow", arrow(), RuntimeError("no answer")),
        ("f.arrow", arrow(new=pa.ipc.new_file), OSError("Forbidden")),
        ("a.jsonl.gz", PACKED, RuntimeError("no answer")),
    ],
)
def test_what_the_network_refuses_is_never_damage(shard, name, content, failure, monkeypatch):
    fsspec.filesystem("memory").pipe_file(f"/refused/{name}", content)
    url = f"memory://refused/{name}"
    for answered in itertools.count():
        answers = iter(range(answered))

        def read(file, size=-1, answers=answers):
            if next(answers, None) is None:
                raise failure
            return io.BytesIO.read(file, size)

        monkeypatch.setattr(MemoryFile, "read", read, raising=False)
        code, _, error = shard("--allow_damaged_files", text=url)
        if code == 0:
            break
        assert (code, len(error.splitlines())) == (2, 1)
        assert f"cannot read {url!r}" in error
    assert answered > 1
    (entry,) = Corpus.open("out").manifest.inputs
    assert (entry.documents_kept, entry.damage) == (500, ())


@pytest.mark.parametrize(("name", "content"), [("a.parquet", parquet()), ("a.arrow", arrow(new=pa.ipc.new_file))])
def test_a_table_that_is_whole_only_when_it_is_read_loses_nothing(shard, tmp_path, name, content, monkeypatch):
    (tmp_path / "text" / name).write_bytes(content)
    monkeypatch.setattr(planning, "measure_table", lambda *arguments: ([], True))
    assert shard()[0] == 0
    assert Corpus.open("out").manifest.inputs[0].documents_kept == 500


def test_a_damaged_unit_is_done_again(shard, tmp_path):
    path = tmp_path / "text/a.jsonl.gz"
    path.write_bytes(PACKED[:-9] + b"?" + PACKED[-8:])
    found = path.stat().st_mtime_ns
    assert shard()[0] == 2
    path.write_bytes(PACKED)
    os.utime(path, ns=(found, found))  # as at a URL, of which only the size is known
    assert shard()[0] == 0
    assert Corpus.open("out").manifest.inputs[0].documents_kept == 500


def test_the_closing_table_says_how_much_was_too_long(shard, tmp_path):
    (tmp_path / "text/a.txt").write_text("kept\n\n" + "line é\n" * 2000)
    (tmp_path / "text/b.jsonl").write_text(json.dumps({"text": "x" * 5000}) + "\n")
    code, output, _ = shard("--max_characters", "1000")
    assert code == 0
    assert f"too_long    2 documents, {2000 * 8 + 5000} bytes of text, most in 'text/a.txt' (16000 bytes)" in output
    assert "--documents line" in output
    assert [entry.too_long_bytes for entry in Corpus.open("out").manifest.inputs] == [16000, 5000]


def test_the_remedy_fits_the_commonest_reason():
    account = Account()
    for reason in ["missing_column"] * 6 + ["bad_json"] * 7:
        account.reject("a.jsonl", Reject(reason, 0, reason))
    bad = BadDocuments(0.5, ReadOptions())
    bad.add({"a.jsonl": account})
    with pytest.raises(UserError, match=r"13 of 13 .* bad_json; fix or remove the line"):
        bad.check()


def test_a_row_group_that_ends_early_is_damage(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=250)
    whole = pq.ParquetFile.iter_batches

    def cut(file, *arguments, **options):
        return iter(list(whole(file, *arguments, **options))[:-1])

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", cut)
    (unit,), account = plan_units([str(tmp_path / "a.parquet")], ReadOptions()), Account()
    assert len(list(kept_documents(unit.pieces[0], ReadOptions(), account))) == 256
    assert account.counts == {"kept": 256, "corrupt": 244}
    assert account.damage[0]["detail"] == "row group 0 of 2 (fewer rows than its index says), 122 of 500 rows are lost"


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_offsets_outside_of_the_values_are_damage_in_any_column(tmp_path, new):
    names = pa.array([["a" * 1111], ["b" * 1111]])
    table = pa.table({"text": ["x", "y"], "id": names, "other": [1, 2]})
    path = tmp_path / "a.arrow"
    with new(str(path), table.schema) as writer:
        writer.write_table(table)
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 1111, 2222))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little")))
    (unit,) = plan_units([str(path)], ReadOptions())
    account = Account()
    assert not list(kept_documents(unit.pieces[0], ReadOptions(id_column="id"), account))
    assert account.counts == {"corrupt": 2}
    with pytest.raises(UserError, match="cannot be read"):
        read_table(path)


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_column_whose_name_is_not_utf8_is_damage(tmp_path, new):
    table = pa.table({"text": ["x", "y"], "another": [1, 2]})
    path = tmp_path / "a.arrow"
    with new(str(path), table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"another", b"an\xffther"))
    (unit,) = plan_units([str(path)], ReadOptions())
    account = Account()
    assert not list(kept_documents(unit.pieces[0], ReadOptions(), account))
    assert account.damage[0]["detail"].startswith("'utf-8' codec can't decode byte 0xff")
    with pytest.raises(UserError, match="byte 0xff"):
        read_table(path)
