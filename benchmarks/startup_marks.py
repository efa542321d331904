"""Run `launch/pretrain.py` for `benchmarks.startup`, and record from outside when each of its phases ends.

Takes the same arguments and writes {phase: seconds since 1970} to the file named by `STARTUP_MARKS`.
"""

import functools
import json
import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in launch/pretrain.py

began = time.time()
from ds_roberta.training import run  # noqa: E402 - the import is timed

marks = {"python": began, "imports": time.time()}


def mark(owner: Any, name: str, before: str | None, after: str) -> None:
    """Note when a function is first called and when it first returns."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def marked(*arguments: Any, **keywords: Any) -> Any:
        if before:
            marks.setdefault(before, time.time())
        result = function(*arguments, **keywords)
        if after not in marks:
            marks[after] = time.time()
            marks[f"{after} CPU"] = time.process_time()
        return result

    setattr(owner, name, marked)


mark(run.Engine, "__init__", "data", "engine")
mark(run, "_micro_batch_sizes", None, "micro-batch")
mark(run.Trainer, "evaluate", None, "evaluation")
mark(run.Trainer, "train_step", None, "first step")
train = run.Trainer.train


@functools.wraps(train)
def train_and_write_marks(trainer: run.Trainer) -> bool:
    complete = train(trainer)
    Path(os.environ["STARTUP_MARKS"]).write_text(json.dumps(marks), encoding="utf-8")
    return complete


run.Trainer.train = train_and_write_marks  # type: ignore[assignment]
runpy.run_path(str(Path(__file__).parents[1] / "launch/pretrain.py"), run_name="__main__")
