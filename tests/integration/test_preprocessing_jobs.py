"""Jobs that are killed, run twice at once, or shared: the output is the same, and written by one job at a time."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prepare import DOCUMENTS, folder_hash, forget_filter, prepare_corpus

from ds_roberta import lease as leases
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.lease import Holder, JobStopped, Lease, LeaseHeld, held_lease, is_alive
from preprocessing import sharding
from preprocessing.jobs.job import Job
from preprocessing.jobs.workers import is_mpi, local_workers, refuse_strangers, slurm_task
from preprocessing.sharding import run_job
from preprocessing.units import ShardOptions

OPTIONS = ShardOptions(validation_fraction=0.2, unit_bytes=4000, dedup="exact")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """7 units, a fifth of whose documents are copies."""
    folder = tmp_path_factory.mktemp("text")
    for name, documents in (("a", DOCUMENTS[:100]), ("b", DOCUMENTS[80:]), ("c", DOCUMENTS[::10])):
        (folder / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return tokenizer_folder


@pytest.fixture(scope="module")
def expected(files, tokenizer, tmp_path_factory):
    """The hash of an undisturbed job's output."""
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
    assert Corpus.open(out).manifest.documents("train") < len(DOCUMENTS)
    return folder_hash(out)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def die_at(event, files, tokenizer, out, reached):
    """Run a job that is killed just before its `event`-th change of the file system."""

    def count(name, arguments):
        changes = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link") or (
            name == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        )
        if changes and threading.current_thread() is threading.main_thread():
            reached.value += 1
            if reached.value == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
    os._exit(0)


def test_a_job_killed_at_any_change_of_the_disk_resumes_to_the_same_bytes(files, tokenizer, tmp_path):
    files = files[::2]  # half of the second one are copies of documents in the first
    reached = FORK.Value("i", 0)
    child = FORK.Process(target=die_at, args=(0, files, tokenizer, tmp_path / "undisturbed", reached))
    child.start()
    child.join()
    events = reached.value
    assert child.exitcode == 0
    assert events > 100
    out, expected = tmp_path / "out", folder_hash(tmp_path / "undisturbed")
    for event in [*range(1, events, 61), *range(events - 5, events + 1)]:  # the end is where the folder moves
        reached.value = 0
        child = FORK.Process(target=die_at, args=(event, files, tokenizer, out, reached))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
        assert folder_hash(out) == expected, f"killed at change {event} of {events}"
        assert names(tmp_path) == ["out", "undisturbed"]


DRIVER = """
import json, os, signal, sys
from pathlib import Path
from preprocessing.commands import shard
from preprocessing.jobs.workers import Workers
from preprocessing.units import ShardOptions

files, tokenizer, out, workers, records = json.loads(sys.argv[1])
run = Workers.run

def run_until_killed(self, work, items):
    for result in run(self, work, items):
        if len(list(Path(out).parent.glob(".out.partial/*/units/*.json"))) >= records:
            os.killpg(0, signal.SIGKILL)
        yield result

Workers.run = run_until_killed
options = ShardOptions(validation_fraction=0.2, unit_bytes=4000, dedup="exact")
shard(files, Path(tokenizer), Path(out), options, workers)
"""


def start(files, tokenizer, out, workers, records):
    """Start a job in a process group of its own, which it kills when it has so many records."""
    command = [sys.executable, "-c", DRIVER, json.dumps([files, str(tokenizer), str(out), workers, records])]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_process_group_resumes_from_its_finished_units(files, tokenizer, expected, tmp_path):
    out = tmp_path / "out"
    finished = {}
    for count, workers in ((1, 3), (4, 2)):
        job = start(files, tokenizer, out, workers, count)
        _, printed = job.communicate(timeout=60)
        assert job.returncode == -signal.SIGKILL, printed
        records = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.partial/*/units/*.json")}
        assert finished.items() <= records.items(), "a finished unit was done again"
        finished = records
    assert len(finished) >= 4
    prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
    assert folder_hash(out) == expected


def test_workers_leave_when_their_parent_is_killed(files, tokenizer, tmp_path):
    job = start(files, tokenizer, tmp_path / "out", 2, records=100)
    try:
        wait_for(lambda: list(tmp_path.glob(".out.partial/*/units/*.json")))
        os.kill(job.pid, signal.SIGKILL)  # only the parent
        job.communicate(timeout=20)  # until the last process that holds the pipe is gone
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)
        raise


def test_other_input_options_filter_or_tokenizer_discard_the_finished_units(files, tokenizer, tmp_path, monkeypatch):
    done = []
    tokenizer = Path(shutil.copytree(tokenizer, tmp_path / "tokenizer"))
    module = tmp_path / "edited_filter.py"
    module.write_text("def keep(text, about): return True")
    monkeypatch.syspath_prepend(tmp_path)
    do = Job.do

    def failing(self, phase, index, work):
        if phase == "units":
            done.append(index)
            if len(done) == 3:
                raise OSError(28, "full", "disk")
        return do(self, phase, index, work)

    monkeypatch.setattr(Job, "do", failing)
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(files[0]).read_bytes())
    chosen = [str(copy), *files[1:]]

    def run(options=OPTIONS, expected=None):
        done.clear()
        with pytest.raises(UserError, match="cannot write"):
            prepare_corpus(chosen, tokenizer, tmp_path / "out", options, workers=1)
        assert done == expected

    run(expected=[0, 1, 2])
    run(expected=[2, 3, 4])
    run(replace(OPTIONS, validation_fraction=0.1), expected=[0, 1, 2])
    os.utime(copy, ns=(1, 1))
    run(replace(OPTIONS, validation_fraction=0.1), expected=[0, 1, 2])
    rules = replace(OPTIONS, read=replace(OPTIONS.read, sentences="rules"))
    run(rules, expected=[0, 1, 2])
    monkeypatch.setattr(sharding, "RULES_VERSION", 0)
    run(rules, expected=[0, 1, 2])
    run(rules, expected=[2, 3, 4])
    filtered = replace(OPTIONS, read=replace(OPTIONS.read, filter="edited_filter:keep"))
    run(filtered, expected=[0, 1, 2])
    module.write_text("def keep(text, about): return bool(text)")
    forget_filter("edited_filter")
    run(filtered, expected=[0, 1, 2])
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    (tokenizer / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    run(filtered, expected=[0, 1, 2])
    run(filtered, expected=[2, 3, 4])
    assert len(list((tmp_path / ".out.partial").iterdir())) == 2  # the leases, and one plan's work


def test_a_second_job_is_refused_while_the_first_lives(files, tokenizer, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "_PATIENCE_SECONDS", 0.0)
    out = tmp_path / "out"
    with held_lease(tmp_path / ".out.partial/leases", "another plan", None, out):
        message = rf"process {os.getpid()} on {socket.gethostname()}, since .*; wait for it, end it"
        with pytest.raises(LeaseHeld, match=message):
            prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
        assert len(list((tmp_path / ".out.partial/leases").iterdir())) == 1
    prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
    assert folder_hash(out) == expected
    assert names(tmp_path) == ["out"]


def holder(plan, task=None, **changes):
    return replace(Holder.this_process(plan, task), **changes)


def test_only_different_tasks_of_one_array_work_together():
    first = holder("plan", (0, 3))
    assert not first.excludes(holder("plan", (1, 3)))
    for other in (holder("plan", (0, 3)), holder("plan", (1, 4)), holder("plan"), holder("other", (1, 3))):
        assert first.excludes(other)
        assert other.excludes(first)


def test_a_lease_dies_with_its_process_and_not_with_its_number(tmp_path):
    path = tmp_path / "lease.json"
    leases._write(path, holder("plan"))
    assert is_alive(path)
    leases._write(path, holder("plan", process="started at another time"))
    assert not is_alive(path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    leases._write(path, holder("plan", pid=child.pid, process=leases._process(child.pid)))
    assert is_alive(path)
    child.kill()
    wait_for(lambda: not is_alive(path))  # though nobody has waited for it yet
    child.communicate()
    assert not is_alive(tmp_path / "missing.json")


def test_a_lease_of_another_machine_lives_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "DEAD_AFTER_SECONDS", 1.2)
    path = tmp_path / "lease.json"
    leases._write(path, holder("plan", machine="another"))
    assert not is_alive(path)
    toucher = threading.Timer(0.3, os.utime, [path])
    toucher.start()
    assert is_alive(path)
    toucher.join()


def test_a_held_lease_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    with held_lease(tmp_path, "plan", None, tmp_path / "out") as lease:
        before = lease.path.stat().st_mtime_ns
        wait_for(lambda: lease.path.stat().st_mtime_ns > before)
    assert names(tmp_path) == []


def test_a_job_that_looks_whether_another_lives_looks_alive_itself(tmp_path, monkeypatch):
    leases._write(tmp_path / "other.json", holder("plan", machine="another"))
    looked = []

    def dead(other):
        (own,) = set(tmp_path.glob("*.json")) - {other}
        before = own.stat().st_mtime_ns
        wait_for(lambda: own.stat().st_mtime_ns > before)
        return looked.append(other)

    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(leases, "is_alive", dead)
    with held_lease(tmp_path, "plan", None, tmp_path / "out"):
        assert looked == [tmp_path / "other.json"]


def test_a_job_that_lost_its_lease_moves_nothing_into_place(tmp_path):
    lease = Lease(tmp_path / "lease.json")
    job = Job(tmp_path / "plan", lease)
    lease.path.touch()

    def work(scratch):
        (scratch / "file").touch()
        lease.path.unlink()
        return {}

    with pytest.raises(JobStopped, match="lost its lease"):
        job.do("units", 0, work)
    assert job.record("units", 0) is None
    assert names(tmp_path / "plan") == ["scratch"]
    assert names(tmp_path / "plan/scratch") == []


@pytest.mark.parametrize("count", [2, 3, 20])
def test_tasks_share_a_job_and_the_last_moves_the_output_into_place(files, tokenizer, expected, tmp_path, count):
    order = list(range(count))
    random.Random(count).shuffle(order)
    results = []
    with local_workers(1) as workers:
        for task in order:
            assert not (tmp_path / "out").exists() or task >= 7
            results.append(run_job(files, tokenizer, tmp_path / "out", OPTIONS, workers, task=(task, count)))
        assert sum(result is not None for result in results) == 1
        assert folder_hash(tmp_path / "out") == expected
        for task in order:  # as of an array that is submitted again
            assert run_job(files, tokenizer, tmp_path / "out", OPTIONS, workers, task=(task, count)) is None
            assert names(tmp_path) == ["out"]
        (tmp_path / "out/manifest.json").write_text("{}")
        with pytest.raises(UserError, match="not empty and not a folder of prepared data"):
            run_job(files, tokenizer, tmp_path / "out", OPTIONS, workers, task=(0, count))


def test_a_job_without_tasks_finishes_what_tasks_left(files, tokenizer, expected, tmp_path):
    with local_workers(1) as workers:
        assert run_job(files, tokenizer, tmp_path / "out", OPTIONS, workers, task=(1, 3)) is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.partial/*/units/*.json")}
    assert len(before) == 2
    prepare_corpus(files, tokenizer, tmp_path / "out", OPTIONS, workers=1)
    assert folder_hash(tmp_path / "out") == expected


def test_a_task_with_other_options_leaves_what_the_array_has_finished(files, tokenizer, expected, tmp_path, capsys):
    out, other = tmp_path / "out", replace(OPTIONS, validation_fraction=0.1)
    with local_workers(1) as workers:
        assert run_job(files, tokenizer, out, OPTIONS, workers, task=(0, 2)) is None
        message = r"4 units .* were finished with other inputs, filter or options than task 2/2"
        with pytest.raises(UserError, match=message):
            run_job(files, tokenizer, out, other, workers, task=(1, 2))
        assert run_job(files, tokenizer, out, OPTIONS, workers, task=(1, 2)) is not None
        assert folder_hash(out) == expected
        assert run_job(files, tokenizer, out, other, workers, task=(0, 2)) is None
        capsys.readouterr()
        prepare_corpus(files, tokenizer, out, OPTIONS, workers=1)
    assert "begins again: 4 units were finished with other inputs, filter or options" in capsys.readouterr().out
    assert folder_hash(out) == expected


def test_tasks_at_the_same_time_publish_once(files, tokenizer, expected, tmp_path):
    def body(task):
        with local_workers(1) as workers:
            run_job(files, tokenizer, tmp_path / "out", OPTIONS, workers, task=(task, 3))
        os._exit(0)

    children = [FORK.Process(target=body, args=(task,)) for task in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert folder_hash(tmp_path / "out") == expected
    assert names(tmp_path) == ["out"]


def test_slurm_arrays_are_numbered_from_their_first_task():
    def task(**values):
        return slurm_task({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()})

    assert slurm_task({"SLURM_JOB_ID": "1"}) is None
    assert task(ID=7, MIN=5, MAX=8, COUNT=4, STEP=1) == (2, 4)
    assert task(ID=9, MIN=3, MAX=15, COUNT=5, STEP=3) == (2, 5)
    assert task(ID=3, MIN=3, MAX=3, COUNT=1, STEP=1) == (0, 1)
    with pytest.raises(UserError, match="--task I/3"):
        task(ID=5, MIN=1, MAX=7, COUNT=3, STEP=1)


def test_ranks_are_distinguished_from_single_processes():
    assert is_mpi({"OMPI_COMM_WORLD_SIZE": "3"})
    assert is_mpi({"PMI_SIZE": "2", "PMI_RANK": "0"})
    assert is_mpi({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "4"})
    for environment in ({}, {"PMI_SIZE": "1"}, {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}):
        assert not is_mpi(environment)
        refuse_strangers(environment)
    with pytest.raises(UserError, match=r"srun started 4 tasks that do not know of each other: .* --task I/4"):
        refuse_strangers({"SLURM_STEP_NUM_TASKS": "4"})
