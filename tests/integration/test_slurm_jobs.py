"""What a job file does about signals and exit codes, with stand-ins for SLURM's commands; and how it is written."""

import contextlib
import io
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMON = REPOSITORY / "launch/slurm/common.sh"
RUN = subprocess.run


@pytest.fixture
def start(tmp_path):
    """A function that starts a job file of one step, on a SLURM that says the job is in `state`."""
    for name, body in (("squeue", 'echo "$STATE"'), ("scontrol", 'echo "scontrol $*"'), ("srun", 'exec "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    started = []

    def start(step, state="RUNNING", before=":"):
        job = f"source {shlex.quote(str(COMMON))}; {before}; run_step . srun bash -c {shlex.quote(step)}"
        process = subprocess.Popen(
            ["bash", "-c", job],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "STATE": state},
            cwd=tmp_path,
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
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def wait_for(file):
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process):
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


@pytest.mark.parametrize("code", [0, 1, 2, 137, 138])
def test_a_steps_exit_code_ends_the_job(start, code):
    assert end(start(f"exit {code}")) == (code, "")


def test_a_stopped_run_is_queued_again(start):
    code, output = end(start("exit 85"))
    assert code == 85
    assert output.splitlines()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_job_that_slurm_ended_itself_is_not_queued_again(start, state):
    code, output = end(start("exit 85", state))
    assert code == 85
    assert "scontrol" not in output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("step", ["trap 'sleep 0.2; exit 85' USR1; {}", "{}"])  # ranks that handle it, or do not yet
def test_a_signal_reaches_the_step_as_usr1_and_the_job_waits_for_its_end(start, tmp_path, number, step):
    process = start(step.format("touch began; while true; do sleep 0.05; done"))
    wait_for(tmp_path / "began")
    process.send_signal(number)
    code, output = end(process)
    assert (code, output.splitlines()[-1]) == (85, "scontrol requeue 7")


def test_a_job_that_never_gets_to_train_is_queued_again_twice(start, tmp_path):
    for _ in range(3):
        (tmp_path / "began").unlink(missing_ok=True)
        process = start("touch began; while true; do sleep 0.05; done")
        wait_for(tmp_path / "began")
        process.send_signal(signal.SIGUSR1)
        code, output = end(process)
    assert code == 138
    assert output.splitlines()[-1].startswith("three starts in a row ended before the training began")
    assert end(start("exit 85"))[0] == 85
    assert not (tmp_path / "ended_before_training").exists()


def test_a_signal_that_comes_before_the_steps_process_id_is_known_is_not_lost(start):
    before = """set -T; trap '[[ $BASH_COMMAND != step=?! ]] || kill -USR1 $$' DEBUG"""
    code, output = end(start("while true; do sleep 0.05; done", before=before))
    assert (code, output.splitlines()[-1]) == (85, "scontrol requeue 7")


def run_here(command, **options):
    """`subprocess.run`, but the parsers that import for seconds do their work in this process."""
    if command[:2] != [sys.executable, "-c"] or "launch." not in command[2]:
        return RUN(command, **options)
    code, error = 0, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", command[1:2] + command[3:])
        patch.chdir(options.get("cwd", "."))
        try:
            exec(command[2], {})
        except SystemExit as leaving:
            code = leaving.code
    return subprocess.CompletedProcess(command, code, "", error.getvalue())


def write(monkeypatch, tmp_path, *words):
    """Run launch/slurm.py in a folder: the exit code, and the written file if there is one."""
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slurm.py", words[0], "--output", "job.sbatch", *words[1:]])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(REPOSITORY / "launch/slurm.py"), run_name="__main__")
    path = tmp_path / "job.sbatch"
    return leaving.value.code, path.read_text() if path.exists() else None


MULTI_NODE = ("pretrain_multi_node", "--nodes", "2-4", "--gpus_per_node", "8", "--time", "1-00:00:00")
PRETRAIN = ("--deepspeed_config", "zero1.json")
SHARD = ("--input", "x", "--tokenizer", "t", "--output", "o")


def test_a_written_file_has_the_values_and_the_command_as_given(monkeypatch, tmp_path):
    code, text = write(monkeypatch, tmp_path, *MULTI_NODE, "--", *PRETRAIN, "--data_dir", "my $data")
    assert code == 0
    lines = text.splitlines()
    for line in ("--nodes=2-4", "--mincpus=64", "--gpus-per-node=8", "--time=1-00:00:00", "--requeue"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --signal=B:USR1@120" in lines
    assert not any("--partition" in line or "--mem" in line for line in lines)  # not given: the site's
    assert 'run_step "$logs" srun --ntasks-per-node=8 ' in text
    assert lines[-1].endswith("pretrain.py\" --deepspeed_config zero1.json --data_dir 'my $data'")
    assert f"--chdir={tmp_path}" in text
    assert (tmp_path / "logs").is_dir()


def test_paths_are_those_of_the_folder_in_which_the_job_runs(monkeypatch, tmp_path):
    (tmp_path / "arch.json").write_text(json.dumps({"model_type": "roberta"}))
    command = ("--recipe", "fast", "--model", "arch.json", "--output_dir", "runs/own", "--max_steps", "9")
    code, text = write(monkeypatch, tmp_path, *MULTI_NODE, "--", *command)
    assert code == 0
    assert "--model arch.json" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrain_multinode", "--time", "1", "--", "x"), "did you mean 'pretrain_multi_node'?"),
        (("pretrain_multi_node",), "needs --time, --nodes, --gpus_per_node (0 for CPUs), the command's options"),
        (("preprocess", "--time", "60", "--", "x"), "preprocess needs --tasks"),
        (("preprocess", "--tasks", "2", "--nodes", "2", "--time", "1", "--", "x"), "does not use it"),
        ((*MULTI_NODE, "--nodes", "4-2", "--", "x"), "--nodes '4-2'"),
        ((*MULTI_NODE, "--time", "soon", "--", "x"), "--time 'soon'"),
        (
            (*MULTI_NODE, "--processes_per_node", "9", "--", "x"),
            "--processes_per_node 9 is more than --gpus_per_node 8",
        ),
        ((*MULTI_NODE, "--cpus_per_task", "0", "--", "x"), "--cpus_per_task 0 is less than 1"),
        ((*MULTI_NODE, "--partition", "a b", "--", "x"), "partition 'a b'"),
        ((*MULTI_NODE, "--", *PRETRAIN, "--max_step", "9"), "after --: unrecognized arguments: --max_step 9"),
        (("preprocess", "--tasks", "2", "--time", "1", "--", "--input", "x"), "after --: the following arguments"),
        (("finetune", "--gpus_per_node", "1", "--time", "60", "--", "--task", "x"), "after --: argument --task"),
        ((*MULTI_NODE, "--", "--help"), "after --: --help would only show the help"),
        (("preprocess", "--tasks", "2", "--signal_seconds", "9", "--", *SHARD), "preprocess does not use it"),
        ((*MULTI_NODE, "--time", "2", "--", *PRETRAIN), "--time 2 is 120 seconds, and the job would be asked to stop"),
        ((*MULTI_NODE, "--time", "1:30", "--", *PRETRAIN), "--time 1:30 is 90 seconds"),
        ((*MULTI_NODE, "--time", "0-0:1", "--", *PRETRAIN), "--time 0-0:1 is 60 seconds"),
        ((*MULTI_NODE, "--time", "00:02:00", "--", *PRETRAIN), "--time 00:02:00 is 120 seconds"),
        (("preprocess", "--tasks", "2", "--time", "1", "--setup", "if", "--", *SHARD), "bash -n job.sbatch refuses"),
    ],
)
def test_a_wrong_or_missing_value_is_one_line(monkeypatch, tmp_path, capsys, words, message):
    code, _ = write(monkeypatch, tmp_path, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert message in line


@pytest.mark.parametrize("template", sorted(path.stem for path in (REPOSITORY / "launch/slurm").glob("*.sbatch")))
def test_the_environment_of_the_program_comes_before_what_a_site_sets_up(template):
    text = (REPOSITORY / f"launch/slurm/{template}.sbatch").read_text()
    assert text.index("\n@setup@\n") < text.index("\nexport PATH=@path@:$PATH\n")


def test_templates_and_a_written_file_are_clean(monkeypatch, tmp_path, shellcheck):
    write(monkeypatch, tmp_path, *MULTI_NODE, "--setup", "module load cuda", "--", *PRETRAIN, "--data_dir", "my data")
    files = [*(REPOSITORY / "launch/slurm").iterdir(), REPOSITORY / ".ci/run", tmp_path / "job.sbatch"]
    result = subprocess.run([shellcheck, "-x", *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == ""
