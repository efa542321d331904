"""Megatron's indexed dataset: read by another reader than ours, and unchanged by a round trip."""

import dataclasses
import itertools
import struct

import numpy as np
import pytest

from ds_roberta.data.manifest import Manifest, is_data_folder
from ds_roberta.data.shards import Corpus, write_shard
from ds_roberta.errors import UserError
from ds_roberta.files import partial_folder
from ds_roberta.lease import LeaseHeld, held_lease, leases_folder, sole_writer
from preprocessing.cli import main
from preprocessing.jobs.job import opened_job
from preprocessing.prepared import megatron
from preprocessing.prepared.megatron import IndexedDataset, export_split, import_dataset

CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read(prefix):
    """The documents of a dataset, each a list of sequences, read as the format is described and not by our code."""
    index, binary = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, borders = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    pointers = struct.unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    documents = struct.unpack_from(f"<{borders}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * borders
    tokens = [
        np.frombuffer(binary, CODES[code], length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert sum(lengths) * np.dtype(CODES[code]).itemsize == len(binary)
    return code, [tokens[first:last] for first, last in itertools.pairwise(documents)]


def write(prefix, documents, code=8, version=1, magic=b"MMIDIDX\0\0"):
    """A dataset as Megatron writes it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sequences = [sequence for document in documents for sequence in document]
    arrays = [np.array(sequence, CODES[code]) for sequence in sequences]
    prefix.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    sizes = [array.nbytes for array in arrays]
    prefix.with_suffix(".idx").write_bytes(
        magic
        + struct.pack("<QBQQ", version, code, len(sequences), len(documents) + 1)
        + np.array([len(array) for array in arrays], "<i4").tobytes()
        + np.array([sum(sizes[:i]) for i in range(len(sizes))], "<i8").tobytes()
        + np.cumsum([0, *map(len, documents)]).astype("<i8").tobytes()
    )


def of_corpus(corpus, split_name):
    """Our documents, each a list of sentences, and the ids as they are in the shards."""
    split = corpus.split(split_name)
    documents, values = [], []
    for shard in range(len(split.shards)):
        starts, ends = split.sentence_bounds(shard)
        offsets = split.document_offsets(shard)
        values += split.values(shard).tolist()
        for begin, end in itertools.pairwise(offsets):
            inside = (starts >= begin) & (starts < end)
            bounds = zip(starts[inside], ends[inside], strict=True)
            documents.append([split.values(shard)[first:last].tolist() for first, last in bounds])
    return documents, values


def test_another_reader_finds_our_sentences_and_documents(corpus, tmp_path):
    assert export_split(corpus, "train", tmp_path / "out/x") == (1251, corpus_sentences(corpus))
    code, documents = read(tmp_path / "out/x")
    assert code == 8
    assert documents == of_corpus(corpus, "train")[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx"]


def corpus_sentences(corpus):
    split = corpus.split("train")
    return sum(len(split.sentence_bounds(shard)[0]) for shard in range(len(split.shards)))


def test_ids_above_16_bits_are_int32(tmp_path, corpus):
    """Megatron knows no uint32."""
    infos = [
        write_shard(tmp_path, "train", 0, [np.array([70_000, 5, 2])], [np.array([1, 2])], 80_000),
        write_shard(tmp_path, "train", 1, [np.array([6, 2]), np.array([7, 65_536, 2])], [np.array([1]), [2]], 80_000),
    ]
    tokenizer = dataclasses.replace(corpus.manifest.tokenizer, vocab_size=80_000)
    large = Corpus(tmp_path, Manifest(tokenizer, {}, (), {"train": tuple(infos)}))
    export_split(large, "train", tmp_path / "x")
    assert read(tmp_path / "x") == (4, [[[70_000], [5]], [[6]], [[7, 65_536]]])


def test_a_round_trip_changes_nothing(corpus, corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_SHARD_TOKENS", 20_000)
    for split in ("train", "validation"):
        command = f"export {corpus_folder} --format megatron --split {split} --output {tmp_path}/{split}"
        with pytest.raises(SystemExit, match="0"):
            main(command.split())
    command = f"import {tmp_path}/train --validation {tmp_path}/validation --tokenizer {corpus_folder}/tokenizer"
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--output", str(tmp_path / "back")])
    back = Corpus.open(tmp_path / "back")
    for split in ("train", "validation"):
        assert of_corpus(back, split) == of_corpus(corpus, split)
    shards = back.manifest.splits["train"]
    assert len(shards) > 5
    assert max(shard.tokens for shard in shards[:-1]) < 21_000
    pieces = [piece for shard in shards for piece in shard.pieces]
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == (tmp_path / "train.bin").stat().st_size
    export_split(back, "train", tmp_path / "again")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"train{suffix}").read_bytes()


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_dataset_of_megatron_is_imported(tmp_path, tokenizer_folder, code):
    documents = [
        [[10, 11], [12, 13, 2]],  # with the separator that --append-eod puts there
        [[20, 21, 22]],  # a sequence a document
        [],
        [[], [30], [], [31]],
        [[2]],
        [[40], [2]],
    ]
    write(tmp_path / "m", documents, code)
    manifest = import_dataset({"train": tmp_path / "m"}, tokenizer_folder, tmp_path / "data")
    found, values = of_corpus(Corpus.open(tmp_path / "data"), "train")
    assert found == [[[10, 11], [12, 13]], [[20, 21, 22]], [[30], [31]], [[40]]]
    assert values == [10, 11, 12, 13, 2, 20, 21, 22, 2, 30, 31, 2, 40, 2]
    (entry,) = manifest.inputs
    assert (entry.documents_read, entry.documents_kept, entry.rejected) == (6, 4, {"empty": 2})
    assert entry.path == str(tmp_path / "m.bin")


def test_sequences_may_be_in_any_order(tmp_path, tokenizer_folder):
    write(tmp_path / "m", [[[10, 11], [12]], [[13, 14, 15]]])
    path = tmp_path / "m.idx"
    content = bytearray(path.read_bytes())
    struct.pack_into("<3i", content, 34, 3, 1, 2)
    struct.pack_into("<3q", content, 34 + 12, 6, 4, 0)
    path.write_bytes(content)
    import_dataset({"train": tmp_path / "m"}, tokenizer_folder, tmp_path / "data")
    assert of_corpus(Corpus.open(tmp_path / "data"), "train")[0] == [[[13, 14, 15], [12]], [[10, 11]]]


def cut(suffix, count):
    def change(prefix):
        path = prefix.with_suffix(suffix)
        path.write_bytes(path.read_bytes()[:-count])

    return change


def put(form, offset, *values):
    def change(prefix):
        path = prefix.with_suffix(".idx")
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, offset, *values)
        path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "cannot read the Megatron dataset"),
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "cannot read the Megatron dataset"),
        (lambda prefix: prefix.with_suffix(".idx").write_bytes(b""), "cannot read the Megatron dataset"),
        (cut(".idx", 1), "it is truncated"),
        (cut(".idx", 60), "it is truncated|not the index"),
        (cut(".bin", 1), "does not fit"),
        (put("<B", 0, 0), "is not the index of a Megatron dataset"),
        (put("<Q", 9, 2), "version 2"),
        (put("<B", 17, 7), "token type 7"),
        (put("<i", 34, -1), "does not fit"),
        (put("<i", 34, 1000), "does not fit"),
        (put("<q", 34 + 12, -2), "does not fit"),
        (put("<q", 34 + 36, 1), "does not fit"),
        (put("<q", 34 + 36 + 8, 9), "does not fit"),
    ],
)
def test_a_broken_dataset_is_a_user_error(tmp_path, tokenizer_folder, change, message):
    write(tmp_path / "m", [[[10, 11], [12]], [[13, 14, 15]]])
    change(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        import_dataset({"train": tmp_path / "m"}, tokenizer_folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("worst", "code"), [(400, 8), (-1, 4)])
def test_ids_that_are_not_the_tokenizers_are_refused(tmp_path, tokenizer_folder, worst, code):
    write(tmp_path / "m", [[[10, 11]], [[12, worst, 13]]], code)
    with pytest.raises(UserError, match=rf"document 1 has id {worst}, but the tokenizer has 400 ids"):
        import_dataset({"train": tmp_path / "m"}, tokenizer_folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_nothing_is_overwritten_and_nothing_imported_from_nothing(corpus, tmp_path, tokenizer_folder):
    (tmp_path / "x.idx").write_text("precious")
    with pytest.raises(UserError, match=r"x.idx' exists already"):
        export_split(corpus, "train", tmp_path / "x")
    with pytest.raises(UserError, match="no documents in split 'test'"):
        export_split(corpus, "test", tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["x.idx"]
    write(tmp_path / "m", [[], [[2]]])
    with pytest.raises(UserError, match="no document with tokens"):
        import_dataset({"train": tmp_path / "m"}, tokenizer_folder, tmp_path / "data")
    write(tmp_path / "data/m", [[[10]]])
    with pytest.raises(UserError, match="is inside the output"):
        import_dataset({"train": tmp_path / "data/m"}, tokenizer_folder, tmp_path / "data")


def test_an_import_and_a_job_on_the_same_output_exclude_each_other(tmp_path, tokenizer_folder):
    write(tmp_path / "m", [[[10]]])
    output = tmp_path / "data"
    with held_lease(partial_folder(output) / "leases", "plan", None, output):
        with pytest.raises(LeaseHeld, match="another job is writing"):
            import_dataset({"train": tmp_path / "m"}, tokenizer_folder, output)
        assert partial_folder(output).is_dir()
    (partial_folder(output) / "leases").rmdir()
    (partial_folder(output) / "half").touch()
    with (
        sole_writer(output, leases_folder(output)),
        pytest.raises(LeaseHeld, match="another job is writing"),
        opened_job(output, "plan", None, is_data_folder, "data"),
    ):
        pytest.fail("it began")
    assert [path.name for path in partial_folder(output).iterdir()] == ["half"]
    import_dataset({"train": tmp_path / "m"}, tokenizer_folder, output)


def test_an_index_that_fits_is_opened_by_memory_map(tmp_path):
    rng = np.random.default_rng(2)
    documents = [[rng.integers(4, 399, size=size).tolist() for size in (3, 40, 1)] for _ in range(30)]
    write(tmp_path / "m", documents)
    dataset = IndexedDataset.open(tmp_path / "m")
    assert not dataset.data.flags.owndata
    flat = [sentence for document in documents for sentence in document]
    assert [dataset.tokens(number).tolist() for number in range(len(flat))] == flat
