"""A SLURM cluster of two nodes on this machine, with nothing outside a folder: for tests, started as root."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from benchmarks.environment import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("127.0.0.1", "127.0.0.2")  # names that every machine resolves
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# A requeued job waits until credentials of its first start have expired: 120 s by default.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=0
KillWait=20
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SchedulerTimeSlice=5
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why no cluster can be started on this machine, if so."""
    if os.geteuid() != 0:
        return "SLURM's daemons are started by root alone"
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=SEARCH_PATH) is None]
    return f"SLURM is not installed: {', '.join(absent)} missing" if absent else None


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, cwd: Path | None = None, check: bool = True, seconds: float = 60) -> str:
        result = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{self.logs()}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM knows about a job: JobState, Restarts, ExitCode, NumNodes, …"""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.run("squeue", "--all", check=False) + self.logs()
            time.sleep(0.2)

    def is_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def finish(self, number: str) -> str:
        """Wait for a job's end, and return its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in ended)
        return self.job(number)["JobState"]

    def logs(self) -> str:
        return "".join(f"\n== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons and wait until both nodes are idle; at the end, stop the jobs and then the daemons."""
    folder.mkdir()
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munged refuses a socket in a folder that not all can enter
    key = folder / "munge.key"
    key.write_bytes(os.urandom(256))
    key.chmod(0o600)
    text = CONFIGURATION.format(folder=folder, host=gethostname().split(".")[0], ports=free_ports(3), nodes=NODES)
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, environment)
    munge = [f"--{name.replace('_', '-')}={folder / file}" for name, file in MUNGE_FILES.items()]
    with ExitStack() as stack:
        stack.enter_context(daemon(cluster, "munged", "--foreground", "--force", *munge))
        cluster.wait((folder / "munge.socket").exists, 10)
        stack.enter_context(daemon(cluster, "slurmctld", "-D", "-c"))
        for node in NODES:
            stack.enter_context(daemon(cluster, "slurmd", "-D", "-N", node))
        stack.callback(end_jobs, cluster)
        cluster.wait(
            lambda: cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() == ["idle"] * 2, 30
        )
        yield cluster


MUNGE_FILES = {
    "key_file": "munge.key",
    "socket": "munge.socket",
    "pid_file": "munge.pid",
    "log_file": "munged.log",
    "seed_file": "munge.seed",
}


@contextmanager
def daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    with (
        open(cluster.folder / f"{command[0]}-{command[-1].strip('-')}.out".replace("/", "_"), "w") as output,
        subprocess.Popen(
            command, env=cluster.environment, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def end_jobs(cluster: Cluster) -> None:
    """Kill what still runs, so that no process of a job outlives the cluster."""
    cluster.run("scancel", "--user=root", check=False)
    cluster.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-t", "running,completing", check=False).strip(), 40)
