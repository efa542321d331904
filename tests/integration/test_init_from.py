"""Start from a model with the real command: on longer sequences, interrupted and started again."""

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from commands import CONFIG, PRETRAIN, launch, pretrain, pretrain_until, run

from ds_roberta.model.weights import POSITION_EMBEDDINGS

SETTINGS = ("--train_batch_size", "12", "--learning_rate", "1e-3", "--max_steps", "4", "--save_interval", "2")
SETTINGS += ("--eval_interval", "2", "--eval_sequences", "32", "--warmup_steps", "1")
CONTINUED = (*SETTINGS, "--init_from", "hub/model", "--max_seq_length", "96", "--extend_positions")


def rows(output: Path, name: str) -> list[float]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    (path,) = (output / "checkpoints/global_step4").glob("state-*.safetensors")
    return safetensors.torch.load_file(path)


@pytest.fixture(scope="module")
def hub(workspace: Path) -> Path:
    """A folder that transformers wrote, with 48 positions and the workspace's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.RobertaConfig(vocab_size=2000, max_position_embeddings=50, layer_norm_eps=1e-5, **sizes)
    transformers.RobertaForMaskedLM(config).save_pretrained(workspace / "hub/model")
    (workspace / "hub/model/tokenizer.json").write_bytes((workspace / "data/tokenizer/tokenizer.json").read_bytes())
    return workspace / "hub/model"


@pytest.fixture(scope="module")
def unbroken(workspace: Path, hub: Path) -> Path:
    printed = pretrain(workspace, *CONTINUED, "--output_dir", "runs/longer")
    assert "positions from 48 to 95 begin as copies of the 48 before" in printed
    return workspace / "runs/longer"


def test_a_run_in_bf16_begins_with_all_bits_of_the_weights(hub, workspace):
    content = json.loads(CONFIG.read_text())
    content["bf16"] = {"enabled": True}
    content["optimizer"]["params"]["weight_decay"] = 0.0
    (workspace / "bf16.json").write_text(json.dumps(content))
    arguments = ("--init_from", hub, "--train_batch_size", "12", "--learning_rate", "1e-30", "--max_steps", "1")
    command = (PRETRAIN, "--deepspeed_config", "bf16.json", *arguments, "--warmup_steps", "0", "--eval_sequences", "8")
    assert "precision bf16" in launch(*command, "--output_dir", "runs/bf16", cwd=workspace)
    given, kept = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (hub, workspace / "runs/bf16/hf")
    )
    for name, weight in kept.items():
        torch.testing.assert_close(weight, given[name], rtol=0, atol=1e-12)  # one step of nearly no length


def test_the_run_has_the_folders_architecture_and_the_new_length(unbroken):
    record = json.loads((unbroken / "config.json").read_text())["run"]
    assert (record["init_from"], record["model_name"]) == ("hub/model", "model")
    assert record["model"]["intermediate_size"] == 64
    exported = transformers.RobertaForMaskedLM.from_pretrained(unbroken / "hf")
    assert (exported.config.max_position_embeddings, exported.config.intermediate_size) == (98, 64)
    assert transformers.AutoTokenizer.from_pretrained(unbroken / "hf").model_max_length == 96
    losses = rows(unbroken, "eval_loss")
    assert losses[-1] < losses[0]
    card = (unbroken / "hf/README.md").read_text()
    assert f"| held-out loss | {losses[-1]:.4f} nats" in card
    assert "| folder of the initial model | model |" in card


def test_a_killed_run_that_goes_on_is_the_unbroken_one(workspace, unbroken):
    output = workspace / "runs/killed"
    arguments = (*CONTINUED, "--output_dir", "runs/killed")
    saved = output / "checkpoints/global_step2/manifest.json"
    pretrain_until(workspace, saved.exists, signal.SIGKILL, *arguments)
    printed = pretrain(workspace, *arguments)
    assert "resuming from runs/killed/checkpoints/global_step" in printed
    assert rows(output, "loss") == rows(unbroken, "loss")
    expected, found = tensors(unbroken), tensors(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_of_ours_begins_where_it_stood(workspace, unbroken):
    checkpoint = "runs/longer/checkpoints/global_step4"
    printed = pretrain(workspace, *SETTINGS, "--init_from", checkpoint, "--output_dir", "runs/again")
    assert f"the weights are those in {checkpoint}" in printed
    again = workspace / "runs/again"
    assert rows(again, "eval_loss")[0] == rows(unbroken, "eval_loss")[-1]
    assert rows(again, "global_step")[0] == 0
    refused = pretrain(workspace, *SETTINGS, "--init_from", "hub/model", "--output_dir", "runs/again", code=2)
    assert "cannot resume from" in refused
    assert "its model.max_position_embeddings is 98, this run's is 50" in refused


def test_a_wrong_folder_is_one_line(workspace, hub):
    arguments = (*SETTINGS, "--output_dir", "runs/wrong")
    refused = pretrain(workspace, *arguments, "--init_from", "data/corpus", code=2)
    assert "no model in 'data/corpus'" in refused
    assert "Traceback" not in refused
    refused = pretrain(workspace, *arguments, "--init_from", "hub/model", "--max_seq_length", "49", code=2)
    assert "--extend_positions" in refused
    assert not (workspace / "runs/wrong").exists()


def test_a_new_tokenizer_is_mapped(workspace, hub):
    book = ("books=" + str(Path(__file__).parents[2] / "examples/corpus/ethan-frome.txt"),)
    run("preprocess", "train-tokenizer", "--input", *book, "--vocab_size", "500", "--output", "data/own", cwd=workspace)
    shard = ("preprocess", "shard", "--input", *book, "--tokenizer", "data/own", "--output", "data/of_own")
    run(*shard, "--validation_fraction", "0.05", "--workers", "2", cwd=workspace)
    arguments = (*SETTINGS, "--init_from", "hub/model", "--data_dir", "data/of_own", "--output_dir", "runs/mapped")
    refused = pretrain(workspace, *arguments, code=2)
    assert "--remap_token_embeddings" in refused
    printed = pretrain(workspace, *arguments, "--remap_token_embeddings")
    assert "tokens are copied" in printed
    assert transformers.AutoConfig.from_pretrained(workspace / "runs/mapped/hf").vocab_size == 500


def test_ones_own_architecture_is_pretrained_resumed_exported_and_begun_with(workspace):
    own = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 100}
    own |= {"hidden_act": "silu", "max_position_embeddings": 34, "hidden_dropout_prob": 0, "vocab_size": 2048}
    (workspace / "narrow").mkdir()
    (workspace / "narrow/config.json").write_text(json.dumps({"model_type": "roberta", "n_layer": 4, **own}))
    initial = ("--initial_attention", "neighbours", "--initial_bias", "frequencies")
    arguments = ("--model", "narrow", *SETTINGS, *initial, "--output_dir", "runs/narrow")
    printed = pretrain(workspace, *arguments, "--max_steps", "2")
    assert "model narrow (the architecture of narrow/config.json: 3 layers of width 48, 6 heads" in printed
    assert "; not used: n_layer), precision" in printed
    first = json.loads((workspace / "runs/narrow/metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] == pytest.approx(first["unigram_loss"], abs=0.05)  # 0.7 more without the bias
    assert "resuming from runs/narrow/checkpoints/global_step2" in pretrain(workspace, *arguments)
    exported = json.loads((workspace / "runs/narrow/hf/config.json").read_text())
    assert {name: exported[name] for name in own} == own
    positions = safetensors.torch.load_file(workspace / "runs/narrow/hf/model.safetensors")[POSITION_EMBEDDINGS]
    norms = positions[2:].norm(dim=1)  # still the first sinusoids, rounded where the CPU trains in bf16
    torch.testing.assert_close(norms, torch.full((32,), 0.04 * 48**0.5), rtol=2**-9, atol=0)
    begun = ("--init_from", "runs/narrow/hf", *SETTINGS, "--max_steps", "1", "--output_dir", "runs/begun")
    printed = pretrain(workspace, *begun)
    assert "the weights are those in runs/narrow/hf" in printed
    assert "its position embeddings are sinusoids (--initial_attention neighbours): they stay as they are" in printed
    kept = safetensors.torch.load_file(workspace / "runs/begun/hf/model.safetensors")[POSITION_EMBEDDINGS]
    torch.testing.assert_close(kept, positions, rtol=2**-8, atol=0)
    assert rows(workspace / "runs/begun", "eval_loss")[0] == pytest.approx(
        rows(workspace / "runs/narrow", "eval_loss")[-1], rel=1e-3
    )
