import numpy as np
import pytest

from ds_roberta.config import MaskingConfig
from ds_roberta.data import masking
from ds_roberta.data.masking import Masker, evaluation_masker, training_masker
from ds_roberta.data.tokenizer import TokenizerInfo

SPECIAL = (0, 1, 2, 3, 999)
TOKENIZER = TokenizerInfo(1000, 0, 1, 2, 999, SPECIAL, "f")
ROWS, LENGTH = 4000, 128
MASKABLE = LENGTH - 2


def full_rows(rows=ROWS, length=LENGTH):
    ids = np.random.default_rng(0).integers(4, 999, size=(rows, length))
    ids[:, 0], ids[:, -1] = 0, 2
    return ids


def masked(masker, original, places=None):
    """The masked copy, and the labels as an array of the same shape with -100 elsewhere."""
    ids = original.copy()
    positions, labels = masker.mask(ids, np.arange(len(ids)) if places is None else places)
    grid = np.full(ids.shape, -100)
    grid.reshape(-1)[positions] = labels
    return ids, grid


@pytest.fixture(scope="module")
def original():
    return full_rows()


@pytest.fixture(scope="module")
def masker():
    return training_masker(MaskingConfig(), TOKENIZER, seed=1)


def test_fifteen_percent_are_chosen_in_every_sequence(masker, original):
    _, labels = masked(masker, original)
    counts = (labels != -100).sum(axis=1)
    assert set(counts.tolist()) == {18, 19}  # 18.9, rounded down or up
    assert abs(counts.mean() - 0.15 * MASKABLE) < 0.02


def test_labels_are_the_true_ids_at_rising_positions_and_nothing_else_changes(masker, original):
    ids = original.copy()
    positions, labels = masker.mask(ids, np.arange(ROWS))
    assert (np.diff(positions) > 0).all()
    assert np.array_equal(labels, original.reshape(-1)[positions])
    ids.reshape(-1)[positions] = labels
    assert np.array_equal(ids, original)


def test_eighty_ten_ten(masker, original):
    ids, labels = masked(masker, original)
    chosen = labels != -100
    became_mask, stayed = ids[chosen] == 999, ids[chosen] == original[chosen]
    assert abs(became_mask.mean() - 0.8) < 0.006
    assert abs(stayed.mean() - 0.1) < 0.006
    assert abs((~became_mask & ~stayed).mean() - 0.1) < 0.006


def test_every_position_is_chosen_equally_often(masker, original):
    _, labels = masked(masker, original)
    share = (labels != -100)[:, 1:-1].mean(axis=0)
    assert np.abs(share - 0.15).max() < 0.034  # 6 standard deviations


def test_what_becomes_of_a_token_does_not_depend_on_its_position(masker, original):
    ids, labels = masked(masker, original)
    for columns in (slice(1, 64), slice(64, 127), slice(1, 127, 2)):
        chosen = labels[:, columns] != -100
        assert abs((ids[:, columns][chosen] == 999).mean() - 0.8) < 0.012


def test_random_replacements_are_any_ordinary_token(masker, original):
    ids, labels = masked(masker, original)
    replacements = ids[(labels != -100) & (ids != 999) & (ids != original)]
    assert not np.isin(replacements, SPECIAL).any()
    assert len(np.unique(replacements)) > 985  # of 995; 7,500 draws leave out one or two
    assert abs(replacements.mean() - 501) < 20


def test_special_tokens_are_never_chosen(masker):
    rng = np.random.default_rng(3)
    original = full_rows(500)
    special = rng.random(original.shape) < 0.4
    original[special] = rng.choice(SPECIAL, size=special.sum())
    ids, labels = masked(masker, original)
    is_special = np.isin(original, SPECIAL)
    assert (labels[is_special] == -100).all()
    assert np.array_equal(ids[is_special], original[is_special])
    quota = 0.15 * (~is_special).sum(axis=1)
    counts = (labels != -100).sum(axis=1)
    assert (counts >= np.floor(quota)).all()
    assert (counts <= np.floor(quota) + 1).all()


def test_masks_do_not_depend_on_the_batch(masker, original):
    places = np.arange(100, 200)
    ids, labels = masked(masker, original[:100], places)
    shuffled = np.random.default_rng(0).permutation(100)
    for rows in ([5], shuffled[:7], shuffled):
        part_ids, part_labels = masked(masker, original[:100][rows], places[rows])
        assert np.array_equal(part_ids, ids[rows])
        assert np.array_equal(part_labels, labels[rows])


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_masks_do_not_depend_on_the_integer_type(masker, original, dtype):
    ids, labels = masked(masker, original[:50])
    other_ids, other_labels = masked(masker, original[:50].astype(dtype))
    assert np.array_equal(ids, other_ids)
    assert np.array_equal(labels, other_labels)
    positions, values = masker.mask(original[:50].astype(dtype), np.arange(50))
    assert positions.dtype == values.dtype == np.int64


def test_places_and_seeds_have_masks_of_their_own(original):
    def chosen(seed, first):
        masker = training_masker(MaskingConfig(), TOKENIZER, seed)
        return masked(masker, original[:1000], np.arange(first, first + 1000))[1] != -100

    base = chosen(1, 0)
    for other in (chosen(1, 1000), chosen(2, 0), chosen(0, 0), chosen(1, 1)):
        agreeing = (base & other).sum() / base.sum()
        assert abs(agreeing - 0.15) < 0.02  # as by chance


def test_masks_do_not_depend_on_how_many_are_made_at_a_time(masker, original, monkeypatch):
    ids, labels = masked(masker, original[:300])
    monkeypatch.setattr(masking, "_CHUNK_TOKENS", 7 * LENGTH)
    chunked_ids, chunked_labels = masked(masker, original[:300])
    assert np.array_equal(ids, chunked_ids)
    assert np.array_equal(labels, chunked_labels)


def test_another_share_may_be_asked_for(masker, original):
    ids = original.copy()
    positions, _ = masker.mask(ids, np.arange(ROWS), mlm_probability=0.3)
    assert abs(len(positions) / (ROWS * MASKABLE) - 0.3) < 0.001
    other = Masker(MaskingConfig(), TOKENIZER, masker.key, 0.3)
    assert np.array_equal(other.mask(original.copy(), np.arange(ROWS))[0], positions)


@pytest.mark.parametrize(("given", "share"), [(None, 0.1), (0.2, 0.2)])
def test_evaluation_chooses_its_own_share_or_that_at_the_end_of_the_run(original, given, share):
    config = MaskingConfig(0.3, mlm_probability_end=0.1, eval_mlm_probability=given)
    chosen = (masked(evaluation_masker(config, TOKENIZER), original)[1] != -100).sum()
    assert abs(chosen / (ROWS * MASKABLE) - share) < 0.001


def test_evaluation_masks_are_not_those_of_any_training_seed(original):
    evaluation = masked(evaluation_masker(MaskingConfig(), TOKENIZER), original[:100])[1]
    for seed in (0, 1, 42):
        assert not np.array_equal(
            masked(training_masker(MaskingConfig(), TOKENIZER, seed), original[:100])[1], evaluation
        )
    again = masked(evaluation_masker(MaskingConfig(), TOKENIZER), original[:100])[1]
    assert np.array_equal(evaluation, again)


@pytest.mark.parametrize(("mask_share", "random_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_of_replacement_follow_the_configuration(original, mask_share, random_share):
    ids, labels = masked(Masker(MaskingConfig(0.15, mask_share, random_share), TOKENIZER, 5, 0.15), original)
    chosen = labels != -100
    assert (ids[chosen] == 999).mean() == mask_share
    if random_share:
        assert (ids[chosen] != original[chosen]).mean() > 0.99
    elif not mask_share:
        assert np.array_equal(ids, original)


@pytest.mark.parametrize("probability", [0.01, 0.4, 0.999])
@pytest.mark.parametrize("length", [3, 7, 32, 33, 512])
def test_other_probabilities_and_lengths_keep_the_share(probability, length):
    original = full_rows(600, length)
    _, labels = masked(Masker(MaskingConfig(probability), TOKENIZER, 9, probability), original)
    counts, quota = (labels != -100).sum(axis=1), probability * (length - 2)
    assert counts.min() >= np.floor(quota)
    assert counts.max() <= np.floor(quota) + 1
    assert abs(counts.mean() - quota) < 0.13  # 6 standard deviations of a fair coin


def test_sequences_without_ordinary_tokens_have_no_labels(masker):
    original = np.array([[0, 2, 1, 1], [0, 2, 2, 1]])
    ids, labels = masked(masker, original)
    assert (labels == -100).all()
    assert np.array_equal(ids, original)
    positions, labels = masker.mask(np.empty((0, 8), dtype=np.int64), np.empty(0, dtype=np.int64))
    assert positions.shape == labels.shape == (0,)


def test_masks_never_change_silently():
    ids = np.arange(4, 36)[None].copy()
    ids[0, 0], ids[0, -1] = 0, 2
    positions, labels = training_masker(MaskingConfig(), TOKENIZER, 0).mask(ids, np.array([12_345]))
    assert positions.tolist() == [16, 24, 26, 27, 29]
    assert labels.tolist() == [20, 28, 30, 31, 33]
    assert ids[0, positions].tolist() == [999, 999, 999, 341, 999]
