import pytest

from ds_roberta.config import MaskingConfig, ScheduleConfig
from ds_roberta.training.schedule import learning_rate, mlm_probability


def rates(max_steps, warmup_steps, peak=1.0):
    schedule = ScheduleConfig(max_steps, warmup_steps)
    return [learning_rate(schedule, peak, step) for step in range(1, max_steps + 1)]


def test_it_rises_in_a_line_to_the_peak_and_falls_in_a_line():
    assert rates(10, 4, peak=2.0) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 10 / 6, 8 / 6, 1.0, 4 / 6, 2 / 6])


def test_without_warm_up_it_begins_at_the_peak():
    assert rates(4, 0) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_warm_up_may_be_the_whole_run():
    assert rates(4, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1, 0), (1, 1), (100, 6), (100, 99), (500_000, 24_000)])
def test_every_step_learns_and_none_above_the_peak(max_steps, warmup_steps):
    values = rates(max_steps, warmup_steps, peak=6e-4)
    assert min(values) > 0
    assert max(values) == pytest.approx(6e-4)
    assert values == sorted(values[:warmup_steps]) + sorted(values[warmup_steps:], reverse=True)


def test_the_share_of_masked_tokens_moves_in_a_line_from_the_first_step_to_the_last():
    masking = MaskingConfig(0.3, mlm_probability_end=0.15)
    shares = [mlm_probability(ScheduleConfig(4, 0), masking, step) for step in range(4)]
    assert shares == pytest.approx([0.3, 0.25, 0.2, 0.15])
    assert [mlm_probability(ScheduleConfig(4, 0), MaskingConfig(0.2), step) for step in range(4)] == [0.2] * 4
    assert mlm_probability(ScheduleConfig(1, 0), masking, 0) == 0.3
