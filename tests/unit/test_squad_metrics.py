"""SQuAD's measures. The expected values were taken by hand and from the official scripts, versions 1.1 and 2.0."""

import pytest

from ds_roberta.finetuning.squad_metrics import f1, f1_or_none, normalize_answer, squad_v1_metrics, squad_v2_metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower, a tower.", "eiffeltower tower"),
        ("an Apple", "apple"),
        ("theatre", "theatre"),
        ("$1,000", "1000"),
        ("it’s", "it’s"),  # not ASCII, so no punctuation to the scripts
        ("the-cat", "thecat"),  # punctuation goes before articles
        ("The.", ""),
    ],
)
def test_answers_are_compared_in_a_normal_form(text, normal):
    assert normalize_answer(text) == normal


def test_f1_counts_words_as_often_as_both_have_them():
    assert f1("the cat cat dog", "cat dog dog") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert f1("cat", "dog") == 0


def test_the_versions_differ_for_texts_without_words():
    assert f1("the", "a") == 0
    assert f1_or_none("the", "a") == 1
    assert f1_or_none("", "cat") == f1_or_none("cat", "") == 0
    assert squad_v1_metrics([["The"]], ["an"]) == {"exact_match": 100, "f1": 0}


def test_the_best_matching_gold_answer_counts():
    metrics = squad_v1_metrics([["1889", "in 1889"], ["Gustave Eiffel"]], ["in 1889", "Eiffel"])
    assert metrics == {"exact_match": 50, "f1": pytest.approx(100 * (1 + 2 / 3) / 2)}


GOLDS = [["1889"], ["Gustave Eiffel"], [], [], ["iron"]]
ANSWERS = ["1889", "Eiffel", "Paris", "1889", "steel"]
NULL = [0.1, 0.3, 0.8, 0.2, 0.9]


def test_the_second_version_at_a_threshold():
    assert squad_v2_metrics(GOLDS, ANSWERS, NULL, 0.5) == {
        "exact": pytest.approx(40),  # 1889, and nothing instead of Paris
        "f1": pytest.approx(100 * (1 + 2 / 3 + 1) / 5),
        "total": 5,
        "HasAns_exact": pytest.approx(100 / 3),
        "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 3),
        "HasAns_total": 3,
        "NoAns_exact": 50,
        "NoAns_f1": 50,
        "NoAns_total": 2,
        "best_exact": pytest.approx(60),  # only 1889 is answered
        "best_exact_thresh": 0.1,
        "best_f1": pytest.approx(60),  # then the score falls to 2 at 0.2, and 2.67 is less than 3
        "best_f1_thresh": 0.1,
    }


def test_a_threshold_is_exceeded_only_by_what_is_above_it():
    assert squad_v2_metrics([["a b"]], ["b"], [0.5], 0.5)["exact"] == 100
    assert squad_v2_metrics([["cat"]], ["cat"], [0.51], 0.5)["exact"] == 0


def test_absent_kinds_have_no_values():
    metrics = squad_v2_metrics([["cat"]], ["cat"], [0.0], 0.5)
    assert "NoAns_exact" not in metrics
    assert metrics["HasAns_exact"] == 100
    assert metrics["best_exact_thresh"] == 0
    metrics = squad_v2_metrics([[]], [""], [1.0], 1.0)
    assert (metrics["exact"], metrics["best_exact"], metrics["NoAns_f1"]) == (100, 100, 100)
    assert "HasAns_exact" not in metrics
