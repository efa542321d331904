"""From text to export with the real commands, and what happens when a run is interrupted."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import CONFIG, PRETRAIN, REPOSITORY, launch, pretrain, pretrain_until, run

from ds_roberta.lease import leases_within, sole_writer
from ds_roberta.training.metrics import MACHINE_COLUMNS

DATA = ("--max_seq_length", "64", "--train_batch_size", "24", "--learning_rate", "1e-3", "--warmup_steps", "2")
WITHOUT_STEPS = ("--model", "nano", *DATA, "--save_interval", "2", "--eval_interval", "3", "--eval_sequences", "64")
SETTINGS = (*WITHOUT_STEPS, "--max_steps", "6")


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in MACHINE_COLUMNS} for row in entries]


def final_state(output: Path) -> dict:
    return json.loads((output / "checkpoints/global_step6/train_state.json").read_text(encoding="utf-8"))


def final_tensors(output: Path) -> dict[str, torch.Tensor]:
    (path,) = (output / "checkpoints/global_step6").glob("state-*.safetensors")
    return safetensors.torch.load_file(path)


def assert_same_end(output: Path, unbroken: Path) -> None:
    """Two runs have the same metrics but times, the same state and bit-identical weights and moments."""
    assert without_times(rows(output)) == without_times(rows(unbroken))
    assert final_state(output) == final_state(unbroken)
    assert (output / "checkpoints/best").read_text() == (unbroken / "checkpoints/best").read_text()
    expected, found = final_tensors(unbroken), final_tensors(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


NOT_NEEDED_TO_TRAIN = ("transformers", "datasets", "pandas", "torch._inductor.compile_fx")
TELL_MODULES = f"""
import runpy, sys
from ds_roberta.training.trainer import Trainer
save = Trainer.save
def tell(trainer):
    print("needlessly loaded:", [name for name in {NOT_NEEDED_TO_TRAIN} if name in sys.modules])
    save(trainer)
Trainer.save = tell
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def unbroken(workspace: Path) -> Path:
    """A run as a shell starts it, with which those of forked processes are compared."""
    command = (sys.executable, "-c", TELL_MODULES, PRETRAIN, "--deepspeed_config", CONFIG, *SETTINGS)
    printed = run(*command, "--output_dir", "runs/unbroken", cwd=workspace)
    (workspace / "unbroken.log").write_text(printed, encoding="utf-8")
    return workspace / "runs/unbroken"


def test_metrics_tell_each_step_and_evaluation(unbroken):
    entries = rows(unbroken)
    steps = [row for row in entries if "loss" in row]
    assert [row["global_step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["consumed_samples"] for row in steps] == [24, 48, 72, 96, 120, 144]
    assert [row["learning_rate"] for row in steps] == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for key in ("grad_norm", "consumed_tokens", "tokens_per_second"):
        assert all(row[key] > 0 for row in steps)
    evaluations = [row for row in entries if "eval_loss" in row]
    assert [row["global_step"] for row in evaluations] == [0, 3, 6]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.2
    assert evaluations[0]["eval_perplexity"] > evaluations[-1]["eval_perplexity"]


def test_counts_are_shown_to_compare_the_held_out_loss_with(unbroken, workspace):
    first, *others = [row for row in rows(unbroken) if "eval_loss" in row]
    unigram, neighbour = lines = [first["unigram_loss"], first["neighbour_loss"]]
    assert 3 < neighbour < unigram < first["eval_loss"]
    assert not any("unigram_loss" in row for row in others)
    assert list(final_state(unbroken)["lines"].values()) == lines
    printed = (workspace / "unbroken.log").read_text(encoding="utf-8")
    logged = (
        f"held-out loss {unigram:.4f} from the frequencies of tokens alone, {neighbour:.4f} from counts of neighbours"
    )
    assert printed.index(logged) < printed.index("step 0: held-out loss")
    assert re.search(rf" 0%\|.*unigram_loss {unigram:.3f}, neighbour_loss {neighbour:.3f}\]", printed)
    card = (unbroken / "hf/README.md").read_text(encoding="utf-8")
    assert f"tokens alone | {unigram:.4f} nats" in card
    assert f"counts of neighbours | {neighbour:.4f} nats" in card


def test_a_loss_that_stands_still_is_said_once_or_ends_the_run_with_its_checkpoint(unbroken, workspace):
    words = "is not 0.15 below "
    assert (workspace / "unbroken.log").read_text(encoding="utf-8").count("step 3: the held-out loss, ") == 1
    assert (workspace / "unbroken.log").read_text(encoding="utf-8").count(words) == 1
    arguments = (*SETTINGS, "--output_dir", "runs/still")
    printed = pretrain(workspace, *arguments, "--loss_plateau", "stop", code=2)
    error = printed.splitlines()[-1]
    assert error.startswith("error: step 3: the held-out loss, ")
    assert words in error
    assert "docs/pretraining.md" in error
    assert (workspace / "runs/still/checkpoints/latest").read_text().strip() == "global_step3"
    assert words not in pretrain(workspace, *arguments)
    assert_same_end(workspace / "runs/still", unbroken)


def test_the_run_records_how_it_was_made(unbroken):
    record = json.loads((unbroken / "config.json").read_text())
    assert record["run"]["packing"]["max_seq_length"] == 64
    assert record["deepspeed"]["zero_optimization"]["stage"] == 2
    assert record["batches"][0]["train_batch_size"] == 24
    assert record["versions"]["torch"] == torch.__version__


def test_a_folder_with_files_of_another_kind_is_not_written_into(workspace):
    line = pretrain(workspace, *SETTINGS, "--output_dir", "data/corpus", code=2).splitlines()[-1]
    assert line == "error: --output_dir 'data/corpus' is --data_dir: choose a separate folder"
    (workspace / "model").mkdir()
    (workspace / "model/config.json").write_text('{"model_type": "roberta"}')
    line = pretrain(workspace, *SETTINGS, "--output_dir", "model", code=2).splitlines()[-1]
    assert "error: --output_dir 'model' has a config.json that is not a run's" in line
    assert [path.name for path in (workspace / "model").iterdir()] == ["config.json"]


def test_a_second_run_in_one_folder_is_refused_and_touches_nothing(workspace):
    held = workspace / "runs/held"
    with sole_writer(held, leases_within(held)):
        line = pretrain(workspace, *SETTINGS, "--output_dir", "runs/held", code=2).splitlines()[-1]
        assert line.startswith("error: another job is writing ")
        assert [path.name for path in held.iterdir()] == [".leases"]


def test_a_run_that_another_host_took_over_writes_nothing_more(workspace):
    output = workspace / "runs/taken-over"

    def is_taken_over() -> bool:
        if not has_row(output, 3):
            return False
        (lease,) = (output / ".leases").glob("*.json")
        lease.unlink()
        return True

    arguments = (*SETTINGS, "--save_interval", "9", "--eval_interval", "9", "--output_dir", output)
    code, printed = pretrain_until(workspace, is_taken_over, signal.SIGCONT, *arguments)
    assert code == 2
    assert "error: this job lost its lease" in printed.splitlines()[-1]
    assert rows(output)[-1]["global_step"] < 6
    assert not (output / "checkpoints/global_step6").exists()
    assert not (output / "hf").exists()


def test_a_run_that_diverges_ends_with_its_finite_checkpoint_and_no_model(workspace):
    arguments = (*SETTINGS, "--learning_rate", "1e20", "--warmup_steps", "0", "--save_interval", "1")
    printed = pretrain(workspace, *arguments, "--no_decay_bias_and_norm", "--output_dir", "runs/diverged", code=2)
    assert printed.splitlines()[-1].startswith(
        "error: the loss (nan) or the gradient norm (inf) of step 2 is not finite"
    )
    assert "Traceback" not in printed
    output = workspace / "runs/diverged"
    assert not (output / "hf").exists()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["global_step1", "latest"]
    assert json.loads((output / "config.json").read_text())["run"]["no_decay_bias_and_norm"] is True
    export = (REPOSITORY / "launch/export_hf.py", "--checkpoint", output, "--output", workspace / "model_of_it")
    exported = launch(*export, cwd=workspace, code=2)
    assert "the model's logits are not finite in fp32: the training has diverged, nothing was written" in exported
    assert not (workspace / "model_of_it").exists()


def test_length_and_batch_follow_their_schedules(workspace):
    arguments = (*SETTINGS, "--output_dir", "runs/staged", "--train_batch_size_schedule", "0:8,2:24")
    printed = pretrain(workspace, *arguments, "--max_seq_length_schedule", "0:32,3:64")
    assert "from step 3: 64 tokens a sequence" in printed
    steps = [row for row in rows(workspace / "runs/staged") if "loss" in row]
    assert [row["consumed_samples"] for row in steps] == [8, 16, 40, 64, 88, 112]
    tokens = [row["consumed_tokens"] for row in steps]
    assert 1.5 < (tokens[3] - tokens[2]) / (tokens[2] - tokens[1]) < 2.5
    record = json.loads((workspace / "runs/staged/config.json").read_text())
    assert [stage["max_seq_length"] for stage in record["run"]["stages"]] == [32, 32, 64]
    assert [plan["train_batch_size"] for plan in record["batches"]] == [8, 24, 24]
    refused = pretrain(workspace, *arguments, "--max_seq_length_schedule", "0:32,4:64", code=2)
    assert "max_seq_length_schedule is '0:32,3:64', this run's is '0:32,4:64'" in refused


def test_checkpoints_are_named_and_the_last_ones_kept(unbroken):
    checkpoints = unbroken / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best",
        "global_step3",
        "global_step4",
        "global_step6",
        "latest",
    ]
    assert (checkpoints / "latest").read_text().strip() == "global_step6"


def test_the_best_checkpoint_is_the_one_of_the_lowest_held_out_loss(unbroken):
    evaluations = [row for row in rows(unbroken) if row.get("eval_loss") and row["global_step"]]
    lowest = min(evaluations, key=lambda row: row["eval_loss"])
    state = final_state(unbroken)
    assert (state["best_eval_loss"], state["best_step"]) == (lowest["eval_loss"], lowest["global_step"])
    assert (unbroken / "checkpoints/best").read_text().strip() == f"global_step{lowest['global_step']}"


def test_the_exported_model_fills_masks_and_loads_for_classification(unbroken):
    from transformers import AutoModelForSequenceClassification, pipeline

    guesses = pipeline("fill-mask", model=str(unbroken / "hf"))("He looked at the <mask>.")
    assert all(guess["token_str"] for guess in guesses)
    AutoModelForSequenceClassification.from_pretrained(unbroken / "hf", num_labels=3)


def test_export_hf_writes_the_same_model_from_the_checkpoint(unbroken, workspace):
    command = (REPOSITORY / "launch/export_hf.py", "--checkpoint", "runs/unbroken", "--output", "exported/model")
    assert "logits equal" in launch(*command, cwd=workspace)
    ours = safetensors.torch.load_file(workspace / "exported/model/model.safetensors")
    for name, value in safetensors.torch.load_file(unbroken / "hf/model.safetensors").items():
        assert torch.equal(ours[name], value)


def has_row(output: Path, step: int, key: str = "loss") -> bool:
    metrics = output / "metrics.jsonl"
    return metrics.exists() and f'"global_step": {step}, "{key}"' in metrics.read_text(encoding="utf-8")


def test_a_run_killed_twice_goes_on_as_if_it_were_unbroken(unbroken, workspace):
    """Its steps follow from a budget of tokens."""
    output = workspace / "runs/killed-twice"
    refused = pretrain(workspace, *WITHOUT_STEPS, "--max_tokens", "9", "--output_dir", output, code=2)
    assert re.search(r"error: --max_tokens 9 is less than the [\d,]+ tokens of a step: give more", refused)
    tokens = final_state(unbroken)["consumed_tokens"]
    arguments = (*WITHOUT_STEPS, "--max_tokens", str(tokens + tokens // 12), "--output_dir", output)
    # Between an evaluation and the checkpoint that it is in, then between two checkpoints.
    for step, key in ((3, "eval_loss"), (5, "loss")):
        code, _ = pretrain_until(
            workspace,
            lambda: has_row(output, step, key) and (output / "checkpoints/latest").exists(),  # noqa: B023
            signal.SIGKILL,
            *arguments,
        )
        assert code == -signal.SIGKILL
    assert "resuming from" in pretrain(workspace, *arguments)
    assert_same_end(output, unbroken)


def test_a_run_stopped_twice_goes_on_as_if_it_were_unbroken(unbroken, workspace):
    output = workspace / "runs/stopped"
    arguments = (*SETTINGS, "--output_dir", output)
    step = 3  # whose evaluation is due
    for number in (signal.SIGTERM, signal.SIGINT):
        code, printed = pretrain_until(workspace, lambda: has_row(output, step), number, *arguments)  # noqa: B023
        assert code == 85, printed
        assert "stopped on request" in printed
        step = rows(output)[-1]["global_step"] + 1
    assert "resuming from" in pretrain(workspace, *arguments)
    assert_same_end(output, unbroken)


def test_minutes_fix_the_steps_once_and_change_nothing_else(unbroken, workspace):
    output = workspace / "runs/minutes"
    arguments = (*WITHOUT_STEPS, "--save_interval", "1000", "--output_dir", output)

    pretrain_until(workspace, lambda: has_row(output, 3), signal.SIGKILL, *arguments, "--max_minutes", "2")
    assert not (output / "checkpoints/latest").exists()
    steps = [row["loss"] for row in rows(unbroken) if "loss" in row]  # the rates differ from step 3 on
    assert [row["loss"] for row in rows(output) if "loss" in row][:3] == steps[:3]
    plan = json.loads((output / "plan.json").read_text())
    assert plan["max_steps"] > 6
    (output / "metrics.jsonl").unlink()
    _, printed = pretrain_until(workspace, lambda: has_row(output, 1), signal.SIGTERM, *arguments, "--max_minutes", "2")
    assert f"--max_minutes 2: {plan['max_steps']:,} steps, as planned before ({output}/plan.json)" in printed
    assert json.loads((output / "config.json").read_text())["run"]["schedule"]["max_steps"] == plan["max_steps"]
    refused = pretrain(workspace, *arguments, "--max_minutes", "3", code=2)
    assert f"was planned by --max_minutes 2 ({plan['max_steps']} steps), not by --max_minutes 3" in refused


def test_a_named_change_is_allowed_and_becomes_the_runs_own(unbroken, workspace):
    output = workspace / "runs/changed"
    shutil.copytree(unbroken, output)
    changes = ("--seed", "5", "--masking", "whole-word", "--allow_change", "seed,masking")
    printed = pretrain(workspace, *SETTINGS, "--max_steps", "7", "--output_dir", output, *changes)
    assert "its seed is 0, this run's is 5" in printed
    assert f"as found before ({output}/micro_batch.json)" in printed
    state = json.loads((output / "checkpoints/global_step7/train_state.json").read_text())
    assert state["identity"]["seed"] == 5
    before = final_state(unbroken)
    assert all(state["lines"][name] != loss for name, loss in before["lines"].items())  # of other masks
    assert "from here on, held-out losses are of other sequences or masks" in printed
    assert state["best_step"] > before["global_step"]  # although the losses may be higher


def test_the_deepspeed_launcher_with_two_processes_and_default_places(workspace, unbroken):
    command = ("deepspeed", "--num_accelerators", "2", PRETRAIN, "--deepspeed_config", CONFIG)
    short = (*DATA, "--max_steps", "2", "--eval_sequences", "8")
    dropout = ("--attention_probs_dropout_prob", "0", "--hidden_dropout_prob", "0")
    printed = run(*command, *short, *dropout, cwd=workspace)
    assert "model tiny (the default without a GPU" in printed
    assert "expected time per step" in printed
    two = [row["loss"] for row in rows(workspace / "runs/tiny") if "loss" in row]
    assert two[0] == pytest.approx(next(row["loss"] for row in rows(unbroken) if "loss" in row), rel=0.02)
    assert (workspace / "runs/tiny/hf/model.safetensors").exists()


ALONE = ["--attention", "within-documents"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data_dir", "nowhere"], ["'nowhere'", "preprocess shard"]),
        (["--train_batch_size", "0"], ["train_batch_size", "0", "positive whole number"]),
        (["--train_batch_size", "2.5"], ["train_batch_size", "2.5"]),
        (["--output_dir", "/proc/run"], ["'/proc/run'", "choose another"]),
        (["--resume", "nowhere"], ["'nowhere'", "auto"]),
        (["--max_seq_length", "2"], ["max_seq_length", "2"]),
        (["--mask_steps", "2"], ["--mask_steps"]),
        (["--loss_plateau", "stop", "--objective", "rts"], ["--loss_plateau stop does nothing with --objective rts"]),
        (["--packing", "doc-sentences", *ALONE], ["--attention within-documents does nothing with --packing doc-sent"]),
        (["--objective", "mlm-bow", *ALONE], ["--objective mlm-bow predicts", "--attention within-documents"]),
        (["--deterministic"], ["--deterministic does nothing on a CPU", "remove it"]),
        (["--torch_compile", "on", *ALONE], ["--attention within-documents cannot work with padding"]),
        (["--output_dir", "runs/unbroken", *SETTINGS, *ALONE], ["attention is None, this run's is 'within-documents'"]),
        (["--max_tokens", "9", "--max_minutes", "1"], ["--max_tokens and --max_minutes", "give one of them"]),
        (["--output_dir", "runs/unbroken", *WITHOUT_STEPS, "--max_minutes", "1"], ["global_step6", "--max_steps"]),
        (["--allow_change", "sed"], ["--allow_change", "did you mean 'seed'"]),
        (["--output_dir", "runs/unbroken", *SETTINGS, "--seed", "7"], ["seed", "7", "--output_dir"]),
        (
            ["--output_dir", "runs/unbroken", *SETTINGS, "--source_weights", "books=1"],
            ["source_weights.books is None, this run's is 1", "--output_dir"],
        ),
        (["--source_weights", "wiki=2,books=1"], ["unknown source 'wiki'", "sources are books"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workspace, unbroken, arguments, words):
    before = sorted(workspace.rglob("*"))
    printed = pretrain(workspace, *arguments, code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in printed
    assert sorted(workspace.rglob("*")) == before


def test_a_misspelt_key_of_the_json_is_one_line_and_exit_code_2(workspace):
    misspelt = workspace / "misspelt.json"
    misspelt.write_text(CONFIG.read_text().replace("gradient_clipping", "gradient_cliping"))
    printed = launch(PRETRAIN, "--deepspeed_config", misspelt, cwd=workspace, code=2)
    assert "did you mean 'gradient_clipping'?" in printed
    assert "Traceback" not in printed


def test_a_run_begins_without_packages_that_training_does_not_need(unbroken, workspace):
    """Each package would cost every start up to a second, and memory."""
    printed = (workspace / "unbroken.log").read_text(encoding="utf-8")
    assert printed.count("needlessly loaded: []") == printed.count("needlessly loaded:") > 0
    assert (unbroken / "hf/config.json").is_file()
