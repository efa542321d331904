import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from ds_roberta.config import PACKING_FORMATS, PackingConfig
from ds_roberta.data import packing
from ds_roberta.data.manifest import PACKING_VERSION
from ds_roberta.data.packing import (
    INDEX_FOLDER,
    build_index,
    open_index,
    pack_contiguous,
    pack_doc_sentences,
    pack_full_sentences,
)
from ds_roberta.data.sentences import cut_long_sentences
from ds_roberta.data.shards import Corpus
from ds_roberta.data.tokenizer import token_bytes
from ds_roberta.errors import UserError

SEPARATOR = 2


def reference_packing(documents, capacity, crossing=True):
    """Packing of whole sentences of one shard, one at a time: lists of ids between `<s>` and `</s>`."""
    sequences, current, current_document = [], [], None
    for number, document in enumerate(documents):
        for sentence in document:
            for first in range(0, len(sentence), capacity):
                piece = sentence[first : first + capacity].tolist()
                border = [SEPARATOR] if current and number != current_document else []
                if (border and not crossing) or len(current) + len(border) + len(piece) > capacity:
                    sequences.append(current)
                    current, border = [], []
                current, current_document = current + border + piece, number
    return [*sequences, current] if current else sequences


def read_back(packed, width):
    """The sequences of a packed split as lists of ids."""
    out = np.zeros((len(packed), width), dtype=np.int64)
    lengths = packed.lengths(np.arange(len(packed)))
    packed.gather(np.arange(len(packed)), out)
    return [row[1 : 1 + length].tolist() for row, length in zip(out, lengths, strict=True)]


def build(corpus, max_seq_length, split="train", form="full-sentences"):
    packing = PackingConfig(max_seq_length, form)
    build_index(corpus, split, packing)
    return open_index(corpus, split, packing)


@pytest.mark.parametrize("max_seq_length", [3, 4, 8, 32, 128, 70_000])
def test_packing_equals_a_naive_reference(tmp_path, write_corpus, max_seq_length):
    rng = np.random.default_rng(max_seq_length)
    shards = []
    for longest in (1, 3, 10, 60, 200):
        sizes = rng.integers(1, longest + 1, size=(40, 6))
        shards.append([[rng.integers(4, 300, size=n) for n in row[: rng.integers(1, 7)]] for row in sizes])
    corpus, capacity = write_corpus(tmp_path / "c", {"train": shards}), max_seq_length - 2
    for form, crossing in (("full-sentences", True), ("doc-sentences", False)):
        expected = [s for documents in shards for s in reference_packing(documents, capacity, crossing)]
        assert read_back(build(corpus, max_seq_length, form=form), max_seq_length) == expected

    contiguous = read_back(build(corpus, max_seq_length, form="contiguous"), max_seq_length)
    split, expected = corpus.split("train"), []
    for shard in range(len(shards)):
        tokens = split.values(shard)[:-1].tolist()  # the last document's separator is the sequence's own
        expected += [tokens[first : first + capacity] for first in range(0, len(tokens), capacity)]
    assert contiguous == expected


def test_sequences_are_greedy_keep_sentences_whole_and_hold_separators(tmp_path, write_corpus):
    def ids(*values):
        return np.array(values)

    documents = [[ids(10, 11, 12), ids(13, 14)], [ids(20, 21)], [ids(*range(30, 45))]]
    packed = build(write_corpus(tmp_path / "c", {"train": [documents]}), 8)
    assert read_back(packed, 8) == [
        [10, 11, 12, 13, 14],  # the next sentence would make 8 with its separator, 6 fit
        [20, 21],
        [30, 31, 32, 33, 34, 35],
        [36, 37, 38, 39, 40, 41],
        [42, 43, 44],
    ]
    packed = build(Corpus.open(tmp_path / "c"), 10)
    assert read_back(packed, 10)[0] == [10, 11, 12, 13, 14, SEPARATOR, 20, 21]


def test_no_token_is_lost_or_repeated(corpus):
    for max_seq_length in (16, 32, 512):
        sequences = read_back(build(corpus, max_seq_length), max_seq_length)
        tokens = np.concatenate([np.array(sequence) for sequence in sequences])
        split = corpus.split("train")
        original = np.concatenate([split.values(shard) for shard in range(len(split.shards))])
        assert np.array_equal(tokens[tokens != SEPARATOR], original[original != SEPARATOR])
        assert max(map(len, sequences)) == max_seq_length - 2


def test_sequences_of_a_corpus_are_nearly_full(corpus):
    sequences = read_back(build(corpus, 512), 512)
    assert np.mean([len(sequence) for sequence in sequences]) > 0.9 * 510


def test_long_sentences_are_cut_into_full_pieces():
    starts, ends = cut_long_sentences(np.array([0, 10, 13]), np.array([10, 13, 21]), 4)
    assert starts.tolist() == [0, 4, 8, 10, 13, 17]
    assert ends.tolist() == [4, 8, 10, 13, 17, 21]


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 7, 32])
def test_long_sentences_are_cut_between_characters(capacity):
    rng = np.random.default_rng(capacity)
    characters = rng.integers(1, 5, size=3000)  # tokens of each
    inside = np.ones(characters.sum(), dtype=bool)
    inside[np.cumsum(characters) - characters] = False
    ends = np.flatnonzero(np.append(~inside[1:], True) & (rng.random(len(inside)) < 0.05)) + 1
    ends = np.append(ends, len(inside)) if ends[-1] < len(inside) else ends
    starts = np.append(0, ends[:-1])
    expected = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        while end - start > capacity:
            cut = start + capacity
            while inside[cut] and cut > start:
                cut -= 1
            cut = cut if cut > start else start + capacity  # a character longer than a sequence
            expected.append((start, cut))
            start = cut
        expected.append((start, end))
    found = cut_long_sentences(starts, ends, capacity, inside.take)
    assert list(zip(*(bounds.tolist() for bounds in found), strict=True)) == expected
    plain = cut_long_sentences(starts, ends, capacity)
    assert np.array_equal(plain[0], found[0]) == (capacity == 1)
    nothing_inside = cut_long_sentences(starts, ends, capacity, np.zeros(len(inside), bool).take)
    assert np.array_equal(plain, nothing_inside)


@pytest.mark.parametrize("form", PACKING_FORMATS)
def test_no_sequence_is_cut_inside_a_character(tmp_path, write_corpus, tokenizer_folder, form):
    tokenizer, rng = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")), np.random.default_rng(0)
    text = ["".join(rng.choice(list("我们去北京ёжик🙂ab "), size=n)) for n in rng.integers(1, 60, size=90)]
    sentences = [np.array(tokenizer.encode(sentence).ids[1:-1]) for sentence in text]
    assert min(map(len, sentences)) > 0
    before = write_corpus(tmp_path / "c", {"train": [[sentences[i : i + 3] for i in range(0, 90, 3)]]})
    after = Corpus(before.folder, replace(before.manifest, options={"packing_version": PACKING_VERSION}))
    pieces, broken = token_bytes(tokenizer_folder), []
    for corpus in (before, after):
        packed, values = build(corpus, 25, form=form), corpus.split("train").values(0)
        broken.append(0)
        for shards, starts, ends in packed.segments(np.arange(len(packed))):
            assert not shards.any()
            assert (ends > starts).all()
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                try:
                    b"".join(pieces[id_] for id_ in values[start:end].tolist()).decode()
                except UnicodeDecodeError:
                    broken[-1] += end - start > 3  # a drawn segment may have less room than a character needs
    assert broken[0] > 0
    assert broken[1] == 0
    assert len(index_files(before)) == 4


def test_packing_nothing_gives_nothing():
    nothing = np.empty(0, dtype=np.int64)
    for pack in (pack_full_sentences, pack_doc_sentences):
        assert pack(nothing, nothing, 10).shape == (0, 2)
    assert pack_contiguous(0, 10).shape == (0, 2)


def test_gather_writes_the_slices_alone_whatever_their_order(corpus):
    packed = build(corpus, 32)
    whole = read_back(packed, 32)
    chosen = np.random.default_rng(0).permutation(len(packed))[:300]
    out = np.full((300, 32), -7, dtype=np.int64)
    lengths = packed.lengths(chosen)
    packed.gather(chosen, out)
    for row, length, sequence in zip(out, lengths, chosen, strict=True):
        assert row[1 : 1 + length].tolist() == whole[sequence]
        assert row[0] == -7
        assert (row[1 + length :] == -7).all()


@pytest.fixture
def own_corpus(tmp_path, write_corpus):
    rng = np.random.default_rng(0)
    documents = [[rng.integers(4, 300, size=9) for _ in range(4)] for _ in range(30)]
    return write_corpus(tmp_path / "own", {"train": [documents]})


def index_files(corpus):
    return {path: path.stat() for path in (corpus.folder / INDEX_FOLDER).iterdir()}


def test_the_index_is_made_once_and_used_again(own_corpus):
    first = read_back(build(own_corpus, 32), 32)
    before = index_files(own_corpus)
    assert read_back(build(own_corpus, 32), 32) == first
    after = index_files(own_corpus)
    assert {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in before.items()} == {
        path: (stat.st_ino, stat.st_mtime_ns) for path, stat in after.items()
    }


def test_an_index_that_was_not_finished_is_made_again(own_corpus):
    first = read_back(build(own_corpus, 32), 32)
    for path in index_files(own_corpus):
        if path.suffix == ".first":
            path.unlink()
        else:
            path.write_bytes(b"cut")
    assert read_back(build(own_corpus, 32), 32) == first


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".slices", lambda path: path.write_bytes(b"")),
        (".slices", lambda path: path.write_bytes(b"cut")),
        (".slices", lambda path: path.write_bytes(path.read_bytes()[:-6])),
        (".first", lambda path: path.write_bytes(b"")),
        (".first", lambda path: path.write_bytes(b"cut")),
        (".first", lambda path: path.write_bytes(path.read_bytes()[8:])),
        (".first", lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:])),
        (".first", lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 8 + path.read_bytes()[16:])),
    ],
)
def test_a_damaged_index_is_a_user_error(own_corpus, suffix, damage):
    build(own_corpus, 32)
    (path,) = (path for path in index_files(own_corpus) if path.name.endswith(suffix))
    damage(path)
    with pytest.raises(UserError, match=r"the packing index .*first' is damaged .*: remove it"):
        build(own_corpus, 32)


@pytest.mark.parametrize("suffix", [".slices", ".first"])
def test_a_missing_index_is_no_damaged_one(own_corpus, suffix):
    build(own_corpus, 32)
    (path,) = (path for path in index_files(own_corpus) if path.name.endswith(suffix))
    path.unlink()
    with pytest.raises(UserError, match=rf"the packing index '.*{suffix}' is missing: start again"):
        open_index(own_corpus, "train", PackingConfig(32))


@pytest.mark.parametrize(
    ("form", "field"),
    [
        *(("full-sentences", field) for field in ("start", "length")),
        *(("segment-pair", field) for field in ("start", "length", "second_shard", "second_start", "second_length")),
    ],
)
def test_sequences_that_are_not_in_their_shard_are_a_user_error(own_corpus, form, field):
    packed = build(own_corpus, 32, form=form)
    (path,) = (path for path in index_files(own_corpus) if path.name.endswith(".slices"))
    slices = np.memmap(path, packed._slices.dtype, mode="r+")
    slices[field][0] = np.iinfo(slices[field].dtype).max
    slices.flush()
    packed, rows = build(own_corpus, 32, form=form), np.zeros((1, 32), dtype=np.int64)
    with pytest.raises(UserError, match=r"a packing index in .*index' is damaged \(a sequence .*\): remove the folder"):
        packed.gather(np.array([0]), rows)
    if "length" in field:
        with pytest.raises(UserError, match=r"is damaged \(a sequence has \d+ tokens\)"):
            packed.lengths(np.array([0]))
    packed.gather(np.array([1]), rows)


def test_ids_that_the_tokenizer_does_not_have_are_a_user_error(tmp_path, write_corpus):
    corpus = write_corpus(tmp_path / "c", {"train": [[[np.arange(4, 24)]], [[np.arange(4, 24)]]]})
    vocab_size, path = corpus.manifest.tokenizer.vocab_size, tmp_path / "c" / corpus.manifest.splits["train"][1].file
    ids = np.arange(4, 24, dtype=np.uint16)
    content = path.read_bytes()
    assert content.count(ids.tobytes()) == 1
    path.write_bytes(content.replace(ids.tobytes(), np.where(ids == 9, vocab_size, ids).astype(np.uint16).tobytes()))
    packed, rows = build(corpus, 32), np.zeros((1, 32), dtype=np.int64)
    packed.gather(np.array([0]), rows)
    with pytest.raises(UserError, match=rf"shard-00001.*the token id {vocab_size}, the largest of its tokenizer is"):
        packed.gather(np.array([1]), rows)


def test_what_a_killed_build_left_goes_once_the_index_is_there(own_corpus):
    build(own_corpus, 32)
    names = {path.name for path in index_files(own_corpus)}
    for name in names:
        (own_corpus.folder / INDEX_FOLDER / f".{name}.0123abcd.tmp").touch()
    of_another = own_corpus.folder / INDEX_FOLDER / ".train-contiguous-64-0.slices.0123abcd.tmp"
    of_another.touch()  # and perhaps alive
    build(own_corpus, 32)
    assert {path.name for path in index_files(own_corpus)} == {*names, of_another.name}


def test_of_two_builds_at_once_the_later_one_takes_what_the_first_made(own_corpus, monkeypatch):
    pack_shard, calls = packing.pack_shard, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            build(own_corpus, 32)
        return pack_shard(*arguments)

    monkeypatch.setattr(packing, "pack_shard", interrupted)
    packed = build(own_corpus, 32)
    assert len(calls) == 2 * len(own_corpus.split("train").shards)
    assert read_back(packed, 32) == read_back(build(own_corpus, 32), 32)
    assert not list((own_corpus.folder / INDEX_FOLDER).glob(".*"))


def test_lengths_and_data_have_indices_of_their_own(tmp_path, write_corpus, own_corpus):
    at_32, at_64 = build(own_corpus, 32), build(own_corpus, 64)
    assert len(index_files(own_corpus)) == 4
    assert len(at_64) < len(at_32)
    # The same folder with other data: the old index must not serve it.
    other = write_corpus(tmp_path / "other", {"train": [[[np.arange(4, 200)]]]})
    (own_corpus.folder / INDEX_FOLDER).rename(other.folder / INDEX_FOLDER)
    assert read_back(build(other, 32), 32)[0] == list(range(4, 34))


def test_opening_an_index_opens_no_shard(own_corpus):
    build(own_corpus, 32)
    for shard in own_corpus.manifest.splits["train"]:
        (own_corpus.folder / shard.file).rename(own_corpus.folder / "away")
    packed = build(own_corpus, 32)
    assert len(packed) > 10
    with pytest.raises(UserError, match="No such file"):
        packed.gather(np.array([0]), np.zeros((1, 32)))


def test_formats_have_indices_of_their_own(own_corpus):
    lengths = [len(build(own_corpus, 32, form=form)) for form in PACKING_FORMATS]
    assert len(set(lengths)) == len(PACKING_FORMATS)


def test_more_shards_are_read_than_files_may_be_open(tmp_path, write_corpus):
    corpus = write_corpus(tmp_path / "c", {"train": [[[np.arange(4, 14)]]] * 120})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(len(used) + 21) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))  # the numbers below it can be given out
    try:
        sequences = read_back(build(corpus, 32), 32)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sequences == [list(range(4, 14))] * 120


def test_an_unwritable_data_folder_is_a_user_error(own_corpus):
    (own_corpus.folder / INDEX_FOLDER).write_text("a file where the folder shall be")
    with pytest.raises(UserError, match=r"cannot write the packing index .* writable"):
        build_index(own_corpus, "train", PackingConfig(32))


def test_an_index_whose_last_bytes_a_disk_refuses_is_an_error_and_not_there(own_corpus):
    build(own_corpus, 32)
    (slices,) = (own_corpus.folder / INDEX_FOLDER).glob("train-*.slices")
    size = slices.stat().st_size
    shutil.rmtree(own_corpus.folder / INDEX_FOLDER)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write the packing index .*File too large"):
            build_index(own_corpus, "train", PackingConfig(32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((own_corpus.folder / INDEX_FOLDER).iterdir()) == []
