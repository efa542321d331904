"""Checkpoints of real runs: DeepSpeed's own layout, and a disk that is full."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import CONFIG, PRETRAIN, REPOSITORY, launch, pretrain, run

SETTINGS = ("--model", "nano", "--max_seq_length", "32", "--train_batch_size", "8", "--warmup_steps", "1")
SETTINGS += ("--learning_rate", "1e-3", "--eval_interval", "100", "--eval_sequences", "8", "--save_interval", "2")


@pytest.fixture(scope="module")
def saved(workspace: Path) -> Path:
    """A run of four steps that wrote checkpoints of steps 2 and 4 in both layouts."""
    pretrain(workspace, *SETTINGS, "--max_steps", "4", "--output_dir", "runs/saved", "--save_deepspeed_checkpoint")
    return workspace / "runs/saved"


def tensors(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run_folder / f"checkpoints/global_step{step}/state-00000-of-00001.safetensors")


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_from_deepspeeds_layout_as_if_it_were_unbroken(saved, workspace):
    folder = saved / "deepspeed_checkpoints"
    assert (folder / "latest").read_text().strip() == "global_step4"
    assert not list(folder.glob(".*"))
    arguments = (*SETTINGS, "--max_steps", "4", "--output_dir", "runs/resumed", "--resume", folder / "global_step2")
    assert "resuming from" in pretrain(workspace, *arguments)
    assert identical(tensors(workspace / "runs/resumed", 4), tensors(saved, 4))
    again = pretrain(workspace, *arguments)  # as of a job that is queued again
    assert "this run has already continued from --resume" in again
    assert "step 4 of 4" in again


def test_a_run_goes_on_from_an_older_checkpoint_of_its_own_as_often_as_it_is_stopped(saved, workspace):
    output = workspace / "runs/own"
    shutil.copytree(saved, output)
    arguments = (*SETTINGS, "--max_steps", "4", "--output_dir", output)
    older = ("--resume", output / "checkpoints/global_step2")
    assert "the last of step 4, that did not begin" in pretrain(workspace, *arguments, *older, code=2)
    shutil.rmtree(output / "checkpoints/global_step4")
    assert "step 2 of 4" in pretrain(workspace, *arguments, *older)
    shutil.rmtree(output / "checkpoints/global_step2")  # as --keep_last does after some saves
    again = pretrain(workspace, *arguments, *older)
    assert "this run has already continued from --resume" in again
    assert "step 4 of 4" in again
    assert identical(tensors(output, 4), tensors(saved, 4))


def test_a_checkpoint_that_a_kill_took_away_while_it_was_replaced_is_put_back(saved, workspace):
    output = workspace / "runs/replaced"
    shutil.copytree(saved, output)
    checkpoints = output / "checkpoints"
    (checkpoints / "global_step4").rename(checkpoints / ".global_step4.old")
    unfinished = output / "deepspeed_checkpoints/.global_step9.tmp"
    unfinished.mkdir()
    printed = pretrain(workspace, *SETTINGS, "--max_steps", "4", "--output_dir", output)
    assert "global_step4, step 4 of 4" in printed
    assert not unfinished.exists()


def test_a_run_does_not_end_before_its_checkpoint(saved, workspace):
    printed = pretrain(workspace, *SETTINGS, "--max_steps", "3", "--output_dir", saved, code=2)
    assert "global_step4' is at step 4, beyond --max_steps 3: raise it" in printed


def test_a_model_that_a_run_must_not_replace_is_named_before_the_work(saved, workspace):
    output = workspace / "runs/exported"
    shutil.copytree(saved, output)
    arguments = (*SETTINGS, "--max_steps", "5", "--output_dir", output)
    (output / "hf/model.onnx").touch()
    assert "not an exported model without other files" in pretrain(workspace, *arguments, code=2)
    (output / "hf/model.onnx").unlink()
    shutil.rmtree(output / "checkpoints")
    assert "is the model of a run whose checkpoints are gone" in pretrain(workspace, *arguments, code=2)
    held = ("--init_from", output / "hf")
    assert "which the run may replace" in pretrain(workspace, *arguments[2:], *held, code=2)
    assert (output / "metrics.jsonl").read_bytes() == (saved / "metrics.jsonl").read_bytes()


def test_deepspeeds_tools_take_its_layout(saved, workspace):
    folder = saved / "deepspeed_checkpoints"
    run("python", folder / "zero_to_fp32.py", folder, workspace / "fp32", cwd=workspace)
    theirs = torch.load(workspace / "fp32/pytorch_model.bin", weights_only=True)
    ours = {
        name.removeprefix("weight."): value for name, value in tensors(saved, 4).items() if name.startswith("weight.")
    }
    assert identical(theirs, ours)
    universal = ("--input_folder", folder / "global_step4", "--output_folder", workspace / "universal")
    workers = ("--num_extract_workers", "1", "--num_merge_workers", "1")
    run("python", "-m", "deepspeed.checkpoint.ds_to_universal", *universal, *workers, cwd=workspace)
    assert (workspace / "universal/zero/lm_head.bias/exp_avg.pt").exists()


def test_deepspeeds_layout_is_refused_by_runs_that_cannot_load_it(saved, workspace):
    folder = saved / "deepspeed_checkpoints"

    def refusal(*arguments: str | Path, config: Path = CONFIG) -> str:
        command = (PRETRAIN, "--deepspeed_config", config, *SETTINGS, "--max_steps", "4")
        printed = launch(*command, "--output_dir", "runs/refused", *arguments, cwd=workspace, code=2)
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in printed
        assert not (workspace / "runs/refused").exists()
        return line

    line = refusal("--resume", folder, config=REPOSITORY / "ds_configs/zero1.json")
    assert "its ZeRO stage is 2, this run's is 1" in line
    assert "checkpoints/, which loads anywhere" in line
    assert "its seed is 0, this run's is 3" in refusal("--resume", folder, "--seed", "3")
    shutil.copytree(folder, workspace / "damaged")
    path = workspace / "damaged/global_step4/mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot read DeepSpeed's checkpoint file" in refusal("--resume", workspace / "damaged")


def test_a_full_disk_ends_the_run_with_one_error_and_earlier_checkpoints_stay_good(saved, workspace):
    shutil.copytree(saved / "checkpoints", workspace / "runs/full/checkpoints")
    # No file may grow beyond 1 MB: the operating system refuses as on a full disk.
    command = f"ulimit -f 1000; exec python {PRETRAIN} --deepspeed_config {CONFIG} {' '.join(SETTINGS)}"
    printed = run("bash", "-c", f"{command} --max_steps 20 --output_dir runs/full", cwd=workspace, code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "cannot write the checkpoint 'runs/full/checkpoints/global_step6'" in line
    assert "File too large" in line
    assert "earlier checkpoints are intact" in line
    assert "Traceback" not in printed
    found = sorted(path.name for path in (workspace / "runs/full/checkpoints").glob("*step*"))
    assert found == ["global_step2", "global_step4"]
    assert "resuming from runs/full/checkpoints/global_step4" in pretrain(
        workspace, *SETTINGS, "--max_steps", "6", "--output_dir", "runs/full"
    )


def test_export_hf_takes_the_best_of_a_run(saved, workspace):
    state = json.loads((saved / "checkpoints/global_step4/train_state.json").read_text())
    assert state["best_step"] == 4
    command = (REPOSITORY / "launch/export_hf.py", "--checkpoint", saved, "--best", "--output", "best")
    assert "exported" in launch(*command, cwd=workspace)
