"""Readers of files from elsewhere: hostile bytes are read or refused, valid ones are read back equal.

`python -m benchmarks.fuzz` gives the same readers more of the same inputs.
"""

from itertools import count

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.fuzz import readers, try_case

FEW, MORE = 4, 15
SLOW = ("checkpoints", "fine-tuned models", "metrics.jsonl", "model folders")


@pytest.mark.parametrize("name", readers())
def test_any_input_is_read_or_refused(name, tmp_path):
    folders = (tmp_path / str(number) for number in count())

    @settings(
        max_examples=FEW if name in SLOW else MORE,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a failure is shown as it was found: shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(readers()[name].cases)
    def check(case):
        try_case(readers()[name], case, next(folders))

    check()
