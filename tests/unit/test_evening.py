"""`benchmarks.evening`: what overlaps, which learning rate is best, what is outside the spread, what a start costs."""

import argparse
import json
import random

import pytest

from benchmarks import studies

MODULES = ("overlap", "evening_pretraining", "evening_report", "time_to_loss")
# They need rensa and matplotlib.
overlap, pretraining, report, time_to_loss = (pytest.importorskip(f"benchmarks.{name}") for name in MODULES)
WORDS = [f"w{number}" for number in range(2_000)]


def words(count, seed):
    return random.Random(seed).choices(WORDS, k=count)


def document_with(passage):
    return " ".join([*words(1_500, "before"), *passage, *words(1_500, "after")])


@pytest.mark.parametrize("length", [5, 6, 7, 9, 13, 20, 33, 60, 150])
def test_a_copy_in_a_long_document_is_found_wherever_it_begins(length):
    text = words(length, length)
    for offset in range(3):
        assert overlap.near_copies([" ".join(text)], [document_with([*words(offset, "offset"), *text])]).tolist() == [
            True
        ]


def test_letter_case_and_punctuation_do_not_hide_a_copy():
    text = words(12, "text")
    assert overlap.near_copies([" ".join(text)], [document_with([", ".join(text).upper() + "."])]).all()


def test_a_word_may_differ_in_twenty_but_not_one_in_five():
    text = words(20, "text")
    changed = [*text[:10], "other", *text[11:]]
    often = [word if place % 5 else "other" for place, word in enumerate(text)]
    assert overlap.near_copies([" ".join(text)], [document_with(changed)]).all()
    assert not overlap.near_copies([" ".join(text)], [document_with(often)]).any()


def test_each_text_is_judged_by_itself():
    copied, equal, part, new = words(10, 1), words(10, 1), words(10, 1)[:4], words(10, 2)
    texts = [" ".join(each) for each in (new, copied, part, equal)]
    assert overlap.near_copies(texts, ["", "short", document_with(copied)]).tolist() == [False, True, False, True]
    assert [overlap.is_too_short(text) for text in texts] == [False, False, True, False]
    assert overlap.near_copies(["too short"], [document_with(copied)]).tolist() == [False]


def test_the_rate_with_the_best_median_wins_not_the_one_with_the_best_run():
    def setting(rate, *scores):
        runs = [{"epoch": 2, "epochs": [{"accuracy": 0.99}, {"accuracy": score}]} for score in scores]
        return {"learning_rate": rate, "runs": runs}

    scores = studies.scores_by_rate([setting(1e-4, 0.7, 0.72, 0.71), setting(3e-4, 0.9, 0.5, 0.6)], "accuracy")
    assert scores == {1e-4: [0.7, 0.72, 0.71], 3e-4: [0.9, 0.5, 0.6]}
    assert studies.best_rate(scores) == 1e-4


def test_outside_the_spread_means_that_the_ranges_of_the_seeds_do_not_overlap():
    assert studies.is_above([0.8, 0.9, 0.85], [0.79, 0.6, 0.7])
    assert not studies.is_above([0.8, 0.9, 0.85], [0.8, 0.6, 0.7])


@pytest.mark.parametrize(
    ("trainer", "untrained", "verdict"),
    [
        ([0.7, 0.75], [0.6, 0.7], "above the Trainer and untrained"),
        ([0.9, 0.95], [0.6, 0.7], "above untrained, below the Trainer"),
        ([0.9, 0.95], [0.7, 0.85], "below the Trainer"),
        ([0.7, 0.85], [0.7, 0.9], "within the spread"),
    ],
)
def test_a_tasks_row_says_where_ours_is_above_and_where_below(trainer, untrained, verdict):
    scores = {"ours": [0.8, 0.82], "trainer": trainer, "untrained": untrained}
    found = {f"{name}-sst2": {"scores": values} for name, values in scores.items()}
    assert report._verdict("sst2", found) == verdict


def test_the_error_of_a_difference_shrinks_with_the_pairs():
    assert report.difference(0.5, 0.5, 5_000) == (0.0, pytest.approx(0.01))


def test_the_bars_are_judged_once_what_they_need_is_measured():
    found = {f"{name}-held-out": {"all": {"loss": loss}} for name, loss in (("ours", 4.0), ("trainer", 4.7))}
    assert [(measured, passed) for _, measured, passed in report.bars(["sst2"], found)] == [("0.700", False)]
    scores = {"ours": [0.81, 0.8, 0.79], "trainer": [0.78, 0.75, 0.7], "untrained": [0.79, 0.7, 0.7]}
    found |= {f"{name}-sst2": {"scores": each} for name, each in scores.items()}
    found |= {f"{name}-minimal-pairs": {"accuracy": a, "pairs": 10_000} for name, a in
              (("ours", 0.6), ("trainer", 0.55), ("untrained", 0.595))}  # fmt: skip
    assert [passed for *_, passed in report.bars(["sst2"], found)] == [False, True, False, True, True, False, True]


def test_stretches_rise_to_the_end_of_the_run():
    assert pretraining.stretches("0.5:2,1:1") == ((0.5, 2), (1, 1))
    for wrong in ("0.5:2", "0.5:1,0.4:1,1:1", "0:1,1:1", "1:0", "1"):
        with pytest.raises(argparse.ArgumentTypeError, match=wrong):
            pretraining.stretches(wrong)


def test_a_step_costs_the_cpu_time_of_all_processes_that_trained_it_last():
    starts = [{"processes": 1, "from_step": 0}, {"processes": 2, "from_step": 1}, {"processes": 1, "from_step": 2}]
    rows = [{"global_step": step, "step_seconds": 1.0, "consumed_tokens": 10 * step} for step in (1, 2, 3)]
    rows.append({"global_step": 3, "eval_loss": 5.0})
    assert time_to_loss.points_of(rows, lambda step: pretraining.processes_at(step, starts)) == [(4.0, 30, 5.0)]


def test_the_newest_step_is_read_from_a_file_that_is_being_written(tmp_path):
    assert pretraining.last_step(tmp_path) == 0
    lines = [json.dumps({"global_step": step, "filler": "x" * 300}) for step in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"global_st']))
    assert pretraining.last_step(tmp_path) == 100
