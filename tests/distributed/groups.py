"""Process groups for the distributed tests."""

import json
import os
from pathlib import Path

from forked import run_ranks

SEQUENCE_LENGTH = 32  # of which `corpus_folder` has the index
WORKER = Path(__file__).with_name("worker.py")


def run_group(
    processes: int,
    cases: str,
    corpus_folder: Path,
    output: Path,
    accelerator: str = "cpu",
    worker: Path = WORKER,
    length: int = SEQUENCE_LENGTH,
) -> dict:
    """Run cases of worker.py, or another script, in one process group; return their findings by file name."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
        "SEQUENCE_LENGTH": str(length),
    }
    run_ranks(processes, worker, cases, corpus_folder, output, cwd=output, environment=environment, seconds=580)
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
