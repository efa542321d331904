"""Stages: read from schedules, and the places that their steps draw."""

import json

import pytest

from ds_roberta.config import Stage
from ds_roberta.data.stages import SkippedPlaces, make_stages, places_used, read_skipped, schedule_text, skip
from ds_roberta.errors import UserError

STAGES = make_stages(512, 64, "0:128,4:512,9:128,12:512", "0:16,6:32,10:64")


def drawn(stages, length, steps, skipped=()):
    """All places of a length that the steps draw, in their order, found step by step."""
    places = []
    for step in steps:
        stage = [each for each in stages if each.first_step <= step][-1]
        if stage.max_seq_length == length:
            first = places_used(stages, length, step, skipped)
            places += range(first, first + stage.train_batch_size)
    return places


def test_a_run_without_schedules_is_one_stage():
    assert make_stages(512, 8192) == (Stage(0, 512, 8192),)


def test_two_schedules_together_are_stages():
    assert (
        Stage(0, 128, 16),
        Stage(4, 512, 16),
        Stage(6, 512, 32),
        Stage(9, 128, 32),
        Stage(10, 128, 64),
        Stage(12, 512, 64),
    ) == STAGES
    assert schedule_text(STAGES, "max_seq_length") == "0:128,4:512,9:128,12:512"
    assert schedule_text(STAGES, "train_batch_size") == "0:16,6:32,10:64"


@pytest.mark.parametrize(
    ("lengths", "sizes", "words"),
    [
        ("128,512", None, "--max_seq_length_schedule must be STEP:VALUE pairs .* got '128,512'"),
        ("0:128,", None, "STEP:VALUE pairs"),
        ("0:128,1.%:512", None, "STEP:VALUE pairs"),
        ("0:128,100%:512", None, "must be below 100, where the run ends, got 100%"),
        ("5%:512", None, r"start at 0 and increase, got '5%:512' \(steps 50 of 1000\)"),
        ("0:128,900:256,60%:512", None, r"start at 0 and increase, .* \(steps 0, 900, 600 of 1000\)"),
        ("0:128,60%:256,60.05%:512", None, r"start at 0 and increase, .* \(steps 0, 600, 600 of 1000\)"),
        ("", None, "STEP:VALUE pairs"),
        ("0:128,-9:512", None, "STEP:VALUE pairs"),
        ("5:512", None, "steps of --max_seq_length_schedule must start at 0 and increase"),
        ("0:128,9:256,9:512", None, "start at 0 and increase"),
        ("0:128,9:256", None, r"--max_seq_length_schedule must end with the run's max_seq_length \(512\)"),
        ("0:2,9:512", None, "max_seq_length must be at least 3, got 2"),
        ("0:1024,9:512", None, r"must not exceed --max_seq_length \(512\).*got 1024"),
        (None, "0:0,9:64", "each value of --train_batch_size_schedule must be a positive whole number, got 0"),
        (None, "0:16,9:32", r"must end with the run's train_batch_size \(64\)"),
        (None, "0:48,9:64", r"must be a multiple of the first \(48\), got 64"),
    ],
)
def test_a_wrong_schedule_is_a_user_error(lengths, sizes, words):
    with pytest.raises(UserError, match=words):
        make_stages(512, 64, lengths, sizes, 1_000)


def test_percents_are_of_the_run_and_rounded_down_to_a_step():
    assert make_stages(512, 64, "0:128,9.99%:512", "0%:32,50%:64", max_steps=301) == make_stages(
        512, 64, "0:128,30:512", "0:32,150:64"
    )
    with pytest.raises(UserError, match=r"needs steps here, not percents, got '0:128,50%:512': the run's config\.json"):
        make_stages(512, 64, "0:128,50%:512")


@pytest.mark.parametrize("length", [128, 512])
def test_the_steps_of_a_length_draw_its_places_without_gap_or_repeat(length):
    places = drawn(STAGES, length, range(30))
    assert places == list(range(len(places)))
    assert len(places) == places_used(STAGES, length, 30)


def test_a_far_step_is_found_in_closed_form():
    assert places_used(STAGES, 512, 10**12) == 2 * 16 + 3 * 32 + (10**12 - 12) * 64


@pytest.mark.parametrize(("back_to", "spiked"), [(0, 1), (3, 5), (4, 6), (5, 11), (2, 14), (12, 13)])
def test_what_was_drawn_since_a_checkpoint_is_passed_over_and_nothing_else(back_to, spiked):
    skipped = skip(STAGES, back_to, [], spiked, [])
    for length in (128, 512):
        before, lost = drawn(STAGES, length, range(back_to)), drawn(STAGES, length, range(back_to, spiked))
        after = drawn(STAGES, length, range(back_to, 30), skipped)
        assert sorted(before + lost + after) == list(range(len(before + lost + after)))


def test_a_second_skip_adds_to_the_first_and_one_from_further_back_replaces_it():
    first = skip(STAGES, 5, [], 8, [])
    second = skip(STAGES, 8, first, 11, first)
    assert second[: len(first)] == first
    kept = drawn(STAGES, 512, range(5)) + drawn(STAGES, 512, range(5, 8), first)
    lost = drawn(STAGES, 512, range(5, 8)) + drawn(STAGES, 512, range(8, 11), first)
    after = drawn(STAGES, 512, range(8, 30), second)
    assert sorted(kept + lost + after) == list(range(len(kept + lost + after)))

    # The checkpoint of step 5 was damaged, and that of step 2 knows nothing of the first skip.
    instead = skip(STAGES, 2, [], 11, first)
    passed = [
        place for skip in instead if skip.max_seq_length == 512 for place in range(skip.first_place, skip.end_place)
    ]
    assert set(drawn(STAGES, 512, range(8)) + drawn(STAGES, 512, range(5, 11), first)) <= set(passed)


def test_what_a_checkpoint_passes_over_is_read_from_it(tmp_path):
    entry = {"global_step": 4, "max_seq_length": 128, "first_place": 64, "end_place": 96}
    (tmp_path / "train_state.json").write_text(json.dumps({"skipped_places": [entry]}))
    assert read_skipped(tmp_path) == [SkippedPlaces(4, 128, 64, 96)]
    with pytest.raises(UserError, match=r"cannot read train_state\.json of the checkpoint"):
        read_skipped(tmp_path / "nowhere")
