"""DeepSpeed's launchers and mpirun over two hosts: each starts one run of two processes, with the same results."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import CONFIG, PRETRAIN
from hosts import PATH, hosts, why_not

from benchmarks.environment import python_path

BIN = Path(sys.executable).parent
SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    "PYTHONPATH": python_path(),
}
LAUNCHERS = {
    "pdsh": ["deepspeed", "--hostfile", "hostfile", "--master_addr", "node1"],
    "openmpi": [
        *("deepspeed", "--hostfile", "hostfile", "--master_addr", "node1", "--launcher", "openmpi"),
        "--launcher_args=--allow-run-as-root",
    ],
    "mpirun": [
        *("mpirun", "--allow-run-as-root", "--host", "node1:1,node2:1"),
        *(word for name in ("PATH", "XDG_CACHE_HOME", *SETTINGS) for word in ("-x", name)),
        sys.executable,
    ],
}
NEEDS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mpirun": "ompi_info"}


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with hosts(tmp_path_factory.mktemp("hosts"), 2) as made:
        yield made


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_launcher_makes_one_training_of_two_hosts(two_hosts, workspace, launcher):
    path = f"{BIN}:{PATH}"
    if shutil.which(NEEDS[launcher], path=path) is None:
        pytest.skip(f"there is no {NEEDS[launcher]}")
    settings = {**SETTINGS, "XDG_CACHE_HOME": str(workspace / "cache")}
    (workspace / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    settings_text = "".join(f"{name}={value}\n" for name, value in {**settings, "PATH": path}.items())
    (workspace / ".deepspeed_env").write_text(settings_text)
    output = workspace / f"runs/{launcher}"
    options = ["--deepspeed_config", CONFIG, "--data_dir", "data/corpus", "--output_dir", output, "--model", "nano"]
    options += ["--max_seq_length", "32", "--train_batch_size", "8", "--max_steps", "2", "--eval_sequences", "8"]
    command = [*LAUNCHERS[launcher], PRETRAIN, *options]
    wrapped = ["env", f"PATH={two_hosts.ssh_folder}:{path}", *map(str, command)]
    result = two_hosts.run("node1", *wrapped, cwd=workspace, **settings)
    assert result.returncode == 0, result.stdout[-6000:]
    assert "x 2 (processes)" in result.stdout
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["global_step"] for row in rows if "loss" in row] == [1, 2]
    assert sorted(path.name for path in (output / "checkpoints/global_step2").glob("state-*")) == [
        f"state-0000{rank}-of-00002.safetensors" for rank in range(2)
    ]
