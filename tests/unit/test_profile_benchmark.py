import contextlib

import pytest

pytest.importorskip("deepspeed")

from benchmarks.profile import (
    BACKWARD,
    FORWARD,
    REDUCTION,
    REST,
    SAVE,
    STAGES,
    WAIT,
    StageClock,
    Times,
    mean_step,
    operator_table,
    shares,
)


class Clock:
    """A second of the wall and two of the CPUs pass when told."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return Times(self.seconds, 2 * self.seconds)


def test_a_stages_own_time_is_without_the_stages_within_it():
    clock = Clock()
    stages = StageClock(clock)
    clock.seconds += 1
    with stages.stage(BACKWARD):
        clock.seconds += 2
        with stages.stage(REDUCTION):
            clock.seconds += 4
        with contextlib.suppress(ValueError), stages.stage(FORWARD):
            clock.seconds += 8
            raise ValueError("a failure")
        clock.seconds += 16
    clock.seconds += 32
    assert stages.take() == {
        REST: Times(33, 66),
        BACKWARD: Times(18, 36),
        REDUCTION: Times(4, 8),
        FORWARD: Times(8, 16),
    }
    clock.seconds += 1
    assert stages.take() == {REST: Times(1, 2)}


def test_a_step_bears_its_part_of_a_save_and_the_shares_sum_to_one():
    steps = [{WAIT: Times(1, 0), FORWARD: Times(6, 6)}, {FORWARD: Times(8, 8), SAVE: Times(50, 10)}]
    times = mean_step(steps, save_interval=20)
    assert tuple(times) == STAGES
    assert (times[WAIT], times[FORWARD], times[SAVE]) == (Times(0.5, 0), Times(7, 7), Times(2.5, 0.5))
    share = shares(times)
    assert share[SAVE] == pytest.approx(0.25)
    assert sum(share.values()) == pytest.approx(1)


def test_operators_beyond_the_first_are_summed():
    operators = {"mul": (4, 1.0), "mm": (2, 6.0), "add": (3, 1.0), "copy_": (1, 2.0)}
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in operator_table(operators, 2)]
    assert rows[2:] == [
        ["mm", "2", "6.0000 s", "60.0%"],
        ["copy_", "1", "2.0000 s", "20.0%"],
        ["others", "7", "2.0000 s", "20.0%"],
    ]
