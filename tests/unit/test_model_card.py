"""The card of an exported model tells the facts of its run, as far as they are there."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from ds_roberta.config import MaskingConfig, model_config
from ds_roberta.errors import UserError
from ds_roberta.finetuning.model_card import model_card as finetuned_card
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.export import model_card

CONFIG = model_config("tiny", 400, 1024)
IDENTITY = {
    "data": "da7a",
    "seed": 3,
    "packing": {"max_seq_length": 1024, "format": "segment-pair"},
    "masking": asdict(MaskingConfig(0.3, mlm_probability_end=0.15, unit="span")),
    "next_sentence_prediction": True,
    "train_batch_size": 256,
    "train_batch_size_schedule": "0:256",
    "max_seq_length_schedule": "0:128,900:1024",
    "init_from": "f00d",
    "source_weights": None,
}


def weights(head, parameters):
    return {f"{head}.bias": torch.empty(parameters, device="meta")}


def table(card):
    lines = card.split("|---|---|\n")[1].splitlines()
    return dict(line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "domain"
    folder.mkdir()
    rows = [
        {"global_step": s, "eval_loss": 9.0 - s / 500, "eval_nsp_loss": 0.5, "eval_nsp_accuracy": 0.8}
        for s in (0, 500, 1000, 1500)
    ] + [{"global_step": 1500}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"global')
    record = {
        "run": {"data_dir": "/home/me/secret/wiki", "init_from": "models/roberta-base"},
        "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "zero_optimization": {"stage": 1}},
        "batches": [{"world_size": 8}],
        "versions": {"torch": "2.13.0"},
        "commit": "c0ffee",
    }
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_the_peak_rates_of_muon_are_both_in_the_card(run):
    record = json.loads((run / "config.json").read_text())
    params = {"lr": 9.0, "adam_lr": 2e-3, "muon_lr": 0.01, "weight_decay": 0.1}
    record["deepspeed"]["optimizer"] = {"type": "Muon", "params": params}
    (run / "config.json").write_text(json.dumps(record))
    card = model_card(CONFIG, TrainState(IDENTITY, 1200), weights("lm_head", 1), run / "checkpoints/global_step1200")
    facts = table(card)
    assert (facts["peak learning rate"], facts["peak rate of Muon"], facts["optimizer"]) == ("0.002", "0.01", "Muon")


def test_the_card_of_a_continued_run_says_nothing_of_how_random_weights_would_have_begun(run):
    record = json.loads((run / "config.json").read_text())
    record["run"] |= {"initial_attention": "random", "initial_bias": "zero"}
    (run / "config.json").write_text(json.dumps(record))
    path, begin = run / "checkpoints/global_step1200", {"initial attention", "initial bias of the head"}
    assert not begin & table(model_card(CONFIG, TrainState(IDENTITY, 1200), weights("lm_head", 1), path)).keys()
    record["run"]["init_from"] = None
    (run / "config.json").write_text(json.dumps(record))
    assert begin < table(model_card(CONFIG, TrainState(IDENTITY, 1200), weights("lm_head", 1), path)).keys()


def test_the_card_has_the_facts_of_the_run_up_to_the_checkpoint(run):
    lines = {"unigram_loss": 7.12345, "neighbour_loss": 5.5}
    state = TrainState(IDENTITY, 1200, 307_200, 250_000_000, lines=lines)
    card = model_card(CONFIG, state, weights("lm_head", 7_000_000), run / "checkpoints/global_step1200")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    assert "\n# domain\n" in card
    assert "7,000,000 parameters" in card
    assert "at most 1024 of them" in card
    facts = table(card)
    assert facts["objective"].startswith("masked language modelling and next sentence prediction")
    assert facts["masked"] == "0.3 to 0.15 of the tokens, by span, dynamic"
    assert (facts["steps"], facts["tokens seen"], facts["sequences per step"]) == ("1,200", "250,000,000", "256")
    assert facts["sequence length schedule"] == "0:128,900:1024"
    assert "batch size schedule" not in facts
    assert facts["held-out loss"] == "7.0000 nats per masked token (perplexity 1,096.63), after step 1,000"
    assert facts["held-out loss from frequencies of the training text's tokens alone"] == "7.1235 nats per masked token"
    assert facts["held-out loss from counts of neighbours"] == "5.5000 nats per masked token"
    assert facts["next sentence prediction"] == "loss 0.5000, accuracy 80.00%, after step 1,000"
    assert (facts["started from"], facts["data"]) == ("weights of checksum f00d", "fingerprint da7a")
    assert (facts["data folder"], facts["folder of the initial model"]) == ("wiki", "roberta-base")
    assert "secret" not in card
    assert (facts["torch"], facts["commit of ds_roberta"], facts["processes"]) == ("2.13.0", "c0ffee", "8")
    assert not any("None" in value for value in facts.values())


def test_the_card_of_token_substitution_speaks_of_replaced_tokens(run):
    detection = {
        f"eval_detection_{name}": value for name, value in (("precision", 0.5), ("recall", 0.25), ("f1", 1 / 3))
    }
    (run / "metrics.jsonl").write_text(json.dumps({"global_step": 1000, "eval_loss": 0.4, **detection}) + "\n")
    identity = {**IDENTITY, "objective": "rts", "next_sentence_prediction": False}
    card = model_card(
        CONFIG, TrainState(identity, 1200), weights("roberta", 7_000_000), run / "checkpoints/global_step1200"
    )
    facts = table(card)
    assert facts["replaced"] == "0.3 to 0.15 of the tokens, by span, dynamic"
    assert facts["held-out loss"] == "0.4000 nats per token, after step 1,000"
    assert facts["replaced tokens found"] == "precision 0.500, recall 0.250, f1 0.333, after step 1,000"
    assert "perplexity" not in card
    assert "fill-mask" not in card


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", '{"run"'), ("config.json", "[]"), ("metrics.jsonl", 'loss": 1}\n')]
)
def test_a_broken_record_of_the_run_is_named(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}' (cannot be read|is not a JSON object|is broken).*fix or remove it"):
        model_card(CONFIG, TrainState(IDENTITY, 1200), weights("lm_head", 1), run / "checkpoints/global_step1200")


def test_another_tools_config_beside_a_checkpoint_is_no_record(run):
    (run / "config.json").write_text('{"model_type": "roberta"}')
    card = model_card(CONFIG, TrainState(IDENTITY, 1200), weights("lm_head", 1), run / "checkpoints/global_step1200")
    assert "# RoBERTa\n" in card


def test_what_masks_do_is_said_where_it_is_not_as_usual(run):
    for unusual, expected in (
        ({}, "dynamic"),
        ({"eval_mlm_probability": 0.15}, "dynamic; 0.15 in held-out sequences"),
        (
            {"mask_replace_prob": 1.0, "random_replace_prob": 0.0},
            "dynamic; of these, 1 become the mask token, 0 random ones",
        ),
    ):
        state = TrainState({**IDENTITY, "masking": asdict(MaskingConfig(0.3, **unusual))}, 1200)
        card = model_card(CONFIG, state, weights("lm_head", 1), run / "checkpoints/global_step1200")
        assert table(card)["masked"] == f"0.3 of the tokens, by token, {expected}"


def test_a_checkpoint_that_was_copied_into_another_runs_folder_has_its_own_facts_only(run):
    state = TrainState(IDENTITY, 1200)
    facts = table(model_card(CONFIG, state, weights("lm_head", 1), run / "from_elsewhere/global_step1200"))
    assert "steps" in facts
    assert not any(name.startswith("held-out loss") or name == "torch" for name in facts)


def test_a_checkpoint_alone_has_its_own_facts(tmp_path):
    state = TrainState({"packing": {"max_seq_length": 64}}, 7, consumed_tokens=9)
    card = model_card(CONFIG, state, weights("lm_head", 1), tmp_path / "checkpoints/global_step7")
    assert "# RoBERTa\n" in card
    facts = table(card)
    assert (facts["steps"], facts["tokens seen"], facts["started from"]) == ("7", "9", "random weights")
    assert not {"torch", "data", "seed"} & facts.keys()
    assert not any(name.startswith("held-out loss") for name in facts)


@pytest.mark.parametrize(
    ("step", "before", "length"), [(0, 0, 128), (900, 0, 128), (901, 0, 1024), (900, 512, 512), (901, 512, 1024)]
)
def test_the_length_is_of_what_was_trained_so_far(step, before, length):
    assert TrainState(IDENTITY, step, learned_positions=before).trained_length == length


def test_the_tags_have_the_type_of_the_model(run):
    for model_type in ("roberta", "xlm-roberta"):
        config = replace(CONFIG, model_type=model_type)
        for head in ("lm_head", "roberta"):
            card = model_card(config, TrainState(IDENTITY, 1200), weights(head, 1), run / "checkpoints/global_step1200")
            assert f"tags:\n- {model_type}\n" in card


def test_the_card_of_a_fine_tuned_model_names_its_task_labels_and_scores():
    results = {
        "model": "/home/me/secret/nano", "task": "token-classification", "metric": "f1", "max_seq_length": 128,
        "label_names": ["O", *(f"B-{number}" for number in range(120))], "examples": {"train": 4_000, "validation": 90},
        "settings": [{"runs": [{}, {}, {}]}], "versions": {"transformers": "5.23.0"},
        "best": {"learning_rate": 3e-4, "train_batch_size": 16, "seed": 2, "epoch": 3, "stopped_after_epoch": None,
                 "validation": {"f1": 0.5, "counts": {}}, "test": {"f1": 0.25}},
    }  # fmt: skip
    card = finetuned_card("camembert", "RobertaForTokenClassification", results, has_error_analysis=True)
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: token-classification\ntags:\n- camembert\n")
    assert 'AutoModelForTokenClassification.from_pretrained("THIS_FOLDER")' in card
    assert "`B-98` and 21 more." in card
    assert "secret" not in card
    facts = table(card)
    assert (facts["f1, validation"], facts["f1, test"], facts["seed"]) == ("0.5000", "0.2500", "2, the best of 3")
    assert facts["examples"] == "4,000 train, 90 validation"
    assert "`error_analysis.json` quotes texts" in card
    without = finetuned_card("roberta", "RobertaForTokenClassification", results, has_error_analysis=False)
    assert "error_analysis" not in without
    assert "pipeline_tag" not in finetuned_card(
        "roberta", "RobertaForMultipleChoice", results, has_error_analysis=False
    )
