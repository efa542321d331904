"""`benchmarks.startup` marks the ends of functions that the run has."""

import re
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from ds_roberta.training import run

MARKS = Path(__file__).parents[2] / "benchmarks/startup_marks.py"


def test_the_marked_functions_exist():
    marked = re.findall(r'^mark\((run(?:\.\w+)?), "(\w+)"', MARKS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(marked) == 4
    for owner, name in marked:
        assert hasattr(run if owner == "run" else getattr(run, owner.removeprefix("run.")), name)
