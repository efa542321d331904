import multiprocessing
import os
import signal
import sys
import tempfile

import pytest
import torch.distributed as dist

from ds_roberta import rendezvous
from ds_roberta.errors import UserError
from ds_roberta.rendezvous import check_world_size, first_host, set_ranks

STEP = {
    "SLURM_JOB_ID": "20017",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[03-05,7],x1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MAPPED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node03", "MASTER_PORT": "10018"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, ALONE),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # srun -n 1
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, ALONE),  # srun -n 1 --mpi=pmi2
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}, ALONE),  # srun -n 1 --mpi=pmix
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "8"}, {}),  # mpirun's proxy on one node
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ALONE),  # a job file without srun
        (STEP, MAPPED),
        ({**STEP, "MASTER_ADDR": "ib0-node03", "MASTER_PORT": "7"}, {n: MAPPED[n] for n in list(MAPPED)[:3]}),
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, MAPPED),  # srun --mpi=pmi2
        ({**STEP, "PMIX_RANK": "3"}, MAPPED),  # srun --mpi=pmix
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "16"}, {}),  # mpirun, whose own proxies srun started
        ({**STEP, "OMPI_COMM_WORLD_RANK": "3"}, {}),
        ({**STEP, **MAPPED, "RANK": "9"}, {}),  # torchrun, once on each node
        ({"PMI_RANK": "1"}, {}),
    ],
)
def test_ranks_come_from_the_launcher(environment, added):
    found = dict(environment)
    set_ranks(found)
    assert found == environment | added


def test_half_a_launcher_is_named():
    with pytest.raises(
        UserError, match="RANK is 1, but LOCAL_RANK, MASTER_PORT are not set: let the launcher set RANK,"
    ):
        set_ranks({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node03"})


def test_processes_of_mpi_need_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        UserError, match=r"started by MPI, but mpi4py cannot be imported .*pip install 'ds_roberta\[mpi\]'"
    ):
        rendezvous.port_of_mpi()


def test_tasks_of_srun_without_a_node_list_do_not_train_alone():
    with pytest.raises(UserError, match="srun started 4 tasks, but SLURM_STEP_NODELIST is not set"):
        set_ranks({**STEP, "SLURM_STEP_NODELIST": ""})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a1,a2", "a1"),
        ("node[03-05,7],x1", "node03"),
        ("r[0-1]n[4,6]", "r0n4"),
        ("10.0.0.[1-2]", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "world_size"),
    [
        ({"WORLD_SIZE": "2"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1),
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
    ],
)
def test_a_run_of_fewer_processes_than_were_started_is_refused(monkeypatch, environment, world_size):
    monkeypatch.setattr(rendezvous.os, "environ", environment)
    with pytest.raises(UserError, match="separate runs"):
        check_world_size(world_size)


def test_a_task_of_srun_may_start_several_processes(monkeypatch):
    monkeypatch.setattr(rendezvous.os, "environ", {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2"})
    check_world_size(8)


FORK = multiprocessing.get_context("fork")


def join(rank, barrier, ports):
    os.environ["RANK"] = str(rank)
    rendezvous.wait_for_ranks(60)
    ports.put(os.environ["MASTER_PORT"])
    barrier.wait(60)  # for rank 0 serves the other


def launch(ports):
    """What the `deepspeed` launcher does: it starts two ranks and waits for them."""
    barrier = FORK.Barrier(2)
    ranks = [FORK.Process(target=join, args=(rank, barrier, ports)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_two_runs_that_start_at_once_on_one_host_each_take_a_port_of_their_own(tmp_path, monkeypatch):
    """The `deepspeed` launcher gives both runs the same port."""
    told = {"LOCAL_RANK": "0", "LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    queues = [FORK.SimpleQueue() for _ in range(2)]
    runs = [FORK.Process(target=launch, args=(ports,)) for ports in queues]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0]
    (first, of_first), (second, of_second) = ([ports.get(), ports.get()] for ports in queues)
    assert first == of_first
    assert second == of_second
    assert first != second
    assert not list(tmp_path.iterdir())


def serve(ports):
    """What torchrun's agent does; the ranks must not be forked from it, for torch shares a process's servers."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ports.put(str(store.port))
    signal.pause()


def test_ranks_of_torchrun_meet_at_the_store_that_it_serves(monkeypatch, capfd):
    ports = FORK.SimpleQueue()
    agent = FORK.Process(target=serve, args=(ports,))
    agent.start()
    port = ports.get()
    told = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    told["LOCAL_SIZE"] = "2"  # as if torchrun itself had been started by the `deepspeed` launcher
    for name, value in {**told, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    try:
        launch(ports)
        assert [ports.get(), ports.get()] == [port, port]
        assert "failed to bind" not in capfd.readouterr().err  # as torch says, and goes on
    finally:
        agent.kill()
        agent.join()


@pytest.mark.parametrize(("launcher", "port"), [({}, "0"), ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "29500")])
def test_a_process_alone_needs_no_port_of_the_deepspeed_launcher(monkeypatch, launcher, port):
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    monkeypatch.setattr(rendezvous.os, "environ", told | launcher)
    rendezvous.wait_for_ranks(1)
    assert os.environ["MASTER_PORT"] == port
