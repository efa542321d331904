"""Pairs of segments: what they are made of, and that nothing but drawn segments is seen twice or cut."""

from dataclasses import replace

import numpy as np
import pytest

from ds_roberta.config import PAIR_FORMATS, MaskingConfig, PackingConfig
from ds_roberta.data.global_batch import EMPTY_PLACE
from ds_roberta.data.loader import Collator
from ds_roberta.data.masking import training_masker
from ds_roberta.data.packing import build_index, open_index, pack_shard, packed_tokens
from ds_roberta.data.pairs import IS_NEXT, IS_RANDOM
from ds_roberta.data.shards import Corpus, Split, write_shard
from ds_roberta.errors import UserError

LENGTH = 64


def build(corpus, form, length=LENGTH, split="train"):
    packing = PackingConfig(length, form)
    build_index(corpus, split, packing)
    return open_index(corpus, split, packing)


@pytest.fixture(scope="module", params=PAIR_FORMATS)
def packed(request, corpus):
    return build(corpus, request.param)


def pairs_of(packed):
    """Labels, and the segments as (shard, start, end) of each pair."""
    everything = np.arange(len(packed))
    first, second = (np.stack(each, axis=1) for each in packed.segments(everything))
    return packed.next_sentence_labels(everything), first, second


def document_of(corpus, segments):
    """The number of the document that holds each segment, which ends in it too; shards count from a million."""
    split, found = corpus.split("train"), []
    for shard, start, end in segments.tolist():
        offsets = split.document_offsets(shard)
        document = int(np.searchsorted(offsets, start, side="right")) - 1
        assert end < offsets[document + 1]  # not even its separator is in the segment
        found.append(1_000_000 * shard + document)
    return np.array(found)


def test_about_half_of_the_pairs_are_contiguous_and_the_others_of_two_documents(corpus, packed):
    labels, first, second = pairs_of(packed)
    assert set(labels.tolist()) == {IS_NEXT, IS_RANDOM}
    assert abs((labels == IS_NEXT).mean() - 0.5) < 0.12  # sentences alone at documents' ends can only have drawn ones
    following = labels == IS_NEXT
    assert np.array_equal(second[following, :2], first[following][:, [0, 2]])
    documents, others = document_of(corpus, first), document_of(corpus, second)
    assert np.array_equal(documents == others, following)


def test_long_documents_make_as_many_pairs_of_each_label(tmp_path, write_corpus):
    rng = np.random.default_rng(0)
    documents = [[rng.integers(4, 300, size=n) for n in rng.integers(1, 12, size=900)] for _ in range(4)]
    corpus = write_corpus(tmp_path / "c", {"train": [documents]})
    for form in PAIR_FORMATS:
        labels, _, second = pairs_of(build(corpus, form))
        assert len(labels) > 400
        assert abs((labels == IS_NEXT).mean() - 0.5) < 0.08
        assert len(np.unique(document_of(corpus, second[labels == IS_RANDOM]))) == 4


def test_every_sentence_is_seen_once_beside_the_segments_drawn(corpus, packed):
    labels, first, second = pairs_of(packed)
    split = corpus.split("train")
    for shard in range(len(split.shards)):
        own = [segment for segment in (*first.tolist(), *second[labels == IS_NEXT].tolist()) if segment[0] == shard]
        seen = np.zeros(len(split.values(shard)), dtype=int)
        for _, start, end in own:
            assert end > start
            seen[start:end] += 1
        is_separator = np.zeros(len(seen), dtype=bool)
        is_separator[split.document_offsets(shard)[1:] - 1] = True
        assert np.array_equal(seen, (~is_separator).astype(int))


def test_segments_begin_and_end_at_sentences(tmp_path, write_corpus):
    rng = np.random.default_rng(1)
    documents = [[rng.integers(4, 300, size=n) for n in rng.integers(1, 12, size=30)] for _ in range(20)]
    corpus = write_corpus(tmp_path / "c", {"train": [documents]})
    starts, ends = (set(bounds.tolist()) for bounds in corpus.split("train").sentence_bounds(0))
    for form in PAIR_FORMATS:
        labels, first, second = pairs_of(build(corpus, form))
        assert set(first[:, 1].tolist()) | set(second[:, 1].tolist()) <= starts
        assert set(first[:, 2].tolist()) | set(second[labels == IS_NEXT][:, 2].tolist()) <= ends
        sentences = [sum(start < end <= stop for end in ends) for _, start, stop in first.tolist()]
        assert set(sentences) == {1} if form == "sentence-pair" else max(sentences) > 4


def test_rows_are_pairs_with_two_separators_and_nothing_is_longer(corpus, packed):
    tokenizer = corpus.manifest.tokenizer
    collator = Collator(packed, training_masker(MaskingConfig(), tokenizer, 1), tokenizer, LENGTH)
    sequences = np.arange(len(packed))
    micro_batch = collator.collate(sequences, sequences)
    ids = micro_batch.input_ids.clone()
    ids.view(-1)[micro_batch.masked_positions] = micro_batch.labels
    split, total = corpus.split("train"), 0
    _, first, second = pairs_of(packed)
    for row, (shard, start, end), (other, other_start, other_end) in zip(ids.tolist(), first, second, strict=True):
        expected = [0, *split.values(shard)[start:end].tolist(), 2, 2]
        expected += [*split.values(other)[other_start:other_end].tolist(), 2]
        assert len(expected) <= LENGTH
        assert row == expected + [1] * (LENGTH - len(expected))
        total += len(expected)
    assert micro_batch.tokens == total
    assert micro_batch.next_sentence_labels.tolist() == packed.next_sentence_labels(sequences).tolist()


def test_segment_pairs_fill_most_of_a_sequence_and_are_counted(corpus):
    packing = PackingConfig(LENGTH, "segment-pair")
    packed, split = build(corpus, packing.format), corpus.split("train")
    slices = [pack_shard(split, shard, packing) for shard in range(len(split.shards))]
    tokens = sum(packed_tokens(each, packing) for each in slices)
    assert sum(map(len, slices)) == len(packed)
    _, first, second = pairs_of(packed)
    assert tokens == (first[:, 2] - first[:, 1] + second[:, 2] - second[:, 1] + 4).sum()
    assert tokens / len(packed) > 0.7 * LENGTH


def test_empty_places_have_no_label(corpus, packed):
    tokenizer = corpus.manifest.tokenizer
    collator = Collator(packed, training_masker(MaskingConfig(), tokenizer, 1), tokenizer, LENGTH)
    places = np.array([3, 8, EMPTY_PLACE, EMPTY_PLACE])
    full, empty = collator.collate_all(places.clip(min=0), places, 2)
    assert (len(full.next_sentence_labels), len(empty.next_sentence_labels)) == (2, 0)


@pytest.mark.parametrize(
    ("form", "shard", "expected"),
    [
        (
            "segment-pair",
            0,
            [
                (0, 11, 0, 11, 2, 0),
                (14, 6, 0, 11, 2, 1),
                (20, 7, 0, 1, 6, 1),
                (27, 5, 0, 11, 2, 1),
                (33, 7, 0, 40, 5, 0),
                (45, 3, 0, 48, 1, 0),
            ],
        ),
        ("segment-pair", 1, [(0, 11, 0, 27, 3, 1), (11, 2, 0, 40, 9, 1)]),
        (
            "sentence-pair",
            0,
            [
                (0, 1, 0, 1, 6, 0),
                (7, 4, 0, 27, 5, 1),
                (11, 2, 0, 20, 7, 1),
                (14, 4, 0, 18, 2, 0),
                (20, 7, 0, 33, 7, 1),
                (27, 5, 0, 45, 3, 1),
                (33, 7, 0, 27, 5, 1),
                (40, 5, 0, 1, 6, 1),
                (45, 3, 0, 48, 1, 0),
            ],
        ),
        ("sentence-pair", 1, [(0, 1, 1, 1, 6, 0), (7, 4, 1, 11, 2, 0)]),
    ],
)
def test_pairs_are_those_of_earlier_versions(tmp_path, form, shard, expected):
    """Or a resumed run would see others."""
    lengths = [[[1, 6, 4, 2], [4, 2, 7, 5], [7, 5, 3, 1]], [[1, 6, 4, 2]]]  # by shards, documents and sentences
    shards = []
    for index, documents in enumerate(lengths):
        ids = [np.full(sum(sentences) + 1, 9) for sentences in documents]
        shards.append(write_shard(tmp_path, "train", index, ids, list(map(np.cumsum, documents)), 400))
    split = Split(tmp_path, "train", shards, 400)
    assert pack_shard(split, shard, PackingConfig(18, form)).tolist() == expected


def test_a_shard_of_one_document_draws_from_the_next_of_its_source(tmp_path, write_corpus, with_sources):
    rng = np.random.default_rng(2)
    shards = [[[rng.integers(4, 300, size=9) for _ in range(400)]] for _ in range(4)]
    corpus = write_corpus(tmp_path / "c", {"train": shards})
    for names, partners in ((["a"] * 4, [1, 2, 3, 0]), (["a", "b", "a", "c"], [2, 2, 0, 0])):
        split = with_sources(corpus, names).split("train")
        for shard, partner in enumerate(partners):
            slices = pack_shard(split, shard, PackingConfig(LENGTH, "segment-pair"))
            drawn = slices["second_shard"][slices["next_sentence_label"] == IS_RANDOM]
            assert set(drawn.tolist()) == {partner}


def test_data_of_which_no_pairs_can_be_made_are_refused(tmp_path, write_corpus):
    one = write_corpus(tmp_path / "one", {"train": [[[np.arange(4, 14)]]]})
    with pytest.raises(UserError, match="has only one document: prepare more text, or use another --packing"):
        build(one, "segment-pair")
    lines = write_corpus(tmp_path / "lines", {"train": [[[np.arange(4, 14)]] * 9]})
    with pytest.raises(UserError, match=r"--packing sentence-pair needs documents with several.*--sentences rules"):
        build(lines, "sentence-pair")
    by_rules = Corpus(lines.folder, replace(lines.manifest, options={"sentences": "rules"}))
    with pytest.raises(UserError, match=r"found no second sentence in any \(Thai.*: put one sentence on a line"):
        build(by_rules, "sentence-pair")
    with pytest.raises(UserError, match="--max_seq_length must be at least 6, got 5"):
        PackingConfig(5, "segment-pair")


@pytest.mark.parametrize("form", PAIR_FORMATS)
def test_few_documents_of_several_sentences_are_taken_though_no_segment_follows(tmp_path, write_corpus, form):
    corpus = write_corpus(tmp_path / "few", {"train": [[[np.arange(4, 14)] * 2] * 6]})
    labels, _, _ = pairs_of(build(corpus, form, 134))
    assert set(labels.tolist()) == {IS_RANDOM}
