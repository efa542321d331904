"""A start that cannot become one run ends on all ranks with one line: real processes, as if on different hosts."""

import shutil
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from socket import gethostname

import forked
import pytest
from commands import CONFIG, PRETRAIN, REPOSITORY, environment, run

from benchmarks.environment import free_ports, python_path

SECONDS = 60  # for two processes to import, meet, disagree and end on busy cores; none may wait for the other's limit
PRETRAINING = (PRETRAIN, "--deepspeed_config", CONFIG, "--output_dir", "runs/no")


def place(rank: int, port: int) -> dict[str, str]:
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", **addresses}


def start(cwd: Path, rank: int, port: int, *arguments: str) -> tuple[BaseProcess, Path]:
    variables = {**environment(cwd), **place(rank, port)}
    return forked.start(*PRETRAINING, *arguments, cwd=cwd, environment=variables)


def error_lines(*ranks: tuple[BaseProcess, Path]) -> list[str]:
    lines = []
    try:
        for process, log in ranks:
            process.join(SECONDS)
            lines += errors_in(log.read_text(encoding="utf-8"))
            assert process.exitcode == 2, lines
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return lines


def errors_in(printed: str) -> list[str]:
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if line.startswith("error: ")]


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
    ("arguments", "words"),
    [
        (("--seed", "5"), "has --seed '5', rank 0 on HOST has '0'"),
        (("--data_dir", "others/data"), "has --data_dir 'of data "),
        (("--data_dir", "nowhere"), "on HOST: "),
    ],
)
def test_ranks_that_are_not_alike_all_end_and_name_the_host(workspace, others, arguments, words):
    (port,) = free_ports(1)
    first, second = error_lines(start(workspace, 0, port), start(workspace, 1, port, *arguments))
    assert first == second
    assert words.replace("HOST", gethostname()) in first
    assert not (workspace / "runs/no").exists()


def test_a_rank_with_another_program_is_named(workspace, others):
    (port,) = free_ports(1)
    waiting = start(workspace, 0, port)
    variables = {**place(1, port), "PYTHONPATH": python_path(others)}
    command = ("env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, *PRETRAINING)
    try:
        second = errors_in(run(*command, cwd=workspace, code=2))
    finally:
        first = error_lines(waiting)
    assert first == second
    assert "has ds_roberta '0.1.0 of source " in first[0]
    assert not (workspace / "runs/no").exists()


def test_a_host_that_does_not_come_ends_the_start_at_its_limit(workspace):
    limit = ("--rendezvous_timeout", "2")
    ports = free_ports(2)
    (first, second) = error_lines(start(workspace, 0, ports[0], *limit), start(workspace, 1, ports[1], *limit))
    assert f"only 1 of 2 ranks arrived at 127.0.0.1:{ports[0]} within 2 s" in first
    assert f"rank 1 on {gethostname()} did not reach rank 0 at 127.0.0.1:{ports[1]}" in second


def test_tasks_that_would_each_train_alone_are_refused(workspace):
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    variables = {**environment(workspace), **tasks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    (error,) = error_lines(forked.start(*PRETRAINING, cwd=workspace, environment=variables))
    assert "srun started 2 tasks, but this run has 1 processes: they would be separate runs" in error
