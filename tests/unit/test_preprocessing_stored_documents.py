"""The positions of documents in their inputs: what is there is the document."""

import csv
import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import forget_filter, prepare_corpus

from ds_roberta.data.manifest import PACKING_VERSION
from ds_roberta.data.shards import Corpus
from preprocessing.cli import main
from preprocessing.prepared.megatron import export_split, import_dataset
from preprocessing.prepared.stored_documents import Decoder, Origins, StoredDocuments
from preprocessing.units import ShardOptions

TEXTS = [f"document {number}\n  of   three lines, {'é' * (number % 5)}\nand no more" for number in range(30)]

SKIPPING = ShardOptions(validation_fraction=0.0, max_bad_fraction=0.5)


def write_inputs(folder):
    plain, rows = folder / "a.txt", [{"text": text} for text in TEXTS]
    plain.write_bytes("\n\n\n".join([*TEXTS[:10], "  "]).replace("\n", "\r\n").encode() + b"\n\n\xff\n")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "b.jsonl").write_text("\n".join([lines[0], "{broken", "", *lines[11:20]]) + "\n")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:25]).encode()))
    with (folder / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([text] for text in TEXTS[25:28])])
    pq.write_table(pa.Table.from_pylist([{"text": " "}, *rows[28:]]), folder / "e.parquet", row_group_size=2)


def text_at(path, begin, end):
    if path.suffix == ".parquet":
        return pq.read_table(path)["text"][begin].as_py()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = data[begin:end].decode()
    if path.suffix == ".csv":
        return next(csv.reader([found]))[0]
    return json.loads(found)["text"] if "json" in path.name else found.replace("\r\n", "\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("origins")
    (folder / "input").mkdir()
    write_inputs(folder / "input")
    command = f"shard --input {folder}/input --tokenizer {tokenizer_folder} --output {folder}/data"
    with pytest.raises(SystemExit) as ended:
        main(f"{command} --workers 1 --validation_fraction 0 --max_bad_fraction 0.5".split())
    assert ended.value.code == 0
    return folder


def test_every_document_is_found_where_it_is(prepared):
    corpus = Corpus.open(prepared / "data")
    documents = StoredDocuments(corpus, "train")
    origins, found = Origins(corpus, documents, Decoder(corpus)), []
    for number in range(len(documents)):
        document = documents.document(number)
        begin, end = origins.span(document)
        found.append(text_at(prepared / "input" / document.source.path.rpartition("/")[2], begin, end).strip())
    assert sorted(found) == sorted([TEXTS[0], *TEXTS[:10], *TEXTS[11:]])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.txt", [b"hello one\n\n", b"the second has a bad \xff byte\n\n", b"third\n"]),
        ("a.jsonl", [b'{"text": "hello one"}\n', b'{"text": "a bad \xff byte"}\n', b'{"text": "third"}\n']),
    ],
)
def test_a_document_ends_where_a_bad_one_begins(tmp_path, tokenizer_folder, name, parts):
    (tmp_path / name).write_bytes(b"".join(parts))
    prepare_corpus([str(tmp_path / name)], tokenizer_folder, tmp_path / "data", SKIPPING)
    corpus = Corpus.open(tmp_path / "data")
    documents = StoredDocuments(corpus, "train")
    origins = Origins(corpus, documents, Decoder(corpus))
    assert origins.span(documents.document(0)) == (0, len(parts[0]))


def corpus_of(folder, texts, tokenizer):
    """Texts in `a.jsonl`, prepared with their sentences found by rules."""
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    command = f"shard --input {folder}/a.jsonl --tokenizer {tokenizer} --output {folder}/data"
    with pytest.raises(SystemExit, match="0"):
        main(f"{command} --workers 1 --validation_fraction 0 --sentences rules".split())
    return Corpus.open(folder / "data")


def test_sentences_without_a_space_between_them_keep_the_text(tmp_path, tokenizer_folder):
    texts = ["今天天气很好。你去北京吗？我们走！ 好。", "今日は。\n「はい。」 そう。", "wie 「a。b」。Ja. Nein."]
    corpus = corpus_of(tmp_path, texts, tokenizer_folder)
    assert corpus.manifest.packing_version == PACKING_VERSION
    documents, decoder = StoredDocuments(corpus, "train"), Decoder(corpus)
    origins = Origins(corpus, documents, decoder)
    for number, (text, sentences) in enumerate(zip(texts, (4, 3, 4), strict=True)):
        document = documents.document(number)
        assert len(documents.sentences(document)) == sentences
        assert decoder.text(documents.sentences(document)).replace("\n", " ") == text.replace("\n", " ")
        assert text_at(tmp_path / "a.jsonl", *origins.span(document)) == text


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"normalizer": {"type": "Lowercase"}},
    ],
)
def test_documents_that_their_tokenizer_changed_are_found(tmp_path, tokenizer_folder, changes):
    shutil.copytree(tokenizer_folder, tmp_path / "tok")
    content = json.loads((tmp_path / "tok/tokenizer.json").read_text())
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps({**content, **changes}))
    texts = ["Ka to. Mi ren", "Sul", "minka Karen"]
    corpus = corpus_of(tmp_path, texts, tmp_path / "tok")
    documents = StoredDocuments(corpus, "train")
    origins = Origins(corpus, documents, Decoder(corpus))
    for number, text in enumerate(texts):
        assert text_at(tmp_path / "a.jsonl", *origins.span(documents.document(number))) == text


def test_a_filter_knows_the_sources_that_arguments_name(tmp_path, tokenizer_folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "only_wiki.py").write_text("def judge(text, about):\n    return about['source'] == 'wiki'\n")
    for name, texts in (("a", TEXTS[:9]), ("b", TEXTS[9:])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    read = f"--input wiki={tmp_path}/a.txt books={tmp_path}/b.txt --filter only_wiki:judge --max_bad_fraction 0.9"
    shard = f"shard {read} --tokenizer {tokenizer_folder} --output {tmp_path}/data --workers 1 --validation_fraction 0"
    for command in (shard, f"train-tokenizer {read} --vocab_size 300 --output {tmp_path}/tokenizer"):
        with pytest.raises(SystemExit, match="0"):
            main(command.split())
    assert "trained on 9 documents" in capsys.readouterr().out
    corpus = Corpus.open(tmp_path / "data")
    documents = StoredDocuments(corpus, "train")
    origins = Origins(corpus, documents, Decoder(corpus))
    assert len(documents) == 9
    assert all(origins.span(documents.document(number)) for number in range(9))
    (tmp_path / "only_wiki.py").unlink()
    forget_filter("only_wiki")
    with pytest.raises(SystemExit, match="2"):
        main(f"show {tmp_path}/data --doc 0 --offsets".split())
    assert "cannot load --filter 'only_wiki:judge'" in capsys.readouterr().err


def test_show_and_trace_name_the_position(prepared, capsys):
    with pytest.raises(SystemExit):
        main(f"show {prepared}/data --doc 1 --offsets".split())
    assert f"  place  byte {len(TEXTS[0].encode()) + 2 + 6} to " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(f"trace {prepared}/data --step 1 --train_batch_size 4 --max_seq_length 32 --json --offsets".split())
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        begin, end, path = row["input_start"], row["input_end"], prepared / "input" / row["input"].rpartition("/")[2]
        assert text_at(path, begin, end).strip() in TEXTS


def test_why_a_position_is_unknown_is_said(prepared, tmp_path, tokenizer_folder, capsys, monkeypatch):
    def shown(folder):
        with pytest.raises(SystemExit, match="0"):
            main(f"show {folder} --doc 0 --offsets".split())
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  place  ")]
        return line.removeprefix("  place  ")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")
    prepare_corpus(["a.txt"], tokenizer_folder, tmp_path / "data", SKIPPING)
    assert shown("data") == "byte 0 to 9"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    why = "unknown: cannot read 'a.txt': No such file or directory"
    assert shown("../data") == f"{why} (the path is relative to the folder in which the data was prepared)"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("same size\n")
    assert shown("data") == "no longer there"

    export_split(Corpus.open("data"), "train", tmp_path / "m")
    import_dataset({"train": tmp_path / "m"}, tokenizer_folder, tmp_path / "imported")
    assert shown("imported") == f"unknown: '{tmp_path}/m.bin' is not text"

    path = StoredDocuments(Corpus.open(prepared / "data"), "train").document(0).source.path
    (prepared / "input").rename(tmp_path / "gone")
    assert shown(prepared / "data") == f"unknown: cannot read {path!r}: No such file or directory"
    with pytest.raises(SystemExit, match="0"):
        main(f"trace {prepared}/data --step 1 --train_batch_size 4 --max_seq_length 32 --json --offsets".split())
    (row, *_) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["input"]
    assert row["input_start"] is row["input_end"] is None
