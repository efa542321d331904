"""Process groups for the distributed tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import python_path

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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
        "SEQUENCE_LENGTH": str(length),
        "PYTHONPATH": python_path(),
    }
    result = subprocess.run(
        [*command, str(worker), cases, str(corpus_folder), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
