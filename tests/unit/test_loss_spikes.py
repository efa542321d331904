import math

import numpy as np
import pytest

from ds_roberta.training.loss_spikes import WINDOW, spike_limit, with_loss


def noisy(mean, count=WINDOW, spread=0.02):
    return list(np.random.default_rng(0).normal(mean, spread, count))


def test_nothing_is_a_spike_until_the_window_is_full():
    assert spike_limit(noisy(3.0, WINDOW - 1), 10) == math.inf
    assert spike_limit(noisy(3.0), 10) < 3.5


def test_the_limit_is_so_many_standard_deviations_above_the_usual_loss():
    losses = [3.0 + 0.02 * (number - WINDOW // 2) for number in range(WINDOW + 1)][:WINDOW]  # deviations 0, 0.02, …
    for threshold in (5, 10):
        assert spike_limit(losses, threshold) == pytest.approx(2.99 + threshold * 1.4826 * 0.5, abs=1e-9)


def test_outliers_hardly_move_the_limit():
    losses = noisy(3.0)
    limit = spike_limit(losses, 10)
    assert spike_limit([*losses[10:], *[50.0] * 10], 10) == pytest.approx(limit, abs=0.08)


def test_a_fast_falling_loss_lifts_the_limit():
    falling = np.linspace(9.0, 6.0, WINDOW)
    assert spike_limit(falling, 10) > 9.0


def test_a_loss_that_stays_high_becomes_the_usual():
    losses = noisy(3.0)
    for step in range(WINDOW):
        losses = with_loss(losses, 4.0 + 0.02 * math.sin(step))
    assert 4.1 < spike_limit(losses, 10) < 5
    assert len(losses) == WINDOW


def test_a_loss_that_is_not_finite_is_left_out():
    assert with_loss([1.0, 2.0], math.inf) == with_loss([1.0, 2.0], math.nan) == [1.0, 2.0]
