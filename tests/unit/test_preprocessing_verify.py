"""Damage to a data folder: found, and located."""

import dataclasses
import json
import random

import numpy as np
import pytest

from ds_roberta.data import shards
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from preprocessing.cli import main
from preprocessing.prepared.verify import shard_problems, verify

CHUNK = 4096


@pytest.fixture
def folder(tmp_path, write_corpus, monkeypatch):
    """A data folder of four shards of many small chunks, which the test may break."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", CHUNK)
    rng = np.random.default_rng(3)

    def documents(count):
        return [[rng.integers(4, 399, size=rng.integers(1, 90)) for _ in range(6)] for _ in range(count)]

    train = [documents(count) for count in (300, 10, 150)]
    write_corpus(tmp_path / "corpus", {"train": train, "validation": [documents(40)]})
    return tmp_path / "corpus"


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def run(*words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code


def test_every_one_of_1000_flipped_bits_is_found_and_located(folder):
    manifest = Corpus.open(folder).manifest
    infos = [info for split in manifest.splits.values() for info in split]
    sizes = [info.bytes for info in infos]
    assert sum(len(info.chunk_checksums) for info in infos) > 40
    rng = random.Random(5)
    flips = [(info, rng.randrange(info.bytes * 8)) for info in rng.choices(infos, sizes, k=1000 - 2 * len(infos))]
    flips += [(info, bit) for info in infos for bit in (0, info.bytes * 8 - 1)]  # Arrow's frame
    for info, bit in flips:
        flip(folder / info.file, bit)
        chunk = bit // 8 // CHUNK
        last = min((chunk + 1) * CHUNK, info.bytes) - 1
        assert shard_problems(folder, info) == [
            f"{info.file}: bytes {chunk * CHUNK}-{last} are damaged (chunk {chunk})"
        ]
        flip(folder / info.file, bit)
    assert verify(folder) == []


def test_many_damaged_chunks_are_all_named_by_any_number_of_workers(folder):
    infos = Corpus.open(folder).manifest.splits["train"]
    expected = []
    for info in infos:
        for chunk in range(0, len(info.chunk_checksums), 3):
            flip(folder / info.file, chunk * CHUNK * 8 + 77)
            expected.append((info.file, chunk))
    assert len(expected) > 10
    for workers in (1, 3):
        found = verify(folder, workers)
        assert [(line.split(":")[0], int(line.split("chunk ")[1].rstrip(")"))) for line in found] == expected


def test_a_flipped_bit_of_any_other_file_is_found(folder):
    others = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".arrow"]
    assert len(others) >= 7
    rng = random.Random(1)
    for path in others:
        content = path.read_bytes()
        for _ in range(20):
            flip(path, rng.randrange(len(content) * 8))
            named = path.relative_to(folder).as_posix()
            assert any(line.startswith((f"{named}: ", "tokenizer: ")) for line in verify(folder)), named
            path.write_bytes(content)
    assert verify(folder) == []


def test_every_value_of_the_manifest_is_covered(folder):
    path = folder / "manifest.json"
    whole = path.read_text()
    for change in (
        lambda content: content["splits"]["train"][0].update(documents=301),
        lambda content: content["splits"]["train"][1]["chunk_checksums"].pop(),
        lambda content: content["options"].update(extra=1),
        lambda content: content["files"].popitem(),
        lambda content: content.pop("checksum"),
        lambda content: content.update(inputs=[]) or content.pop("files"),
    ):
        content = json.loads(whole)
        change(content)
        path.write_text(json.dumps(content))
        assert any(line.startswith("manifest.json: ") for line in verify(folder))
    path.write_text(json.dumps(json.loads(whole)))  # other white space says the same
    assert verify(folder) == []


@pytest.mark.parametrize("change", [-1, -CHUNK - 5, 1, CHUNK])
def test_a_cut_or_lengthened_shard_is_named_with_both_sizes(folder, change):
    info = Corpus.open(folder).manifest.splits["train"][0]
    path = folder / info.file
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    found = verify(folder)
    assert found[0] == f"{info.file}: has {info.bytes + change} bytes, the manifest says {info.bytes}"


def test_missing_and_superfluous_files_are_named(folder):
    (folder / "train/shard-00001.arrow").unlink()
    (folder / "dataset_dict.json").unlink()
    (folder / "train/.shard-00007.arrow.99.tmp").touch()
    (folder / "notes.txt").touch()
    (folder / "index").mkdir()
    (folder / "index/cache.npy").touch()
    assert verify(folder) == [
        "dataset_dict.json: missing",
        "train/shard-00001.arrow: missing",
        "notes.txt: superfluous, not in the manifest",
        "train/.shard-00007.arrow.99.tmp: superfluous, not in the manifest",
    ]


def test_the_command_says_whole_or_exits_with_1_and_the_damage(folder, capsys):
    assert run("verify", folder, "--workers", 2) == 0
    assert "is whole" in capsys.readouterr().out
    flip(folder / "train/shard-00000.arrow", 12_345 * 8)
    assert run("verify", folder) == 1
    output = capsys.readouterr().out
    assert output.splitlines()[0] == "train/shard-00000.arrow: bytes 12288-16383 are damaged (chunk 3)"
    assert "1 problem(s)" in output
    (folder / "manifest.json").write_text("{")
    assert run("verify", folder) == 1
    assert run("verify", folder / "train") == 2
    assert run("verify", folder, "--workers", 0) == 2


def test_a_wrong_checksum_of_the_whole_is_named_if_the_chunks_are_right(folder):
    info = Corpus.open(folder).manifest.splits["train"][0]
    (problem,) = shard_problems(folder, dataclasses.replace(info, checksum="0" * 32))
    assert problem == f"{info.file}: its chunks match the manifest, the whole does not"


def test_a_folder_without_a_manifest_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        verify(tmp_path)
