"""Process groups for the distributed tests."""

import json
import multiprocessing.connection
import os
import time
from pathlib import Path

from forked import start

SEQUENCE_LENGTH = 32  # of which `corpus_folder` has the index
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 580


def run_group(
    processes: int,
    cases: str,
    corpus_folder: Path,
    output: Path,
    accelerator: str = "cpu",
    worker: Path = WORKER,
    length: int = SEQUENCE_LENGTH,
) -> dict:
    """Run cases of worker.py, or another script, in one process group; return their findings by file name.

    The first process that fails ends the others.
    """
    size = {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")}
    common = {
        **os.environ,
        **size,  # and as with the `deepspeed` launcher, whose LOCAL_SIZE makes rank 0 find a free port for all
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
        "SEQUENCE_LENGTH": str(length),
    }
    started = {}
    try:
        for rank in range(processes):
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process, log = start(worker, cases, corpus_folder, output, cwd=output, environment=variables)
            started[process.sentinel] = process, log
        deadline, running = time.monotonic() + SECONDS, set(started)
        while running:
            ended = multiprocessing.connection.wait(running, deadline - time.monotonic())
            assert ended, f"the group did not end in {SECONDS} s"
            for sentinel in ended:
                process, log = started[sentinel]
                process.join()
                assert process.exitcode == 0, log.read_text(encoding="utf-8")[-6000:]
                running.remove(sentinel)
    finally:
        for process, _ in started.values():
            process.kill()
            process.join()
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
