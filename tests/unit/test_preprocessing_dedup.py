"""Which repeated documents are dropped, and that only the plan decides it."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest
from prepare import folder_hash, prepare_corpus

from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from preprocessing import dedup, units
from preprocessing.reading.documents import ReadOptions
from preprocessing.units import ShardOptions

RNG = random.Random(5)
WORDS = ["".join(RNG.choices("abcdefgh", k=5)) for _ in range(500)]
TEXTS = [" ".join(RNG.choices(WORDS, k=80)) + f"\nand {i}" for i in range(60)]
NEAR = [f"{text[:200]} changed {text[200:]}" for text in TEXTS[:20]]
"""One word of 80 more: five of 80 shingles differ, a similarity of about 0.94."""
FAR = [" ".join(word for i, word in enumerate(text.split()) if i % 4) for text in TEXTS[20:30]]
"""Every fourth word is missing: hardly a run of five is left."""


def write(folder, *files):
    paths = []
    for name, texts in zip("abc", files, strict=False):
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
        paths.append(str(folder / f"{name}.txt"))
    return paths


def prepare(folder, files, tokenizer, dedup, name="out"):
    """The decoded documents of both splits in order, and the rejects of each file."""
    from tokenizers import Tokenizer

    options = ShardOptions(validation_fraction=0.3, unit_bytes=3000, dedup=dedup)
    manifest, totals = prepare_corpus(files, tokenizer, folder / name, options)
    corpus, decoder = Corpus.open(folder / name), Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    found = []
    for split_name in ("train", "validation"):
        split = corpus.split(split_name)
        for shard in range(len(split.shards)):
            values, offsets = split.values(shard), split.document_offsets(shard)
            assert split.sentence_bounds(shard)[1].max() == len(values) - 1
            found += [decoder.decode(values[begin : end - 1]) for begin, end in itertools.pairwise(offsets)]
    for shards in manifest.splits.values():
        for shard in shards:
            assert sum(piece.documents for piece in shard.pieces) == shard.documents
    for entry in manifest.inputs:
        assert entry.documents_read == entry.documents_kept + sum(entry.rejected.values())
    assert len(found) == sum(entry.documents_kept for entry in manifest.inputs)
    return found, [entry.rejected for entry in manifest.inputs], totals, manifest


def flat(texts):
    return sorted(text.replace("\n", " ") for text in texts)


def test_the_first_of_equal_documents_stays(tokenizer_folder, tmp_path):
    files = write(tmp_path, TEXTS[:40], [*TEXTS[30:50], *NEAR], [*TEXTS, TEXTS[0], TEXTS[59]])
    found, rejected, totals, manifest = prepare(tmp_path, files, tokenizer_folder, "exact")
    assert sorted(found) == flat([*TEXTS, *NEAR])
    assert rejected == [{}, {"duplicate": 10}, {"duplicate": 52}]
    assert totals.text_bytes == sum(len(text) for text in [*TEXTS, *NEAR])
    assert manifest.options["dedup"] == "exact"
    assert prepare(tmp_path, files, tokenizer_folder, "none", name="all")[1] == [{}, {}, {}]


def test_the_first_of_similar_documents_stays(tokenizer_folder, tmp_path):
    pytest.importorskip("rensa", reason="near copies are found with the library rensa")
    files = write(tmp_path, TEXTS[:40], [*NEAR, *FAR, *TEXTS[40:]], [TEXTS[0], NEAR[1].upper(), NEAR[2]])
    found, rejected, _, manifest = prepare(tmp_path, files, tokenizer_folder, "near")
    assert sorted(found) == flat([*TEXTS, *FAR])
    assert rejected == [{}, {"near_duplicate": 20}, {"duplicate": 2, "near_duplicate": 1}]
    assert manifest.options["near_similarity"] == 0.8


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_the_division_of_the_merge_decides_nothing(tokenizer_folder, tmp_path, kind, monkeypatch):
    if kind == "near":
        pytest.importorskip("rensa", reason="near copies are found with the library rensa")
    files = write(tmp_path, TEXTS[:20], [*NEAR[:8], *FAR[:2]], [*TEXTS[:12:2], *NEAR[:8:3]])
    rejected = prepare(tmp_path, files, tokenizer_folder, kind)[1]
    assert [sum(counts.values()) for counts in rejected] == ([0, 8, 9] if kind == "near" else [0, 0, 9])
    monkeypatch.setattr(dedup, "RANGE_ROWS", 15)
    prepare(tmp_path, files, tokenizer_folder, kind, name="divided")
    assert folder_hash(tmp_path / "out") == folder_hash(tmp_path / "divided")


def test_a_unit_of_only_copies_leaves_no_shard(tokenizer_folder, tmp_path):
    files = write(tmp_path, TEXTS[:30], TEXTS[:30], TEXTS[30:])
    manifest = prepare(tmp_path, files, tokenizer_folder, "exact")[-1]
    numbers = [shard.file[-11:-6] for shard in manifest.splits["train"]]
    assert numbers == [f"{unit:05d}" for unit in (*range(5), *range(10, 15))]
    assert sorted(path.name[-11:-6] for path in (tmp_path / "out/train").glob("*.arrow")) == numbers


def test_parts_and_sources_of_a_large_unit_are_counted_again(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_BATCH_BYTES", 6000)  # a part ends with a batch
    lines = "".join(
        json.dumps({"text": t, "from": f"site {i % 3}"}) + "\n" for i, t in enumerate([*TEXTS, *TEXTS[:40]])
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    options = ShardOptions(ReadOptions(source_column="from"), 0.0, 3000, dedup="exact")
    # The first of a text is from site i % 3; its copy, 60 lines on, is from the same.
    manifest, _ = prepare_corpus([str(tmp_path / "a.jsonl.gz")], tokenizer_folder, tmp_path / "out", options, 1)
    shards = manifest.splits["train"]
    assert len(shards) == 15  # three of each of eight parts: those of the last three held copies alone
    for site in range(3):
        assert sum(shard.documents for shard in shards if shard.source == f"site {site}") == 20
    assert sum(piece.documents for shard in shards for piece in shard.pieces) == 60
    assert sorted(shard.file for shard in shards) == sorted(
        str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/train/*.arrow")
    )


def test_a_file_without_documents_does_no_harm(tokenizer_folder, tmp_path):
    files = write(tmp_path, [" "] * 900, TEXTS, TEXTS[:3])
    assert prepare(tmp_path, files, tokenizer_folder, "exact")[1][2] == {"duplicate": 3}


@pytest.mark.parametrize(
    ("one", "other", "is_near"),
    [
        ("लड़का घर जाता था", "लड़की घर जाती थी", False),
        ("x + y = z and a", "x > y = z and a", False),
        ("He said: a b c d e, f!", "he said a b c d (e) f", True),
    ],
)
def test_words_have_their_marks_and_formulas_their_symbols(one, other, is_near):
    pytest.importorskip("rensa", reason="near copies are found with the library rensa")
    similarity = np.mean(dedup._signature(one) == dedup._signature(other))
    assert (similarity >= dedup.NEAR_SIMILARITY) == is_near


def test_half_of_a_hash_in_common_is_not_the_same(tmp_path):
    keys = np.array([[[7, 7, 7, 9], [1, 2, 1, 1], [0, 1, 2, 3]]], np.uint64)
    dedup._save(tmp_path / "keys", 0, keys[:, :, :3])
    dedup._save(tmp_path / "keys", 1, keys[:, :, 3:])
    dedup.merge(tmp_path, tmp_path, 2, 4, 0)
    assert dedup._load(tmp_path / "drops", 0).tolist() == [(0, 2)]


def test_a_missing_library_is_named_with_the_remedy(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(UserError, match=r"--dedup near needs .*ds_roberta\[dedup\]"):
        prepare(tmp_path, write(tmp_path, TEXTS), tokenizer_folder, "near")
    assert not (tmp_path / ".out.partial").exists()
