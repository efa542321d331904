"""Pretraining by random token substitution with the real commands: stopped, resumed, exported, used."""

import json
import signal

import transformers
from commands import REPOSITORY, launch, pretrain, pretrain_until

from ds_roberta.training.metrics import MACHINE_COLUMNS

SETTINGS = ("--objective", "rts", "--model", "nano", "--max_seq_length", "32", "--train_batch_size", "12")
SETTINGS += ("--learning_rate", "1e-3", "--max_steps", "12", "--warmup_steps", "2")
SETTINGS += ("--eval_interval", "6", "--eval_sequences", "16")


def rows(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in MACHINE_COLUMNS} for row in lines]


def test_a_stopped_run_ends_as_the_unbroken_one_and_its_encoder_is_used(workspace):
    pretrain(workspace, *SETTINGS, "--output_dir", "rts-whole")
    whole, metrics = workspace / "rts-whole", workspace / "rts-broken/metrics.jsonl"
    code, output = pretrain_until(
        workspace,
        lambda: metrics.exists() and metrics.read_text().count("grad_norm") > 3,
        signal.SIGTERM,
        *(*SETTINGS, "--output_dir", "rts-broken"),
    )
    assert code == 85, output
    line = pretrain(workspace, *SETTINGS[2:], "--output_dir", "rts-broken", code=2).splitlines()[-1]
    assert "its objective is 'rts'" in line
    printed = pretrain(workspace, *SETTINGS, "--output_dir", "rts-broken")
    assert "without substitution_head; its hidden states equal transformers'" in printed
    found = rows(whole)
    assert rows(workspace / "rts-broken") == found
    evaluations = [row for row in found if "eval_loss" in row]
    assert {"eval_detection_precision", "eval_detection_recall", "eval_detection_f1"} <= evaluations[-1].keys()
    assert "eval_perplexity" not in evaluations[-1]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    weights = [(folder / "hf/model.safetensors").read_bytes() for folder in (whole, workspace / "rts-broken")]
    assert weights[0] == weights[1]
    assert type(transformers.AutoModel.from_pretrained(whole / "hf")).__name__ == "RobertaModel"
    assert "fill-mask" not in (whole / "hf/README.md").read_text()
    evaluate = (REPOSITORY / "launch/evaluate.py", "perplexity")
    line = launch(*evaluate, "--model", whole / "hf", "--data", "data/corpus", cwd=workspace, code=2)
    assert "which still has its head" in line.splitlines()[-1]


def test_pairs_have_no_place_in_it(workspace):
    output = pretrain(workspace, *SETTINGS, "--packing", "segment-pair", "--output_dir", "rts-pairs", code=2)
    assert "--objective rts cannot be trained with --packing segment-pair" in output.splitlines()[-1]
