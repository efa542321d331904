"""Masking by whole words and by spans."""

import numpy as np
import pytest

from ds_roberta.config import MaskingConfig
from ds_roberta.data import masking
from ds_roberta.data.masking import Masker, training_masker
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.data.words import MAX_WORD_TOKENS, word_bounds

SPECIAL = (0, 1, 2, 3, 999)
TOKENIZER = TokenizerInfo(1000, 0, 1, 2, 999, SPECIAL, "f")
WORD_STARTS = np.arange(1000) % 3 != 0  # two thirds of the ids begin a word
ROWS, LENGTH = 3000, 128
UNITS = ("whole-word", "span")


def make(unit, probability=0.15, **shares):
    return training_masker(MaskingConfig(probability, unit=unit, **shares), TOKENIZER, 1, WORD_STARTS)


def mask(masker, original, places=None):
    """The masked copy, and which tokens were chosen: (B, T) bool."""
    ids = original.copy()
    positions, labels = masker.mask(ids, np.arange(len(ids)) if places is None else places)
    assert (np.diff(positions) > 0).all()
    assert np.array_equal(labels, original.reshape(-1)[positions])
    chosen = np.zeros(ids.shape, dtype=bool)
    chosen.reshape(-1)[positions] = True
    assert np.array_equal(ids[~chosen], original[~chosen])
    return ids, chosen


def words_of(original):
    """Flat bounds of the words that are not special tokens."""
    special = np.isin(original, SPECIAL)
    starts, ends = word_bounds(WORD_STARTS[original], special)
    ordinary = ~special.reshape(-1)[starts]
    return starts[ordinary], ends[ordinary]


@pytest.fixture(scope="module")
def original():
    """Rows with separators, runs longer than a word, and padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 999, size=(ROWS, LENGTH))
    ids[rng.random(ids.shape) < 0.02] = 2
    ids[::9, 30:70] = 6  # no word starts
    for row, length in enumerate(rng.integers(3, 2 * LENGTH, size=ROWS)):
        ids[row, min(length, LENGTH) - 1] = 2
        ids[row, length:] = 1
    ids[:, 0] = 0
    return ids


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.02, 0.15, 0.4, 0.99])
def test_words_are_chosen_whole_and_the_share_is_exact_on_average(original, unit, probability):
    _, chosen = mask(make(unit, probability), original)
    starts, ends = words_of(original)
    for offset in range(MAX_WORD_TOKENS):
        longer = ends - starts > offset
        flat = chosen.reshape(-1)
        assert np.array_equal(flat[starts[longer] + offset], flat[starts[longer]])
    special = np.isin(original, SPECIAL)
    assert not chosen[special].any()
    quota = probability * (~special).sum(axis=1)
    missed = chosen.sum(axis=1) - quota
    longest = MAX_WORD_TOKENS * (masking.MAX_SPAN_WORDS if unit == "span" else 1)
    assert np.abs(missed).max() < longest
    assert abs(missed.mean()) < 5 * missed.std() / np.sqrt(ROWS)
    assert missed.std() > 0


@pytest.mark.parametrize("unit", UNITS)
def test_masks_do_not_depend_on_the_batch_nor_on_the_integer_type(original, unit, monkeypatch):
    masker, places = make(unit), np.arange(100, 400)
    ids, chosen = mask(masker, original[:300], places)
    monkeypatch.setattr(masking, "_CHUNK_TOKENS", 7 * LENGTH)
    for rows in ([5], np.random.default_rng(0).permutation(300)):
        for dtype in (np.uint16, np.int64):
            part_ids, part_chosen = mask(masker, original[rows].astype(dtype), places[rows])
            assert np.array_equal(part_ids, ids[rows])
            assert np.array_equal(part_chosen, chosen[rows])
    _, elsewhere = mask(masker, original[:300], places + 1000)
    assert (elsewhere & chosen).sum() / chosen.sum() < 0.25


@pytest.mark.parametrize("unit", UNITS)
def test_eighty_ten_ten(original, unit):
    ids, chosen = mask(make(unit), original)
    became_mask, stayed = ids[chosen] == 999, ids[chosen] == original[chosen]
    assert abs(became_mask.mean() - 0.8) < 0.015
    assert abs(stayed.mean() - 0.1) < 0.015
    replacements = ids[chosen & (ids != 999) & (ids != original)]
    assert not np.isin(replacements, SPECIAL).any()
    assert len(np.unique(replacements)) > 800


def test_a_whole_word_is_replaced_token_by_token_and_a_span_as_one(original):
    starts, ends = words_of(original)
    long = ends - starts > 2
    for unit, alike in (("whole-word", 0.8), ("span", 1.0)):
        ids, chosen = mask(make(unit), original)
        words = starts[long & chosen.reshape(-1)[starts]]
        is_mask = ids.reshape(-1) == 999
        second_too = is_mask[words + 1][is_mask[words]]
        assert second_too.mean() == pytest.approx(alike, abs=0.02 * (alike < 1))


def test_spans_are_those_of_drawing_them_one_by_one(original):
    masker, rows = make("span", 0.3), original[:40]
    _, chosen = mask(masker, rows)
    draws = masking._draw(masking.mix64(np.arange(40, dtype=np.uint64) ^ np.uint64(masker.key)), LENGTH)
    border = (masking.mix64(~draws.row_keys) >> np.uint64(32)) * 2.0**-32
    starts, ends = words_of(rows)
    for row in range(40):
        here = starts // LENGTH == row
        words = list(zip((starts[here] % LENGTH).tolist(), ((ends[here] - 1) % LENGTH + 1).tolist(), strict=True))
        quota, taken, expected = 0.3 * (~np.isin(rows[row], SPECIAL)).sum(), set(), set()
        for first in sorted(range(len(words)), key=lambda word: draws.keys[row, words[word][0]]):
            span = []
            for word in range(
                first, min(first + masking._SPAN_WORDS[draws.bits[row, words[first][0]] & 0xFFFF], len(words))
            ):
                if word > first and words[word][0] != words[word - 1][1]:
                    break  # a special token lies between them
                span.append(words[word])
            fresh = [word for word in span if word not in taken]
            size = sum(end - start for start, end in fresh)
            if sum(end - start for start, end in taken) + border[row] * size < quota:
                expected.update(position for word in fresh for position in range(*word))
            taken.update(fresh)
        assert np.flatnonzero(chosen[row]).tolist() == sorted(expected)


def test_spans_have_one_to_ten_words_of_geometric_length():
    lengths = np.bincount(masking._SPAN_WORDS, minlength=11) / len(masking._SPAN_WORDS)
    assert lengths[0] == 0
    assert len(lengths) == 11
    assert lengths[2:] / lengths[1:-1] == pytest.approx([0.8] * 9, abs=0.01)
    assert masking._SPAN_WORDS.mean() == pytest.approx(3.8, abs=0.01)  # as in the paper


@pytest.mark.parametrize("unit", UNITS)
def test_sequences_without_ordinary_tokens_have_no_labels(unit):
    for original in (np.array([[0, 2, 1, 1], [0, 2, 2, 1]]), np.empty((0, 8), dtype=np.int64)):
        _, chosen = mask(make(unit), original)
        assert not chosen.any()


@pytest.mark.parametrize("unit", UNITS)
def test_units_of_words_need_their_table(unit):
    with pytest.raises(ValueError, match=f"{unit} needs the table of word starts"):
        Masker(MaskingConfig(unit=unit), TOKENIZER, 0, 0.15)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (
            "whole-word",
            [
                (9, 999),
                (19, 999),
                (20, 999),
                (22, 999),
                (23, 27),
                (30, 999),
                (39, 999),
                (45, 832),
                (55, 999),
                (56, 999),
            ],
        ),
        (
            "span",
            [
                (19, 999),
                (20, 999),
                (21, 999),
                (22, 999),
                (23, 999),
                (24, 999),
                (25, 999),
                (26, 999),
                (39, 999),
                (40, 999),
                (41, 999),
                (42, 999),
            ],
        ),
    ],
)
def test_masks_never_change_silently(unit, expected):
    ids = np.arange(4, 68)[None].copy()
    ids[0, 0], ids[0, -1] = 0, 2
    positions, _ = make(unit).mask(ids, np.array([54_321]))
    assert list(zip(positions.tolist(), ids[0, positions].tolist(), strict=True)) == expected
