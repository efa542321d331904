"""Tables as people and other tools write them: the same rows from every format, and errors that name the row."""

import bz2
import csv
import gzip
import io
import json
import lzma

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from ds_roberta.errors import UserError
from ds_roberta.inputs import tables
from ds_roberta.inputs.tables import read_saved_splits, read_table

ROWS = [
    {"text": 'she said "yes", and left', "label": "a b"},
    {"text": "one\ttab,\nand two lines", "label": "c"},
    {"text": "gräßlich ☕", "label": "None"},
]
PLAIN = [{"text": 'a "quoted" word', "label": "1"}, {"text": '"all of it"', "label": "0"}]
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def frame(rows=ROWS):
    return pandas.DataFrame(rows)


def stream(table):
    written = io.BytesIO()
    with pyarrow.ipc.new_stream(written, table.schema) as writer:
        writer.write_table(table)
    return written.getvalue()


FORMATS = {
    "a.jsonl": lambda path: frame().to_json(path, orient="records", lines=True),
    "lines.json": lambda path: frame().to_json(path, orient="records", lines=True),
    "array.json": lambda path: frame().to_json(path, orient="records", indent=2),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "bom.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "a.csv": lambda path: frame().to_csv(path, index=False),
    "bom.csv": lambda path: frame().to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n"),
    "pandas.tsv": lambda path: frame().to_csv(path, index=False, sep="\t"),
    "all.tsv": lambda path: frame().to_csv(path, index=False, sep="\t", quoting=1),
    "a.parquet": lambda path: frame().to_parquet(path),
    "file.arrow": lambda path: pyarrow.feather.write_feather(frame(), path, compression="uncompressed"),
    "stream.arrow": lambda path: path.write_bytes(stream(pyarrow.Table.from_pylist(ROWS))),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    FORMATS[name](tmp_path / name)
    table = read_table(tmp_path / name)
    assert (table.rows, table.columns) == (ROWS, ("text", "label"))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "pandas.tsv"])
def test_compressed_files_are_read_and_damaged_ones_named(tmp_path, name, suffix):
    FORMATS[name](tmp_path / name)
    whole = COMPRESS[suffix]((tmp_path / name).read_bytes())
    compressed = tmp_path / f"{name}.{suffix}"
    compressed.write_bytes(whole)
    assert read_table(compressed).rows == ROWS
    compressed.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=rf"{name}.{suffix}.*; download the file again"):
        read_table(compressed)


def test_rows_are_numbered_by_their_lines_or_as_rows(tmp_path):
    FORMATS["a.csv"](tmp_path / "a.csv")
    FORMATS["a.parquet"](tmp_path / "a.parquet")
    (tmp_path / "gap.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    numbers = {name: list(read_table(tmp_path / name).numbers) for name in ("a.csv", "a.parquet", "gap.jsonl")}
    assert numbers == {"a.csv": [2, 3, 5], "a.parquet": [1, 2, 3], "gap.jsonl": [2, 4]}
    assert read_table(tmp_path / "a.csv").select([2]).place(0) == f"{tmp_path}/a.csv, row 5"


@pytest.mark.parametrize(
    "rows", [PLAIN, [*PLAIN, {"text": 'open "', "label": "0"}], [{"text": '"', "label": "1"}], [PLAIN[0]]]
)
def test_quotes_of_a_plain_tsv_are_text(tmp_path, rows):
    lines = ["text\tlabel", *("\t".join(row.values()) for row in rows)]
    (tmp_path / "glue.tsv").write_text("\n".join(lines) + "\n")
    assert read_table(tmp_path / "glue.tsv").rows == rows


def test_empty_cells_of_a_plain_tsv_are_a_row_and_empty_lines_are_none(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\r\n\r\na\tb\r\n\t\r\n \r\n")
    table = read_table(tmp_path / "a.tsv")
    assert table.rows == [{"text": "a", "label": "b"}, {"text": "", "label": ""}]
    assert list(table.numbers) == [3, 4]


@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
def test_a_tsv_that_pandas_wrote_is_read_as_pandas_reads_it(tmp_path, lineterminator):
    frame(PLAIN).to_csv(tmp_path / "a.tsv", sep="\t", index=False, lineterminator=lineterminator)
    assert read_table(tmp_path / "a.tsv").rows == PLAIN


def test_a_quoted_tsv_may_have_a_long_cell(tmp_path):
    csv.field_size_limit(1 << 17)  # Python's default
    rows = [{"text": 'a "long" text ' * 10_000, "label": "1"}]
    frame(rows).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert read_table(tmp_path / "a.tsv").rows == rows


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_a_table_without_rows_is_named(tmp_path, name):
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    if name == "a.parquet":
        pyarrow.parquet.ParquetWriter(tmp_path / name, empty.schema).close()
    else:
        pyarrow.ipc.new_file(str(tmp_path / name), empty.schema).close()
    with pytest.raises(UserError, match=f"{name}' has no rows"):
        read_table(tmp_path / name)


def test_a_spreadsheet_quotes_more_than_it_must(tmp_path):
    for rows, expected in {
        '"a, b"\t1\n"two\nlines"\t0\n': ["a, b", "two\nlines"],
        '"a, b"\t1\nplain\t0\n"say ""so"""\t0\n': ["a, b", "plain", 'say "so"'],
        '"a, b"\t1\nc, d\t0\n': ['"a, b"', "c, d"],  # no spreadsheet would write that
    }.items():
        (tmp_path / "a.tsv").write_text(f"text\tlabel\n{rows}")
        assert [row["text"] for row in read_table(tmp_path / "a.tsv").rows] == expected


def test_the_classes_of_a_table_that_datasets_wrote_have_their_names(tmp_path):
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["no", "yes"]), "tags": datasets.Sequence(datasets.ClassLabel(names=["O"]))}
    )
    rows = [{"label": 1, "tags": [0, 0]}, {"label": -1, "tags": []}]
    dataset = datasets.Dataset.from_list(rows, features=features)
    expected = [{"label": "yes", "tags": ["O", "O"]}, {"label": None, "tags": []}]
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    assert read_table(tmp_path / "a.parquet").rows == expected
    assert read_table(tmp_path / "one").rows == expected
    assert read_table(next((tmp_path / "one").glob("*.arrow"))).rows == expected
    assert {name: table.rows for name, table in read_saved_splits(tmp_path / "splits").items()} == {"train": expected}


def test_a_saved_data_set_whose_texts_are_not_utf_8_is_a_user_error(tmp_path):
    datasets.Dataset.from_list([{"text": "Grüße"}] * 3).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert "Grüße".encode() in file.read_bytes()
    file.write_bytes(file.read_bytes().replace("Grüße".encode(), "Grüß\xff".encode("latin-1") + b"e!"))
    with pytest.raises(UserError, match=r"saved' cannot be read \(.*UTF.?8.*\): save it again"):
        read_table(tmp_path / "saved")


@pytest.mark.filterwarnings(  # an older library leaves a file open
    f"{'ignore' if datasets.__version__ < '5.2' else 'error'}::pytest.PytestUnraisableExceptionWarning"
)
def test_a_data_set_of_the_hub_is_what_the_library_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        datasets.Dataset.from_list([{"text": split, "label": "x"}]).to_csv(f"hub/{split}.csv")
    load = tables.load_from_hub
    monkeypatch.setattr(tables, "load_from_hub", lambda name, *of_hub: load(f"./{name.split('/')[1]}", *of_hub))
    found = read_saved_splits("hf://datasets/me/hub")
    assert {name: table.rows for name, table in found.items()} == {
        split: [{"text": split, "label": "x"}] for split in ("train", "validation")
    }
    assert read_table("hf://datasets/me/hub?split=train").rows == [{"text": "train", "label": "x"}]
    with pytest.raises(
        UserError, match=r"has the splits train, validation: choose one .* hf://datasets/me/hub.split=train"
    ):
        read_table("hf://datasets/me/hub")
    with pytest.raises(UserError, match="cannot load the data set"):
        read_saved_splits("hf://datasets/me/none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'text,label\na,b\n"c,d\ne,f\n', "row 3: the quote that opens here is not closed.*; close the quote"),
        ("a.csv", b'text,label\ra,"b\nb"\rc\r', "row 4: the row has 1 field, the header 2"),  # as an editor counts
        ("a.csv", b"text,label\rc\r", "row 2: the row has 1 field"),
        ("a.csv", b"text,label\na\n", "row 2: the row has 1 field, the header 2; fix or remove the row"),
        ("a.csv", b"text;label\na;b\n", "separate columns by commas, not by semicolons"),
        ("a.csv", b"text,text\na,b\n", "has the column 'text' twice"),
        ("a.csv", b"text\n\xff\n", "row 2 is not UTF-8: convert the file, for example with iconv"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv", "text\nä\n".encode("utf-16"), "is UTF-16 by its first bytes, not UTF-8"),
        ("a.tsv", b"text\tlabel\na\n", "row 2: the row has 1 field, the header 2; fix or remove the row$"),
        ("a.csv", b'"text","label"\n"1","a","b"\n', "row 2: .* has 3 fields, .*; the first may be R's row"),
        ("a.tsv", b"text\tlabel\n1\ta\tb\n", r"row 2: the row has 3 fields, .* row\.names = FALSE.*; fix or remove"),
        ("a.csv", b"text,label\na,b\n1,a,b\n", "row 3: the row has 3 fields, the header 2; fix or remove the row$"),
        ("a.tsv", b"text\n\xff\n", "not UTF-8 at byte 5"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "row 2: not a JSON object; fix or remove the line"),
        ("a.jsonl", b'[{"text": "a"}]\n', "row 1: an array of 1 documents.*jq"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"row 1: byte 10 \(0xff\) is not UTF-8"),
        ("a.json", b'{"text": {"0": "a"}}', "is not an array of JSON objects, one for each row.*orient='records'"),
        ("a.json", b'[{"text": "a"}, 1]', "row 2 is not a JSON object"),
        ("a.json", b'[{"text": "\\ud800"}]', "row 1 is not Unicode"),
        ("a.json", b"[", "is not JSON"),
        ("a.parquet", b"PAR1", "row 1: .*; download the file again"),
        ("a.arrow", b"", "row 1: the file is empty, .*; download the file again"),
        ("a.xlsx", b"", r"cannot read .*a.xlsx' as a table: choose a file that ends in .jsonl, .json, .csv"),
        ("a.parquet.gz", b"", "cannot read .*as a table"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    "features", [b"", b"\xff", b"3", b'{"info": 1}', b'{"info": {"features": {"text": {"_type": "None"}}}}']
)
def test_features_that_datasets_cannot_read_are_named(tmp_path, features):
    table = pyarrow.table({"text": ["a"]}).replace_schema_metadata({"huggingface": features})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet' has features that datasets cannot read .*: save it again"):
        read_table(tmp_path / "a.parquet")


def test_a_time_that_python_does_not_have_is_named(tmp_path):
    table = pyarrow.table({"text": ["a"], "time": pyarrow.array([2**62], pyarrow.timestamp("s"))})
    pyarrow.feather.write_feather(table, tmp_path / "a.arrow", compression="uncompressed")
    with pytest.raises(UserError, match=r"a.arrow, row 1 or soon after cannot be read"):
        read_table(tmp_path / "a.arrow")


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30, 2**64 - 1])
def test_no_digit_of_a_long_number_is_lost(tmp_path, number):
    for name, content in (("a.jsonl", {"id": number, "b": [1.5, number]}), ("a.json", [{"id": number, "b": [number]}])):
        (tmp_path / name).write_text(json.dumps(content))
        (row,) = read_table(tmp_path / name).rows
        assert row["id"] == row["b"][-1] == number


def test_what_is_nested_too_deeply_is_named(tmp_path):
    for depth in (*range(900, 1030, 5), 100_000):  # around the limits of both parsers and of the writer
        value = f'{{"text": {"[" * depth}{"]" * depth}}}'
        for name, content in (("a.jsonl", value), ("a.json", f"[{value}]")):
            (tmp_path / name).write_text(content)
            try:
                assert len(read_table(tmp_path / name).rows) == 1
            except UserError as error:
                assert "nested too deeply" in str(error)  # noqa: PT017
    with pytest.raises(UserError, match="nested too deeply"):
        read_table(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.csv': No such file or directory"):
        read_table(tmp_path / "none.csv")
