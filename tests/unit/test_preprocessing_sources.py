"""Documents of several sources in one unit: every shard has one source, and all readers of shards still work."""

import gzip
import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import prepare_corpus

from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from preprocessing import units
from preprocessing.cli import main
from preprocessing.prepared.stored_documents import Decoder, StoredDocuments
from preprocessing.prepared.verify import verify
from preprocessing.reading.documents import ReadOptions
from preprocessing.units import ShardOptions, split_of

SOURCES = ("wiki", "books", None, "web/é, =")
TEXTS = [f"Text {i} says {'ka to mi ' * (i % 17)}so\nand ends." for i in range(120)]
FOUND = [SOURCES[i**3 % 11 % 4] for i in range(120)]


def options(**changes):
    return ShardOptions(**{"read": ReadOptions(source_column="from"), "validation_fraction": 0.2, **changes})


@pytest.fixture
def files(tmp_path):
    rows = [json.dumps({"text": text, "from": source}) + "\n" for text, source in zip(TEXTS, FOUND, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(rows[:60]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[60:]).encode()))
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz")]


def documents_by_source(folder, split):
    """The decoded documents of a split by the source of their shards, in order."""
    corpus = Corpus.open(folder)
    documents, decoder, found = StoredDocuments(corpus, split), Decoder(corpus), {}
    for document in map(documents.document, range(len(documents))):
        source = documents.split.shards[document.shard].source
        found.setdefault(source, []).append("\n".join(decoder.lines(documents.sentences(document))))
    return found


def run(*command):
    with pytest.raises(SystemExit) as exit_:
        main([str(part) for part in command])
    return exit_.value.code


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_every_shard_is_of_one_source(files, tokenizer_folder, tmp_path, monkeypatch, dedup):
    monkeypatch.setattr(units, "_BATCH_BYTES", 500)  # so that the compressed file has parts
    prepare_corpus(files, tokenizer_folder, tmp_path / "out", options(unit_bytes=2000, dedup=dedup), 1)
    for split in ("train", "validation"):
        expected = {}
        for text, source in zip(TEXTS, FOUND, strict=True):
            if split_of(text, 0.2) == split:
                expected.setdefault(source or "", []).append(text)
        assert documents_by_source(tmp_path / "out", split) == expected
        shards = Corpus.open(tmp_path / "out").manifest.splits[split]
        assert all(sum(piece.documents for piece in shard.pieces) == shard.documents for shard in shards)
    train = Corpus.open(tmp_path / "out").manifest.splits["train"]
    last_unit = [shard for shard in train if shard.pieces[0].path == files[1]]
    assert [shard.source for shard in last_unit[:4]] == ["", "books", "web/é, =", "wiki"]
    assert len(last_unit) > 5
    first, *others = [shard.file for shard in last_unit]
    assert others == [f"{first[:-6]}-{part:05d}.arrow" for part in range(1, len(last_unit))]


def test_copies_are_dropped_from_the_shards_of_their_source(files, tokenizer_folder, tmp_path):
    copies = [json.dumps({"text": text, "from": "copies"}) + "\n" for text in TEXTS[::3]]
    (tmp_path / "c.jsonl").write_text("".join(copies) + json.dumps({"text": "its own", "from": "copies"}))
    (tmp_path / "d.jsonl").write_text("".join(copies[:5]) + json.dumps({"text": "of wiki", "from": "wiki"}))
    paths = [*files, str(tmp_path / "c.jsonl"), str(tmp_path / "d.jsonl")]
    # All small files share a unit, so that shards lose some of their documents, all or none.
    prepare_corpus(paths, tokenizer_folder, tmp_path / "out", options(validation_fraction=0.0, dedup="exact"), 1)
    found = documents_by_source(tmp_path / "out", "train")
    assert found["copies"] == ["its own"]
    assert found["wiki"] == [*(t for t, s in zip(TEXTS, FOUND, strict=True) if s == "wiki"), "of wiki"]
    assert sum(map(len, found.values())) == 122


def test_names_of_sources_belong_to_the_identity_and_their_absence_changes_nothing(files, tokenizer_folder, tmp_path):
    manifests = []
    for name, sources in (("none", {}), ("one", dict.fromkeys(files, "x")), ("other", dict.fromkeys(files, "y"))):
        chosen = options(read=ReadOptions())
        manifests.append(prepare_corpus(files, tokenizer_folder, tmp_path / name, chosen, 1, sources)[0])
    assert len({manifest.fingerprint for manifest in manifests}) == 3
    assert [manifest.sources("train") for manifest in manifests] == [[], ["x"], ["y"]]
    checksums = [[shard.checksum for shard in manifest.splits["train"]] for manifest in manifests]
    assert checksums[0] == checksums[1] == checksums[2]


def test_what_reads_shards_knows_their_sources(files, tokenizer_folder, tmp_path, capsys):
    import datasets

    out = tmp_path / "out"
    prepare_corpus(files, tokenizer_folder, out, options(), 1)
    assert verify(out) == []
    opened = datasets.load_from_disk(str(out))
    assert {split: len(rows) for split, rows in opened.items()} == {
        split: Corpus.open(out).manifest.documents(split) for split in ("train", "validation")
    }
    assert run("export", out, "--format", "megatron", "--output", tmp_path / "m") == 0
    capsys.readouterr()

    assert run("stats", out, "--json", "--max_seq_length", 16) == 0
    stats = json.loads(capsys.readouterr().out)["splits"]["train"]
    train = [source for text, source in zip(TEXTS, FOUND, strict=True) if split_of(text, 0.2) == "train"]
    counts = Counter(source for source in train if source)
    assert {name: source["documents"] for name, source in stats["sources"].items()} == counts
    unnamed = sum(shard.tokens for shard in Corpus.open(out).manifest.splits["train"] if not shard.source)
    assert sum(source["tokens"] for source in stats["sources"].values()) == stats["tokens"] - unnamed
    assert run("stats", out, "--max_seq_length", 16) == 0
    sequences = stats["sources"]["wiki"]["packing"][0]["sequences"]
    assert f"source wiki: {counts['wiki']} documents" in (text := capsys.readouterr().out)
    assert f"sequences {sequences} of 16\n" in text

    assert run("trace", out, "--step", 1, "--train_batch_size", 40, "--max_seq_length", 32, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_file = {shard.file: shard.source for shard in Corpus.open(out).manifest.splits["train"]}
    assert all((row["source"] or "") == by_file[row["shard"]] for row in rows)
    assert len({row["source"] for row in rows}) == 4


def test_a_trace_by_weights_draws_their_shares(files, tokenizer_folder, tmp_path, capsys):
    sources = {files[0]: "a", files[1]: "b"}
    prepare_corpus(files, tokenizer_folder, tmp_path / "out", options(read=ReadOptions()), 1, sources)
    command = f"trace {tmp_path}/out --step 3 --train_batch_size 100 --max_seq_length 16 --json --source_weights"
    capsys.readouterr()
    assert run(*command.split(), "a=3,b=1") == 0
    rows = {row["place"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert Counter(row["source"] for row in rows.values()) == {"a": 75, "b": 25}
    assert run(*command.split(), "a=3,c=1") == 2
    assert "unknown source 'c'; the data's sources are a, b" in capsys.readouterr().err


def test_a_source_that_is_not_text_makes_a_bad_document(tmp_path, tokenizer_folder):
    whole = ("x,y=2", "new\nline", 7, ["x"], "", None, "\U0001f600")
    lines = [json.dumps({"text": f"text {i}", "from": source}) for i, source in enumerate([*whole, "\ud83d"])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    values = pa.array([b"good", b"caf\xe9", None]).view(pa.string())
    pq.write_table(pa.table({"text": ["one", "two", "three"], "from": values}), tmp_path / "b.parquet")
    chosen = options(max_bad_fraction=0.5, validation_fraction=0.0)
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    manifest, _ = prepare_corpus(paths, tokenizer_folder, tmp_path / "out", chosen, 1)
    first, second = manifest.inputs
    assert (first.rejected, second.rejected) == ({"bad_json": 1}, {"not_utf8": 1})
    assert (first.places[0]["byte"], second.places[0]["row"]) == (len("\n".join(lines[:-1])) + 1, 1)
    assert manifest.sources("train") == sorted(["x,y=2", "new\nline", "7", "['x']", "\U0001f600", "good"])
    assert Corpus.open(tmp_path / "out").manifest == manifest


@pytest.fixture
def with_columns(tmp_path, monkeypatch):
    """A working folder with a text in `a.txt` and two rows each in `b.jsonl`, `c.csv` and `d.parquet`; the second rows
    have no source."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "one", "subset": "web", "key": "1"}, {"text": "two", "subset": None, "key": "2"}]
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.csv").write_text("text,subset,key\none,web,1\ntwo,,2\n")
    pq.write_table(pa.Table.from_pylist(rows), "d.parquet")


@pytest.mark.parametrize("option", ["--source_column", "--id_column"])
@pytest.mark.parametrize("name", ["b.jsonl", "c.csv", "d.parquet", "all"])
def test_a_column_without_any_value_is_refused(with_columns, tokenizer_folder, capsys, option, name):
    inputs = ["a.txt", "n=b.jsonl", "c.csv", "d.parquet"] if name == "all" else [f"n={name}"]
    read = ("--input", *inputs, option, "subsett")
    for task in ([], ["--task", "1/1"]):
        sharding = ("shard", *read, "--tokenizer", tokenizer_folder, "--output", "out", "--workers", 1, *task)
        assert run(*sharding) == 2
        error = capsys.readouterr().err
        assert f"no document has a value in {option} 'subsett': write" in error
        assert "are kept" not in error  # the next command has other options
        assert not os.path.exists(".out.partial")
    assert run("train-tokenizer", *read, "--vocab_size", 300, "--output", "out") == 2
    assert f"no document has a value in {option} 'subsett': write" in capsys.readouterr().err
    assert not os.path.exists("out")


def test_documents_without_a_value_in_a_column_are_counted(with_columns, tokenizer_folder, capsys):
    inputs = ("a.txt", "n=b.jsonl", "m=c.csv", "d.parquet")  # each a unit, the first without columns
    read = ("--input", *inputs, "--source_column", "subset", "--id_column", "key")
    out = ("--output", "out", "--workers", 1, "--dedup", "exact", "--validation_fraction", 0)
    assert run("shard", *read, "--tokenizer", tokenizer_folder, *out) == 0
    lines = [
        f"{n} documents have no value in the column of --{name}" for n, name in ((1, "id_column"), (4, "source_column"))
    ]
    assert [line for line in capsys.readouterr().out.splitlines() if "no value" in line] == [
        f"without     {line}" for line in lines
    ]
    manifest = Corpus.open("out").manifest
    assert [info.without_value for info in manifest.inputs] == [
        {"id_column": 1, "source_column": 1},
        *[{"source_column": 1}] * 3,
    ]
    assert run("train-tokenizer", *read, "--vocab_size", 300, "--output", "tokenizer") == 0
    output = capsys.readouterr().out
    assert all(f"without     {line}\n" in output for line in lines)


@pytest.mark.parametrize("option", ["--source_column", "--id_column", "--text_column"])
def test_text_files_have_no_columns(with_columns, tokenizer_folder, capsys, option):
    for command in (("shard", "--tokenizer", tokenizer_folder), ("train-tokenizer",)):
        assert run(*command, "--input", "a.txt", "--output", "out", option, "subset") == 2
        assert f"{option} 'subset' names a column, but all inputs are text files" in capsys.readouterr().err


def test_too_many_sources_are_refused(tokenizer_folder, tmp_path):
    lines = [json.dumps({"text": f"text {i}", "from": f"https://{i}"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"more than 256 sources in one part of .*a\.jsonl"):
        prepare_corpus([str(tmp_path / "a.jsonl")], tokenizer_folder, tmp_path / "out", options(), 1)
    assert not (tmp_path / "out").exists()
