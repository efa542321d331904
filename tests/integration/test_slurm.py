"""The job files on a real SLURM: two nodes train one run, which continues after any interruption and ends the same."""

import json
import sys
from pathlib import Path

import pytest
import slurm_cluster
from commands import CONFIG, PRETRAIN, REPOSITORY, environment, launch
from slurm_cluster import NODES, Cluster, running_cluster

from benchmarks.environment import python_path

REASON = slurm_cluster.missing()
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STEPS = 24
SETTINGS = ("--deepspeed_config", "small_batch.json", "--model", "nano", "--max_seq_length", "32")
SETTINGS += ("--max_steps", str(STEPS), "--warmup_steps", "2", "--save_interval", "8")
SETTINGS += ("--eval_interval", str(STEPS), "--eval_sequences", "16")
# Without dropout, whose generator knows the rank, a run on another number of nodes can be compared as well.
SETTINGS += ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--rendezvous_timeout", "60")


@pytest.fixture(scope="module")
def cluster(workspace, tmp_path_factory):
    content = json.loads(CONFIG.read_text())
    content |= {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": False}}
    (workspace / "small_batch.json").write_text(json.dumps(content))
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):
        if parent.owner() == "root" and parent.stat().st_mode & 0o005 != 0o005 and "pytest" in parent.name:
            parent.chmod(0o755)  # munged refuses a socket in a folder that not all can enter
    with running_cluster(folder / "cluster") as running:
        running.environment.update(environment(workspace))
        running.environment.update(PATH=slurm_cluster.SEARCH_PATH, PYTHONPATH=python_path(), GLOO_SOCKET_IFNAME="lo")
        running.environment["SLURM_CONF"] = str(running.folder / "slurm.conf")
        yield running


def write_job(cluster: Cluster, cwd: Path, template: str, name: str, *words: str) -> str:
    script = (sys.executable, REPOSITORY / "launch/slurm.py", template, "--job_name", name, "--cpus_per_task", "1")
    return cluster.run(*script, "--time", "10", "--output", f"{name}.sbatch", *words, cwd=cwd)


def submit(cluster: Cluster, cwd: Path, name: str) -> str:
    return cluster.run("sbatch", "--parsable", f"{name}.sbatch", cwd=cwd).strip()


def start_pretraining(cluster: Cluster, cwd: Path, name: str, nodes: str) -> str:
    options = ("--nodes", nodes, "--gpus_per_node", "0", "--signal_seconds", "60")
    printed = write_job(cluster, cwd, "pretrain_multi_node", name, *options, "--", *SETTINGS, "--output_dir", name)
    assert "to start at" in printed  # the words of sbatch --test-only
    return submit(cluster, cwd, name)


def rows(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output)]


def finish(cluster: Cluster, cwd: Path, number: str, name: str) -> None:
    state = cluster.finish(number)
    assert state == "COMPLETED", "".join(path.read_text()[-3000:] for path in cwd.glob(f"logs/{name}-*/*.out"))


@pytest.fixture(scope="module")
def unbroken(cluster, workspace) -> Path:
    number = start_pretraining(cluster, workspace, "unbroken", "2")
    finish(cluster, workspace, number, "unbroken")
    return workspace / "unbroken"


def test_two_nodes_train_one_run(unbroken, workspace):
    assert [row["global_step"] for row in rows(unbroken)] == list(range(1, STEPS + 1))
    assert [row["consumed_samples"] for row in rows(unbroken)] == list(range(12, 12 * STEPS + 1, 12))
    assert json.loads((unbroken / "config.json").read_text())["batches"][0]["world_size"] == 2
    (logs,) = workspace.glob("logs/unbroken-*/")
    assert "expected time per step" in (logs / "rank0.out").read_text()
    assert (logs / "rank1.out").exists()
    assert (logs / "job.sbatch").read_text() == (workspace / "unbroken.sbatch").read_text()
    record = (logs / "environment.txt").read_text()
    assert all(word in record for word in ("torch==", "SLURM_JOB_NODELIST", "commit: ", "JobState=RUNNING"))


def test_deepspeeds_slurm_launcher_trains_one_run(cluster, workspace, unbroken):
    (workspace / "hostfile").write_text("".join(f"{node} slots=1\n" for node in NODES))
    launcher = ("--hostfile", "hostfile", "--no_ssh_check", "--master_addr", NODES[0], "--launcher", "slurm")
    steps = "--launcher_args=--nodes 2 --ntasks-per-node 1"
    command = ("deepspeed", *launcher, steps, PRETRAIN, *SETTINGS, "--output_dir", "launched")
    cluster.run(*command, cwd=workspace, seconds=120)
    assert losses(workspace / "launched") == losses(unbroken)


def test_a_job_that_is_told_to_stop_requeued_and_preempted_ends_as_if_unbroken(cluster, workspace, unbroken):
    number = start_pretraining(cluster, workspace, "broken", "2")

    def interruptions():
        yield lambda: cluster.run("scancel", "--signal=USR1", "--batch", number)
        yield lambda: cluster.run("scontrol", "requeue", number)
        yield lambda: cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--wrap", "true", cwd=workspace)

    for starts, interrupt in enumerate(interruptions(), 1):
        done = len(losses(workspace / "broken"))
        cluster.wait(lambda: len(losses(workspace / "broken")) > done + 1)  # noqa: B023
        interrupt()
        cluster.wait(lambda: cluster.job(number)["Restarts"] == str(starts))  # noqa: B023
    finish(cluster, workspace, number, "broken")
    assert losses(workspace / "broken") == losses(unbroken)


def test_a_job_that_loses_a_node_goes_on_with_the_other_and_the_same_batch(cluster, workspace, unbroken):
    cluster.wait(cluster.is_idle)
    number = start_pretraining(cluster, workspace, "elastic", "1-2")
    cluster.wait(lambda: len(losses(workspace / "elastic")) > 3)
    assert cluster.job(number)["NumNodes"] == "2"
    cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    try:
        finish(cluster, workspace, number, "elastic")
        assert cluster.job(number)["NodeList"] == NODES[0]
    finally:
        cluster.run("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
    for key in ("global_step", "consumed_samples", "consumed_tokens"):
        assert [row[key] for row in rows(workspace / "elastic")] == [row[key] for row in rows(unbroken)]
    assert losses(workspace / "elastic") == pytest.approx(losses(unbroken), rel=1e-4)
    batch = json.loads((workspace / "elastic/config.json").read_text())["batches"][0]
    assert (batch["train_batch_size"], batch["world_size"]) == (12, 1)


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, workspace):
    script = f"""#!/bin/bash
#SBATCH --requeue --open-mode=append --output=cancelled.out
source {REPOSITORY}/launch/slurm/common.sh
run_step . srun bash -c 'trap "touch saved; exit 85" USR1 TERM; echo started; while true; do sleep 0.1; done'
"""
    (workspace / "cancelled.sbatch").write_text(script)
    number = submit(cluster, workspace, "cancelled")
    printed = workspace / "cancelled.out"
    cluster.wait(lambda: printed.exists() and "started" in printed.read_text())
    cluster.run("scancel", number)
    assert cluster.finish(number) == "CANCELLED"
    cluster.wait((workspace / "saved").exists, 20)  # SLURM may have ended srun, which passes on what is printed
    assert cluster.job(number)["Restarts"] == "0"


def test_one_node_trains_past_its_time_limit(cluster, workspace):
    options = ("--gpus_per_node", "0", "--setup", "export NOTE=set", "--time", "1", "--signal_seconds", "10")
    settings = (*SETTINGS, "--max_steps", "100000", "--save_interval", "100000", "--eval_interval", "100000")
    write_job(cluster, workspace, "pretrain_single_node", "single", *options, "--", *settings, "--output_dir", "single")
    number = submit(cluster, workspace, "single")
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1")
    done = len(losses(workspace / "single"))
    cluster.wait(lambda: len(losses(workspace / "single")) > done)
    cluster.run("scancel", number)
    assert cluster.finish(number) == "CANCELLED"
    assert done > 0
    steps = [row["global_step"] for row in rows(workspace / "single")]
    assert steps == list(range(1, len(steps) + 1))
    (logs,) = workspace.glob("logs/single-*/")
    assert f", step {done} of 100000" in (logs / "rank0.out").read_text()
    assert "NOTE=set" in (logs / "environment.txt").read_text()


def test_an_array_prepares_the_bytes_of_the_local_run(cluster, workspace):
    names = ("ethan-frome.txt", "the-railway-children.txt")
    works = [f"books={REPOSITORY / 'examples/corpus' / name}" for name in names]
    command = ("--input", *works, "--tokenizer", "data/tokenizer", "--output", "array", "--validation_fraction", "0.05")
    write_job(cluster, workspace, "preprocess", "shards", "--tasks", "2", "--", *command)
    number = submit(cluster, workspace, "shards")
    for task in range(2):
        state = cluster.finish(f"{number}_{task}")
        assert state == "COMPLETED", "".join(path.read_text() for path in (workspace / "logs").glob("shards*.out"))

    def content(folder: Path) -> dict[Path, bytes]:
        files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if name.parts[0] != "index"}

    assert content(workspace / "array") == content(workspace / "data/corpus")


def test_a_fine_tuning_that_is_told_to_stop_ends_as_if_unbroken(cluster, workspace, unbroken):
    words = ("the door was open", "she said nothing", "a long way off", "he looked up")
    lines = [json.dumps({"text": f"{words[n % 4]} {words[n % 3]}", "label": n % 2}) for n in range(64)]
    for split in ("train", "dev"):
        (workspace / f"{split}.jsonl").write_text("\n".join(lines))
    settings = ("--model", unbroken / "hf", "--task", "classification", "--data", "train.jsonl", "dev.jsonl")
    settings += ("--num_train_epochs", "4", "--seeds", "0,1", "--output_dir")
    write_job(cluster, workspace, "finetune", "tune", "--gpus_per_node", "0", "--", *map(str, settings), "tuned")
    number = submit(cluster, workspace, "tune")
    cluster.wait(lambda: any(workspace.glob(".tuned.runs/*/*/trainer/checkpoint-*/trainer_state.json")))
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1")
    finish(cluster, workspace, number, "tune")
    (logs,) = workspace.glob("logs/tune-*/")
    assert "stopped on request" in (logs / "rank0.out").read_text()
    launch(REPOSITORY / "launch/finetune.py", *settings, "local", cwd=workspace)
    local, tuned = (json.loads((workspace / name / "results.json").read_text()) for name in ("local", "tuned"))
    assert tuned == local
