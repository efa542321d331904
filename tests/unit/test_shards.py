import dataclasses
import json
import shutil
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from ds_roberta.data import shards
from ds_roberta.data.manifest import InputInfo, Manifest, ShardInfo
from ds_roberta.data.shards import Corpus, Split, checksums, write_shard
from ds_roberta.data.tokenizer import TokenizerInfo, token_type
from ds_roberta.errors import UserError
from ds_roberta.files import json_fingerprint

DOCUMENTS = [np.array([10, 11, 12, 13, 2]), np.array([20, 2]), np.array([30, 31, 2])]
ENDS = [np.array([1, 4]), np.array([1]), np.array([1, 2])]


def one_shard(folder, vocab_size=400, documents=DOCUMENTS, ends=ENDS):
    info = write_shard(folder, "train", 0, documents, ends, vocab_size)
    return Split(folder, "train", [info], 400), info


def test_a_shard_gives_back_its_documents_and_sentences(tmp_path):
    split, info = one_shard(tmp_path)
    assert split.values(0).tolist() == [10, 11, 12, 13, 2, 20, 2, 30, 31, 2]
    assert split.document_offsets(0).tolist() == [0, 5, 7, 10]
    starts, ends = split.sentence_bounds(0)
    assert starts.tolist() == [0, 1, 5, 7, 8]
    assert ends.tolist() == [1, 4, 6, 8, 9]
    assert (info.file, info.documents, info.tokens) == ("train/shard-00000.arrow", 3, 10)
    assert info.bytes == (tmp_path / info.file).stat().st_size


def test_ids_are_16_bit_as_long_as_they_fit(tmp_path):
    assert token_type(65_536) == np.uint16
    assert token_type(65_537) == np.uint32
    ids = np.array([4, 65_535, 2])
    split, _ = one_shard(tmp_path / "small", 65_536, [ids], [np.array([2])])
    assert (split.values(0).dtype, split.values(0).tolist()) == (np.uint16, ids.tolist())
    ids = np.array([4, 65_536, 250_000, 2])
    split, _ = one_shard(tmp_path / "large", 250_002, [ids], [np.array([3])])
    assert (split.values(0).dtype, split.values(0).tolist()) == (np.uint32, ids.tolist())


def test_values_are_a_view_of_the_mapped_file(tmp_path):
    documents = [np.arange(4, 300).repeat(500)]
    split, info = one_shard(tmp_path, documents=documents, ends=[np.array([len(documents[0]) - 1])])
    values = split.values(0)
    assert not values.flags.owndata
    assert not values.flags.writeable
    address, path = values.ctypes.data, str(tmp_path / info.file)
    bounds = [[int(bound, 16) for bound in region.split()[0].split("-")] for region in maps_of(path)]
    assert any(start <= address and address + values.nbytes <= end for start, end in bounds)
    assert split.values(0).ctypes.data == address


def maps_of(path):
    """The lines of the process's maps of a file, or of the files in a folder."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if path in line]


def test_of_more_shards_than_a_process_may_map_the_last_ones_stay_open(tmp_path, monkeypatch):
    infos = [write_shard(tmp_path, "train", number, DOCUMENTS, ENDS, 400) for number in range(8)]
    opened = lru_cache(maxsize=3)(Split._columns.__wrapped__)
    monkeypatch.setattr(Split, "_columns", lambda split, shard: opened(split, shard))
    split = Split(tmp_path, "train", infos, 400)
    for shard in [*range(8), 0, 7]:
        assert split.values(shard).tolist() == [10, 11, 12, 13, 2, 20, 2, 30, 31, 2]
        assert split.sentence_bounds(shard)[0].tolist() == [0, 1, 5, 7, 8]
        assert len(maps_of(str(tmp_path))) <= 3
    held = split.values(4)
    for shard in (5, 6, 7):
        split.values(shard)
    assert held[0] == 10  # what is still read stays mapped


def test_datasets_opens_the_folder_and_any_shard(corpus_folder, corpus):
    opened = datasets.load_from_disk(str(corpus_folder))
    assert set(opened) == {"train", "validation"}
    split = corpus.split("train")
    whole = np.concatenate([split.values(shard) for shard in range(len(split.shards))])
    assert opened["train"].num_rows == corpus.manifest.documents("train") == 400 + 250 + 1 + 380 + 220
    assert np.array_equal(opened["train"].data.column("input_ids").combine_chunks().values, whole)

    shard = datasets.Dataset.from_file(str(corpus_folder / split.shards[3].file))
    begin, end = split.document_offsets(3)[7:9]
    assert shard[7]["input_ids"] == split.values(3)[begin:end].tolist()
    assert shard[7]["sentence_ends"][-1] == end - begin - 1


def test_the_same_documents_make_the_same_bytes(tmp_path):
    _, first = one_shard(tmp_path / "a")
    _, second = one_shard(tmp_path / "b", documents=[d.astype(np.uint16) for d in DOCUMENTS])
    assert first == second
    assert (tmp_path / "a" / first.file).read_bytes() == (tmp_path / "b" / second.file).read_bytes()
    assert [path.name for path in (tmp_path / "a/train").iterdir()] == ["shard-00000.arrow"]


@pytest.mark.parametrize(
    ("vocab_size", "checksum"),
    [(65_536, "62223ba8031cbb9bde24ea789dfa339f"), (65_537, "ce56f4617f386cd2b99345ebe3247257")],
)
def test_a_shards_bytes_are_those_of_earlier_versions(tmp_path, vocab_size, checksum):
    """Whatever pyarrow's version; or data that is prepared again would not fit its runs."""
    assert one_shard(tmp_path, vocab_size, DOCUMENTS[:2], ENDS[:2])[1].checksum == checksum


def test_checksums_cover_the_file_and_every_chunk(tmp_path):
    content = np.random.default_rng(0).bytes(2 * shards.CHUNK_BYTES + 5)
    (tmp_path / "file").write_bytes(content)
    size, whole, chunks = checksums(tmp_path / "file")
    assert (size, whole) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert len(chunks) == 3
    assert chunks[2] == xxhash.xxh3_64_hexdigest(content[-5:])


@pytest.mark.parametrize("remaining", [0, 100, -1])
def test_a_cut_shard_is_noticed(tmp_path, remaining):
    _, info = one_shard(tmp_path)
    path = tmp_path / info.file
    path.write_bytes(path.read_bytes()[:remaining])
    with pytest.raises(
        UserError, match=r"shard-00000.arrow' has \d+ bytes, the manifest says .*prepare the data again"
    ):
        Split(tmp_path, "train", [info], 400).values(0)


def test_a_shard_that_is_missing_or_no_arrow_file_is_a_user_error(tmp_path):
    _, info = one_shard(tmp_path)
    path = tmp_path / info.file
    path.write_bytes(b"\x01" * info.bytes)
    with pytest.raises(UserError, match=r"cannot read the shard .*shard-00000.arrow"):
        Split(tmp_path, "train", [info], 400).values(0)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read the shard .*shard-00000.arrow"):
        Split(tmp_path, "train", [info], 400).values(0)


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": [[1]]},
        {"input_ids": [1], "sentence_ends": [1]},
        {"input_ids": ["a"], "sentence_ends": ["a"]},
        {"input_ids": [[0.5]], "sentence_ends": [[1]]},
        {"input_ids": [[1]], "sentence_ends": [[None, 1]]},
        {"input_ids": [None, [1]], "sentence_ends": [[1], [1]]},
        {},
    ],
)
def test_a_shard_of_other_columns_is_a_user_error(tmp_path, columns):
    batch = pa.RecordBatch.from_pydict(columns)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), batch.schema) as writer:
        if columns:
            writer.write_batch(batch)
    info = ShardInfo("a.arrow", 1, 1, (tmp_path / "a.arrow").stat().st_size, "", ())
    with pytest.raises(UserError, match=r"cannot read the shard .*a.arrow'.*preprocess verify"):
        Split(tmp_path, "train", [info], 400).values(0)


def test_offsets_outside_of_a_shards_values_are_a_user_error(tmp_path):
    _, info = one_shard(tmp_path)
    path = tmp_path / info.file
    content, offsets = path.read_bytes(), Split(tmp_path, "train", [info], 400).document_offsets(0).tobytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:-4] + (1 << 30).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"cannot read the shard .*shard-00000.arrow"):
        Split(tmp_path, "train", [info], 400).values(0)


@pytest.mark.parametrize("wrong", [{"documents": 4}, {"tokens": 9}])
def test_a_shard_of_another_size_than_the_manifest_says_is_a_user_error(tmp_path, wrong):
    _, info = one_shard(tmp_path)
    with pytest.raises(UserError, match=r"shard-00000.arrow': it has another number of documents or tokens"):
        Split(tmp_path, "train", [dataclasses.replace(info, **wrong)], 400).values(0)


@pytest.mark.parametrize("ends", [[[3, 1, 3], [1]], [[1, 1 << 31], [1]], [[1, 3], [2]], [[1, 3, 1], []], [[], [1]]])
def test_sentences_of_no_document_are_a_user_error(tmp_path, ends):
    documents = [np.arange(4), np.arange(2)]
    info = write_shard(tmp_path, "train", 0, documents, [np.array(each, np.int64) for each in ends], 300)
    with pytest.raises(UserError, match=r"cannot read the shard .*(no sentence|do not follow one another)"):
        Split(tmp_path, "train", [info], 400).sentence_bounds(0)


def test_the_sentences_of_one_document_are_those_of_the_shard(tmp_path):
    split, _ = one_shard(tmp_path)
    starts, ends = split.sentence_bounds(0)
    by_document = [split.sentence_bounds(0, row) for row in range(3)]
    assert [len(first) for first, _ in by_document] == [2, 1, 2]
    assert np.concatenate([first for first, _ in by_document]).tolist() == starts.tolist()
    assert np.concatenate([last for _, last in by_document]).tolist() == ends.tolist()


@pytest.fixture
def folder(tmp_path, write_corpus):
    """A data folder that the test may break."""
    documents = [[np.arange(4, 50)], [np.arange(60, 70), np.arange(70, 75)]]
    write_corpus(tmp_path / "corpus", {"train": [documents, documents[:1]]})
    return tmp_path / "corpus"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_manifest_survives_writing_and_reading(folder):
    manifest = Manifest.read(folder)
    manifest = dataclasses.replace(
        manifest, options={"validation_fraction": 0.1}, inputs=(InputInfo("a.txt", 5, 3, {"empty": 2}),)
    )
    manifest.write(folder)
    assert Manifest.read(folder) == manifest
    assert (manifest.tokens("train"), manifest.documents("train"), manifest.tokens("validation")) == (
        47 + 16 + 47,
        3,
        0,
    )


def test_the_fingerprint_is_of_the_tokens_and_not_of_paths(folder, tmp_path, write_corpus):
    manifest = Manifest.read(folder)
    elsewhere = dataclasses.replace(manifest, options={"workers": 4}, inputs=(InputInfo("b.txt", 3, 3, {}),))
    assert elsewhere.fingerprint == manifest.fingerprint
    documents = [[np.arange(4, 50)], [np.arange(60, 70), np.arange(70, 76)]]
    other = write_corpus(tmp_path / "other", {"train": [documents, documents[:1]]})
    assert other.manifest.fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    ("source", "fingerprint"),
    [("", "84dd2370cb63e3f2f97b38437050772a"), ("wiki", "b331d64ab137e34f3c8cab99df52456e")],
)
def test_fingerprints_are_those_of_earlier_versions(source, fingerprint):
    """Or no run could resume with its data."""
    tokenizer = TokenizerInfo(400, 0, 1, 2, 399, (0, 1, 2, 3, 399), "f" * 32)
    splits = {
        split: tuple(ShardInfo(f"{n}.arrow", 2, 7, 656, f"{split}-{n}", (), source=source) for n in range(2))
        for split in ("train", "validation")
    }
    assert Manifest(tokenizer, {}, (), splits).fingerprint == fingerprint


def test_no_folder_no_data_names_the_command_that_makes_it(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"no prepared data .*preprocess shard --input"):
            Corpus.open(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 2}', "null", "\x00", "[" * 100_000])
def test_a_damaged_manifest_is_a_user_error(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json' is damaged .*prepare the data again"):
        Corpus.open(folder)


def test_a_truncated_manifest_is_a_user_error(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged"):
            Corpus.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format_version=1), "format version 1, this program reads 2: prepare the data"),
        (lambda content: content.update(splits=[]), "is damaged"),
        (lambda content: content.update(options=[]), "is damaged"),
        (lambda content: content["options"].update(packing_version=float("inf")), "is damaged"),
        (lambda content: content["options"].update(packing_version="3"), "is damaged"),
        (lambda content: content.update(files=[]), "is damaged"),
        (lambda content: content["files"].update({"../elsewhere": "0"}), "'../elsewhere' is outside of the folder"),
        (lambda content: content["splits"]["train"][0].update(file=5), "is damaged"),
        (lambda content: content["splits"]["train"][0].update(tokens="5"), "is damaged"),
        (lambda content: content["splits"]["train"][0].update(file="../x.arrow"), "x.arrow' is outside of the folder"),
        (lambda content: content["splits"]["train"][0].update(file="/x.arrow"), "x.arrow' is outside of the folder"),
        (lambda content: content["splits"]["train"][0].update(extra=1), "is damaged"),
        (lambda content: content["splits"]["train"].pop(), "does not match its own fingerprint"),
        (lambda content: content["splits"]["train"][0].update(source="\ud800"), "does not match its own fingerprint"),
        (lambda content: content["splits"]["train"][0].update(source="wiki"), "does not match its own fingerprint"),
        (lambda content: content["splits"]["train"].reverse(), "does not match its own fingerprint"),
        (lambda content: content["tokenizer"].update(fingerprint="0"), "does not match its own fingerprint"),
        (lambda content: content["tokenizer"].update(mask_token_id=5), "made with another tokenizer"),
    ],
)
def test_a_manifest_that_was_changed_is_noticed(folder, change, message):
    edit(folder / "manifest.json", change)
    with pytest.raises(UserError, match=message):
        Corpus.open(folder)


def test_another_tokenizer_in_the_data_folder_is_noticed(folder):
    def swap_two_ids(content):
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[100:102]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(folder / "tokenizer/tokenizer.json", swap_two_ids)
    with pytest.raises(UserError, match=r"made with another tokenizer .*put the right one back or prepare"):
        Corpus.open(folder)


def test_a_data_folder_without_its_tokenizer_is_noticed(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"no tokenizer in .*preprocess train-tokenizer"):
        Corpus.open(folder)


def test_a_tokenizer_knows_its_special_ids(tokenizer_folder):
    info = TokenizerInfo.read(tokenizer_folder)
    assert (info.bos_token_id, info.pad_token_id, info.eos_token_id, info.mask_token_id) == (0, 1, 2, 399)
    assert info.special_ids == (0, 1, 2, 3, 399)
    assert info.vocab_size == 400


@pytest.mark.parametrize("token", ["<s>", "<pad>", "</s>", "<mask>"])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, tokenizer_folder, token):
    shutil.copytree(tokenizer_folder, tmp_path / "t")

    def remove(content):
        content["model"]["vocab"].pop(token, None)
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]

    edit(tmp_path / "t/tokenizer.json", remove)
    with pytest.raises(UserError, match=f"has no {token} token: use a tokenizer of the RoBERTa kind"):
        TokenizerInfo.read(tmp_path / "t")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json' is not a byte-level BPE"):
        TokenizerInfo.read(tmp_path)


def test_merges_and_normalization_are_part_of_a_tokenizers_identity(tmp_path, tokenizer_folder):
    original = TokenizerInfo.read(tokenizer_folder).fingerprint
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    identity = {
        "vocab": {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}},
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "normalizer": content["normalizer"],
        "pre_tokenizer": content["pre_tokenizer"],
    }
    assert original == json_fingerprint(identity)
    changes = [
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    ]
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(tokenizer_folder, folder)
        edit(folder / "tokenizer.json", change)
        assert TokenizerInfo.read(folder).fingerprint != original

    def as_strings(content):  # how older versions of the library write merges
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]

    shutil.copytree(tokenizer_folder, tmp_path / "strings")
    edit(tmp_path / "strings/tokenizer.json", as_strings)
    assert TokenizerInfo.read(tmp_path / "strings").fingerprint == original
