"""A start that cannot become one run ends on all ranks with one line: real processes, as if on different hosts."""

import shutil
import subprocess
import sys
from pathlib import Path
from socket import gethostname, socket

import pytest
from commands import CONFIG, PRETRAIN, REPOSITORY, environment, run

from benchmarks.environment import python_path

SECONDS = 60  # for two processes to import, meet, disagree and end on busy cores; none may wait for the other's limit


def start(cwd: Path, rank: int, port: int, *arguments: str, program: Path = REPOSITORY) -> subprocess.Popen:
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, str(PRETRAIN), "--deepspeed_config", str(CONFIG), "--output_dir", "runs/no", *arguments],
        cwd=cwd,
        env={**environment(cwd), **place, "MASTER_PORT": str(port), "PYTHONPATH": python_path(program)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def error_lines(*processes: subprocess.Popen) -> list[str]:
    lines = []
    try:
        for process in processes:
            _, printed = process.communicate(timeout=SECONDS)
            assert process.returncode == 2, printed
            assert "Traceback" not in printed
            lines += [line for line in printed.splitlines() if line.startswith("error: ")]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return lines


def free_port() -> int:
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def others(workspace) -> Path:
    """What another host has: other data, and this program with an added line."""
    folder = workspace / "others"
    source = str(REPOSITORY / "examples/corpus/ethan-frome.txt")
    run(
        "preprocess",
        "shard",
        "--input",
        source,
        "--tokenizer",
        "data/tokenizer",
        "--output",
        folder / "data",
        cwd=workspace,
    )
    shutil.copytree(REPOSITORY / "ds_roberta", folder / "ds_roberta", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "ds_roberta/data/order.py", "a") as file:
        file.write("# changed by hand\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "program", "words"),
    [
        (("--seed", "5"), "", "has --seed '5', rank 0 on HOST has '0'"),
        (("--data_dir", "others/data"), "", "has --data_dir 'of data "),
        (("--data_dir", "nowhere"), "", "on HOST: "),
        ((), "others", "has ds_roberta '0.1.0 of source "),
    ],
)
def test_ranks_that_are_not_alike_all_end_and_name_the_host(workspace, others, arguments, program, words):
    port = free_port()
    program = workspace / program if program else REPOSITORY
    ranks = start(workspace, 0, port), start(workspace, 1, port, *arguments, program=program)
    first, second = error_lines(*ranks)
    assert first == second
    assert words.replace("HOST", gethostname()) in first
    assert not (workspace / "runs/no").exists()


def test_a_host_that_does_not_come_ends_the_start_at_its_limit(workspace):
    limit = ("--rendezvous_timeout", "2")
    ports = free_port(), free_port()
    (first, second) = error_lines(start(workspace, 0, ports[0], *limit), start(workspace, 1, ports[1], *limit))
    assert f"only 1 of 2 ranks arrived at 127.0.0.1:{ports[0]} within 2 s" in first
    assert f"rank 1 on {gethostname()} did not reach rank 0 at 127.0.0.1:{ports[1]}" in second


def test_tasks_that_would_each_train_alone_are_refused(workspace):
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    result = subprocess.run(
        [sys.executable, PRETRAIN, "--deepspeed_config", CONFIG],
        cwd=workspace,
        env={**environment(workspace), **tasks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 2
    assert "srun started 2 tasks, but this run has 1 processes: they would be separate runs" in result.stderr
