"""The environment of the processes that benchmarks and tests start."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def python_path(program: Path = REPOSITORY) -> str:
    """A PYTHONPATH with `program` first, which keeps what is on it already: packages may be installed only there."""
    return os.pathsep.join(filter(None, (str(program), os.environ.get("PYTHONPATH"))))
