import pytest
import torch
from transformers import get_scheduler

from ds_roberta.config import LR_DECAY_TYPES, LR_SCHEDULER_TYPES, MaskingConfig, ScheduleConfig
from ds_roberta.training.schedules import learning_rate, mlm_probability


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


def shaped(max_steps=60, warmup_steps=10, **options):
    schedule = ScheduleConfig(max_steps, warmup_steps, **options)
    return [learning_rate(schedule, 2e-3, step) for step in range(1, max_steps + 1)]


def of_transformers(name, max_steps=60, warmup_steps=10, **options):
    """transformers' rates at our steps; in the warm-up, ours are its next step's, so that the first step learns."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = get_scheduler(name, optimizer, warmup_steps, max_steps, options or None)
    factor = scheduler.lr_lambdas[0]
    return [2e-3 * factor(step if step <= warmup_steps else step - 1) for step in range(1, max_steps + 1)]


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("linear", {}, {}),
        ("polynomial", {"lr_power": 2.0}, {"power": 2.0, "lr_end": 0.0}),
        ("polynomial", {"lr_power": 0.5, "min_lr_ratio": 0.1}, {"power": 0.5, "lr_end": 2e-4}),
        ("cosine", {}, {}),
        ("cosine_with_min_lr", {"min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
        *(
            (
                "warmup_stable_decay",
                {"decay_steps": 20, "decay_type": shape},
                {"num_decay_steps": 20, "decay_type": shape},
            )
            for shape in LR_DECAY_TYPES
        ),
    ],
)
def test_the_shapes_are_those_of_transformers(name, ours, theirs):
    found = shaped(lr_scheduler_type=name.removesuffix("_with_min_lr"), **ours)
    assert found == pytest.approx(of_transformers(name, **theirs))


def test_a_linear_schedule_has_the_bits_it_always_had():
    schedule = ScheduleConfig(500_000, 24_000)
    for step in (1, 7, 23_999, 24_000):
        assert learning_rate(schedule, 6e-4, step) == 6e-4 * step / 24_000
    for step in (24_001, 24_007, 333_333, 500_000):
        assert learning_rate(schedule, 6e-4, step) == 6e-4 * (500_000 - step + 1) / 476_000


@pytest.mark.parametrize("name", LR_SCHEDULER_TYPES)
@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1, 0), (1, 1), (7, 7), (100, 99), (100, 0)])
def test_every_shape_learns_to_the_last_step(name, max_steps, warmup_steps):
    rates = shaped(max_steps, warmup_steps, lr_scheduler_type=name)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(2e-3)


def test_warmup_stable_decay_keeps_the_peak_until_its_last_steps_and_ends_above_the_floor():
    rates = shaped(100, 10, lr_scheduler_type="warmup_stable_decay", min_lr_ratio=0.5)
    assert rates[9:91] == [2e-3] * 82  # the decay begins with the peak
    assert 1e-3 < rates[-1] < rates[91] < 2e-3
    assert shaped(20, 0, lr_scheduler_type="warmup_stable_decay", decay_steps=0) == [2e-3] * 20
