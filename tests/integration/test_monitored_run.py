"""What monitors show of a run that was killed, by their own readers."""

import json
import signal
import types

import pytest
from commands import CONFIG, PRETRAIN, pretrain, pretrain_until, run
from monitor_readers import assert_same_series, csv_series, expected_series, tensorboard_series, wandb_series

from ds_roberta.training.metrics import MACHINE_COLUMNS
from ds_roberta.training.wandb_monitor import last_recorded_step, log_records

SETTINGS = ("--model", "nano", "--max_seq_length", "32", "--train_batch_size", "8", "--max_steps", "7")
SETTINGS += ("--learning_rate", "1e-3", "--warmup_steps", "2", "--save_interval", "2", "--eval_interval", "3")
SETTINGS += ("--eval_sequences", "16")
TIMES = {f"Train/{name}" for name in MACHINE_COLUMNS}


@pytest.fixture(scope="module")
def config(workspace):
    """A DeepSpeed JSON with all monitors, below the folder in which the commands run."""
    place = {"enabled": True, "output_path": "monitors"}
    content = json.loads(CONFIG.read_text())
    content |= {"tensorboard": {**place, "job_name": "tb"}, "csv_monitor": {**place, "job_name": "csv"}}
    content |= {"wandb": {"enabled": True, "project": "p", "group": "g"}}
    path = workspace / "monitored.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, workspace):
    for name, value in {"MODE": "offline", "CACHE_DIR": workspace / "cache"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))


def test_each_step_is_shown_once_after_a_kill(workspace, config):
    output = workspace / "runs/monitored"
    arguments = (*SETTINGS, "--output_dir", output, "--deepspeed_config", config)

    def fifth_step_has_its_row() -> bool:
        metrics = output / "metrics.jsonl"
        return metrics.exists() and '"global_step": 5, "loss"' in metrics.read_text()

    code, _ = pretrain_until(workspace, fifth_step_has_its_row, signal.SIGKILL, *arguments)
    assert code == -signal.SIGKILL
    assert "resuming from" in pretrain(workspace, *arguments)
    expected = expected_series(json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    assert list(expected["Train/loss"]) == [1, 2, 3, 4, 5, 6, 7]
    assert list(expected["Train/eval_loss"]) == [0, 3, 6, 7]
    assert_same_series(csv_series(workspace / "monitors/csv"), expected)
    assert_same_series(tensorboard_series(workspace / "monitors/tb"), expected, tolerance=1e-6)
    found = wandb_series(workspace / "wandb", "p", "g")
    assert found.keys() == expected.keys()
    for name in TIMES:  # steps that were taken again took another time
        assert list(found.pop(name)) == list(expected.pop(name))
    assert_same_series(found, expected, tolerance=1e-12)


def test_a_missing_package_is_one_line_for_all_processes_before_any_work(workspace, config, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = ("deepspeed", "--num_accelerators", "2", PRETRAIN, "--deepspeed_config", config, *SETTINGS)
    printed = run(*command, "--output_dir", workspace / "runs/unmonitored", cwd=workspace, code=2)
    (line,) = [line for line in printed.splitlines() if "error: " in line]
    assert line.endswith("(No module named 'wandb'): pip install wandb, or set wandb.enabled to false")
    assert "Traceback" not in printed
    assert not (workspace / "runs/unmonitored").exists()


def test_wandb_goes_on_where_its_server_or_its_own_files_end(tmp_path, monkeypatch):
    """Whole steps alone count in a file that a kill cut off, which has several blocks of 32 KiB."""
    import wandb

    assert last_recorded_step(types.SimpleNamespace(offline=False, step=5)) == 4
    for name, value in {"MODE": "offline", "DIR": tmp_path, "SILENT": "true", "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    settings = wandb.Settings(x_disable_stats=True, console="off")
    with wandb.init(project="p", id="abcd1234", settings=settings) as run:
        assert last_recorded_step(run) == -1
        for step in range(0, 400):
            run.log({"loss": 1.0, **{f"value_{number}": step / 7 for number in range(20)}}, step=step, commit=True)
    wandb.teardown()  # its service still writes when the run is finished
    path = tmp_path / f"wandb/{run.dir.split('/')[-2]}/run-abcd1234.wandb"
    data = path.read_bytes()
    assert len(data) > 5 * 2**15
    assert last_recorded_step(run) == 399
    assert sum(len(record) for record in log_records(data)) > 0.98 * len(data)
    found = []
    for eighth in range(8, -1, -1):
        path.write_bytes(data[: len(data) * eighth // 8])
        found.append(last_recorded_step(run))
    assert (found[0], found[-1]) == (399, -1)
    assert 150 < found[4] < 250
    assert found == sorted(found, reverse=True)
