import pytest

from ds_roberta.training.loss_plateau import find_plateau, remedy, with_evaluation

LINES = {"unigram_loss": 7.0, "neighbour_loss": 5.0}


@pytest.mark.parametrize(
    ("evaluations", "kind"),
    [
        # not below the word frequencies
        ([(0, 9.0), (290, 7.0)], None),  # too early
        ([(0, 9.0), (300, 7.0)], "unigram_loss"),
        ([(0, 9.0), (300, 6.86)], "unigram_loss"),
        ([(0, 9.0), (300, 6.84)], None),
        ([(300, 9.0), (900, 8.0)], "unigram_loss"),  # although it falls
        # above the counts of neighbours, and flat
        ([(0, 9.0), (200, 6.20), (290, 6.18)], None),  # too early
        ([(0, 9.0), (200, 6.20), (300, 6.16)], "neighbour_loss"),
        ([(0, 9.0), (200, 6.20), (300, 6.14)], None),
        ([(0, 9.0), (200, 6.00), (300, 6.30)], "neighbour_loss"),  # it rises
        ([(800, 5.02), (900, 5.01)], "neighbour_loss"),
        ([(800, 5.00), (900, 4.99)], None),  # a loss below the counts may decay to its end
        ([(0, 3.1), (300, 3.2), (1000, 3.2)], None),  # --init_from a trained model
        ([(0, 5.3), (500, 5.3)], "neighbour_loss"),  # --init_from a model of other text
        # the last tenth begins at the newest evaluation that is old enough
        ([(0, 9.0), (210, 6.17), (250, 6.16), (300, 6.15)], None),
        ([(0, 9.0), (150, 6.40), (190, 6.18), (210, 6.17), (300, 6.15)], "neighbour_loss"),
        ([(0, 9.0), (150, 6.18), (190, 6.40), (210, 6.17), (300, 6.15)], None),
        ([(450, 6.2), (500, 6.2)], None),  # what came before is not known
        ([(1000, 6.2)], None),
    ],
)
def test_a_plateau_is_a_loss_that_no_line_explains(evaluations, kind):
    found = find_plateau(evaluations, 1000, LINES)
    assert (found and found.kind) == kind
    if found is not None:
        step, loss = evaluations[-1]
        assert found.problem.startswith(f"step {step}: the held-out loss, {loss:.4f}, ")
        assert f"{LINES[kind]:.4f}" in found.problem


def test_only_what_later_evaluations_are_compared_with_is_kept():
    everything, kept = [], []
    for step in [*range(0, 300, 7), *range(300, 1001, 45)]:
        everything.append([step, 9.0 - step / 100])
        kept = with_evaluation(kept, *everything[-1], 1000)
        old = [each for each in everything if step - each[0] >= 100]
        assert kept == everything[max(len(old) - 1, 0) :]
    assert len(kept) == 4


def test_an_evaluation_that_is_repeated_counts_once():
    kept = with_evaluation([[0, 9.0], [10, 7.0], [20, 6.0]], 20, 6.5, 100)
    assert kept == [[10, 7.0], [20, 6.5]]


def test_a_run_whose_heads_know_their_neighbours_is_not_told_to_try_that():
    assert "--recipe fast" in remedy(False)
    assert "recipe" not in remedy(True)
