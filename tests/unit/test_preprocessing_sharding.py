"""From text files to a data folder."""

import gzip
import itertools
import json
from dataclasses import replace

import pytest
from prepare import DOCUMENTS, folder_hash, prepare_corpus

from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.files import replaced_folder
from preprocessing.reading.documents import ReadOptions
from preprocessing.tokens.bpe import train_bpe
from preprocessing.units import ShardOptions, split_of

OPTIONS = ShardOptions(validation_fraction=0.2, unit_bytes=4000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([[document] for document in DOCUMENTS]), 300, folder)
    return folder


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS[:100]), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("\r\n\r\n".join(DOCUMENTS[100:110]).replace("\n", "\r\n").encode())
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS[110:], " "]))
    return [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]


@pytest.fixture
def bad_file(tmp_path):
    """Three documents, of which the second is not UTF-8."""
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good\n\nbad \xff\n\nlast")
    return str(path)


def texts(folder, tokenizer):
    """The documents of each split, decoded."""
    from tokenizers import Tokenizer

    corpus, decoder = Corpus.open(folder), Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    found = {}
    for name in ("train", "validation"):
        split = corpus.split(name)
        found[name] = []
        for shard in range(len(split.shards)):
            values, offsets = split.values(shard), split.document_offsets(shard)
            starts, ends = split.sentence_bounds(shard)
            for begin, end in itertools.pairwise(offsets):
                assert values[end - 1] == 2
                inside = (starts >= begin) & (starts < end)
                lines = [decoder.decode(values[s:e]) for s, e in zip(starts[inside], ends[inside], strict=True)]
                assert all(line.startswith(" ") for line in lines[1:])
                found[name].append("\n".join(line.removeprefix(" ") for line in lines))
    return found


def test_every_document_arrives_whole_in_the_order_of_the_input(files, tokenizer, tmp_path):
    manifest, totals = prepare_corpus(files, tokenizer, tmp_path / "out", OPTIONS, workers=1)
    found = texts(tmp_path / "out", tokenizer)
    expected = {"train": [], "validation": []}
    for text in DOCUMENTS:
        expected[split_of(text, 0.2)].append(text)
    assert found == expected
    assert len(expected["train"]) > 100
    assert len(expected["validation"]) > 10
    assert totals.text_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert [shard.file for shard in manifest.splits["train"]] == [f"train/shard-{i:05d}.arrow" for i in range(7)]


def test_the_manifest_accounts_for_every_document(files, tokenizer, tmp_path):
    prepare_corpus(files, tokenizer, tmp_path / "out", OPTIONS, workers=1)
    inputs = Corpus.open(tmp_path / "out").manifest.inputs
    counts = [(entry.path, entry.documents_read, entry.documents_kept, entry.rejected) for entry in inputs]
    assert counts == list(zip(files, (100, 10, 91), (100, 10, 90), ({}, {}, {"empty": 1}), strict=True))


def test_the_validation_split_does_not_move_when_the_corpus_grows(files, tokenizer, tmp_path):
    small = [*files[1:]]
    for name, chosen in (("small", small), ("large", files)):
        prepare_corpus(chosen, tokenizer, tmp_path / name, OPTIONS, workers=1)
    before, after = (texts(tmp_path / name, tokenizer) for name in ("small", "large"))
    assert before["validation"]
    for split in ("train", "validation"):
        assert after[split][-len(before[split]) :] == before[split]


def test_no_validation_split_unless_requested(files, tokenizer, tmp_path):
    manifest, _ = prepare_corpus(files, tokenizer, tmp_path / "out", ShardOptions(validation_fraction=0.0), workers=1)
    assert manifest.documents("train") == len(DOCUMENTS)
    assert not (tmp_path / "out/validation").exists()


def test_datasets_opens_the_folder(files, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    prepare_corpus(files, tokenizer, tmp_path / "out", OPTIONS, workers=1)
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    split = Corpus.open(tmp_path / "out").split("train")
    assert opened["train"][0]["input_ids"] == split.values(0)[: split.document_offsets(0)[1]].tolist()
    assert opened.num_rows == {"train": 165, "validation": 35}


def test_a_document_longer_than_a_batch_of_others_is_one_row(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 300_000 + "\n\nshort\n")
    manifest, _ = prepare_corpus([str(path)], tokenizer, tmp_path / "out", ShardOptions(validation_fraction=0.0), 1)
    assert manifest.documents("train") == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_job_keeps_its_finished_units_and_the_old_output(files, tokenizer, tmp_path, workers):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\n\nbad \xff\n" + b"filler\n\n" * 1000)
    strict = replace(OPTIONS, max_bad_fraction=0.0)
    with pytest.raises(UserError, match="no tokenizer"):
        prepare_corpus(files, tmp_path, tmp_path / "new/out", strict)
    assert not (tmp_path / "new").exists()

    prepare_corpus(files, tokenizer, tmp_path / "out", OPTIONS, workers=1)
    before = folder_hash(tmp_path / "out")
    with pytest.raises(UserError, match=r"1 of 1202 .*line 3 .*UTF-8.*10 of 10 units are kept"):
        prepare_corpus([*files, str(bad)], tokenizer, tmp_path / "out", strict, workers)
    assert folder_hash(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".out.partial"]

    # Another plan has no use for them.
    prepare_corpus(files, tokenizer, tmp_path / "out", OPTIONS)
    assert folder_hash(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_prepared_data_is_replaced_and_other_folders_are_not(files, tokenizer, tmp_path):
    out = tmp_path / "out"
    prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
    prepare_corpus(files[:1], tokenizer, out, OPTIONS, workers=1)
    assert len(Corpus.open(out).manifest.inputs) == 1
    # The tokenizer of the very folder that is replaced can be used again.
    prepare_corpus(files[:1], out / "tokenizer", out, OPTIONS, workers=1)
    assert len(Corpus.open(out).manifest.inputs) == 1

    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(UserError, match="not empty"):
        prepare_corpus(files, tokenizer, tmp_path / "other", OPTIONS, workers=1)
    (out / "raw.txt").write_text("text")
    with pytest.raises(UserError, match="is inside the output"):
        prepare_corpus([str(out / "raw.txt")], tokenizer, out, OPTIONS, workers=1)


def test_leftovers_of_a_killed_job_are_cleared_and_its_old_output_comes_back(tmp_path):
    out = tmp_path / "out"
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()

    def fail():
        with replaced_folder(out, lambda folder: True, "ours") as folder:
            assert not any(folder.iterdir())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == [".out.old"]


def test_no_document_for_training_is_an_error(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(next(text for text in DOCUMENTS if split_of(text, 0.2) == "validation"))
    with pytest.raises(UserError, match=r"--validation_fraction 0\.2"):
        prepare_corpus([str(path)], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    path.write_text("\u00a0\n\n")
    with pytest.raises(UserError, match="empty"):
        prepare_corpus([str(path)], tokenizer, tmp_path / "out", OPTIONS, workers=1)


def test_the_kind_of_documents_is_part_of_the_options(files, tokenizer, tmp_path):
    options = ShardOptions(ReadOptions("line"), 0.0)
    manifest, _ = prepare_corpus(files[:1], tokenizer, tmp_path / "out", options, workers=1)
    assert manifest.documents("train") == 300
    assert Corpus.open(tmp_path / "out").manifest.options["documents"] == "line"


def test_a_large_compressed_file_becomes_several_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.units._BATCH_BYTES", 1000)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    files = [str(tmp_path / "a.jsonl.gz")]
    options = replace(OPTIONS, unit_bytes=2000)
    manifest, _ = prepare_corpus(files, tokenizer, tmp_path / "out", options, 1, sources={files[0]: "books"})
    names = [shard.file for shard in manifest.splits["train"]]
    assert names[:2] == ["train/shard-00000.arrow", "train/shard-00000-00001.arrow"]
    assert len(names) > 3
    found = texts(tmp_path / "out", tokenizer)
    assert found["train"] == [text for text in DOCUMENTS if split_of(text, 0.2) == "train"]
    assert all(shard.source == "books" for shard in manifest.splits["train"])
    assert Corpus.open(tmp_path / "out").manifest == manifest


def test_bad_documents_are_skipped_and_listed_in_the_manifest(files, bad_file, tokenizer, tmp_path):
    prepare_corpus([*files, bad_file], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    entry = Corpus.open(tmp_path / "out").manifest.inputs[-1]
    assert (entry.documents_read, entry.documents_kept, entry.rejected) == (3, 2, {"not_utf8": 1})
    assert entry.places == ({"reason": "not_utf8", "byte": 6, "detail": "byte 10 (0xff) is not UTF-8"},)
