"""Set-up before the process group exists: find this process's rank in the launcher's environment, and wait for all.

Under a launcher that sets no ranks, each process would be a separate run and overwrite the others' files. Therefore
srun's variables are read too, and the number of processes that joined is compared with the launcher's.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import MutableMapping
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from ds_roberta.errors import UserError
from ds_roberta.files import write_text

RENDEZVOUS_TIMEOUT = 300.0
"""Seconds that processes wait for each other at the start; importing from a busy file system takes long."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""By which torch's and DeepSpeed's processes find each other."""
_SECONDS_BETWEEN_LOOKS = 0.1
_FIRST_PORT, _PORTS = 10_000, 20_000  # below the range that Linux uses for outgoing connections


def set_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if the launcher did not.

    In a SLURM step of several tasks, a task takes srun's numbers, with the step's first host as master and a port made
    from the job's and the step's number; MASTER_ADDR and MASTER_PORT stay if they are set. MPI's processes are left to
    DeepSpeed, which asks MPI. Anything else is a run of one process.

    Raises:
        UserError: the launcher set RANK but not all of the others, or srun's variables report several tasks, but not
            which host is the first.
    """
    if "RANK" in environment:
        # DeepSpeed would ask MPI, which knows of one process only, and overwrite RANK and WORLD_SIZE.
        if missing := [name for name in VARIABLES if name not in environment]:
            raise UserError(
                f"RANK is {environment['RANK']}, but {', '.join(missing)} {'are' if missing[1:] else 'is'} not set: "
                f"let the launcher set {', '.join(VARIABLES)} in each process, or none of them"
            )
        return
    if "OMPI_COMM_WORLD_RANK" in environment:
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    is_single = "SLURM_STEP_NUM_TASKS" in environment and tasks == environment.get("PMI_SIZE", tasks) == "1"
    if int(tasks) > 1 and environment.get("PMI_SIZE", tasks) == tasks:  # srun itself may set PMI's variables, too
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        if not nodes:
            raise UserError(
                f"srun started {tasks} tasks, but SLURM_STEP_NODELIST is not set: set RANK, LOCAL_RANK, WORLD_SIZE, "
                "MASTER_ADDR and MASTER_PORT in each task, or each would train on its own"
            )
        port = _FIRST_PORT + (int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % _PORTS
        environment.setdefault("MASTER_ADDR", first_host(nodes))
        environment.setdefault("MASTER_PORT", str(port))
        environment.update(RANK=environment["SLURM_PROCID"], LOCAL_RANK=environment["SLURM_LOCALID"], WORLD_SIZE=tasks)
    elif is_single or ("PMI_RANK" not in environment and "PMIX_RANK" not in environment):
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "node03" of "node[03-05,7],x1"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def wait_for_ranks(limit: float) -> None:
    """Wait until all ranks have arrived at MASTER_ADDR:MASTER_PORT; call before `torch.distributed` is initialised.

    MPI has already done so, and a single process has nobody to wait for. If the `deepspeed` launcher started all
    ranks on this host, they use a free port, whatever MASTER_PORT says: its default, 29500, would allow only one run
    per host.

    Args:
        limit: seconds.

    Raises:
        UserError: they have not all arrived within `limit` seconds.
    """
    if not all(name in os.environ for name in VARIABLES):
        return
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which holds the store itself
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        if not has_agent:
            os.environ["MASTER_PORT"] = "0"
        return
    host, deadline, arrived = socket.gethostname(), time.monotonic() + limit, 0
    file = None if has_agent else _port_file()
    if file is not None:
        os.environ["MASTER_PORT"] = "0" if rank == 0 else str(_read_port(file, deadline))
    port = int(os.environ["MASTER_PORT"])
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            is_master=rank == 0 and not has_agent,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,
            multi_tenant=True,
        )
        if file is not None and rank == 0:
            os.environ["MASTER_PORT"] = str(store.port)
            write_text(file, str(store.port))
        # torch's own store for the process group shares rank 0's server as long as this one exists.
        _stores.append(store)
        key = f"ds_roberta/arrived/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        arrived = store.add(key, 1)
        while arrived < world_size and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            arrived = store.add(key, 0)
    except dist.DistError as error:
        if arrived == 0:
            what = "cannot serve" if rank == 0 else "did not reach rank 0"
            raise UserError(
                f"rank {rank} on {host} {what} at {place} (MASTER_ADDR:MASTER_PORT) within {limit:g} s: check "
                "that the host is up, its name is known here, and the port is free (deepspeed "
                "--master_port sets another) and not blocked by a firewall"
            ) from error
    finally:
        if file is not None and rank == 0:
            file.unlink(missing_ok=True)
    if arrived < world_size:
        raise UserError(
            f"only {arrived} of {world_size} ranks arrived at {place} within {limit:g} s (reported by rank {rank} on "
            f"{host}): check the logs of the others and whether their hosts respond, or allow more time with "
            "--rendezvous_timeout"
        )


def port_of_mpi() -> int:
    """The port at which MPI's processes meet: MASTER_PORT, or a free one of rank 0's host; a collective call of theirs.

    DeepSpeed would take 29500, so only one such run could start on a host.

    Raises:
        UserError: mpi4py is missing.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"started by MPI, but mpi4py cannot be imported ({error}): pip install 'ds_roberta[mpi]', or start the "
            "command by deepspeed, torchrun or srun"
        ) from error
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = MPI.COMM_WORLD.bcast(int(os.environ.get("MASTER_PORT", free.getsockname()[1])))
    return port


def _port_file() -> Path | None:
    """Where rank 0 writes the port that it chose; None unless the `deepspeed` launcher started all ranks on this host.

    The ranks are that launcher's children: its process id and start time name the file.
    """
    if os.environ.get("LOCAL_SIZE") != os.environ["WORLD_SIZE"]:
        return None
    launcher = psutil.Process(os.getppid())
    return Path(tempfile.gettempdir()) / f"ds_roberta-{launcher.pid}-{launcher.create_time():.2f}.port"


def _read_port(file: Path, deadline: float) -> int:
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 wrote no port into {str(file)!r} in time: check its log, or allow more time with "
                "--rendezvous_timeout"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return int(file.read_text(encoding="utf-8"))


_stores: list[dist.TCPStore] = []


def check_world_size(world_size: int) -> None:
    """Compare the number of processes that joined with the number that the launcher started.

    Raises:
        UserError: fewer joined, so there would be several separate runs.
    """
    started = {name: os.environ.get(name) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")}
    causes = [f"{name} is {value}" for name, value in started.items() if value is not None and int(value) != world_size]
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world_size < tasks:  # a task may itself launch several processes
        causes.append(f"srun started {tasks} tasks")
    if causes:
        raise UserError(
            f"{causes[0]}, but this run has {world_size} processes: they would be separate runs; unset RANK and "
            "WORLD_SIZE in the job's environment, and use one launcher"
        )
