"""Export of a checkpoint as a transformers folder with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_roberta.config import MaskingConfig, ModelConfig
from ds_roberta.data.count_models import NEIGHBOUR_LOSS, UNIGRAM_LOSS
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.files import read_json_object, value_at
from ds_roberta.model.architecture import stored_architecture
from ds_roberta.model.export import CARD_SIGNATURE, compared_outputs, export, has_masked_lm_head, known_to_transformers
from ds_roberta.model.objectives import objective_of
from ds_roberta.process import logger
from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import CHECKPOINTS_FOLDER, TrainState
from ds_roberta.training.metrics import CONFIG_NAME, METRICS_NAME, read_metrics


def export_checkpoint(folder: Path, output: Path, best: bool = False) -> None:
    """Export a checkpoint, or a run's newest good one or best one, whatever ZeRO stage and world size wrote it.

    Raises:
        UserError: there is no good checkpoint, the exported model's logits differ, or `output` cannot be written.
    """
    path = checkpoint.best(folder) if best else checkpoint.newest(folder)
    with checkpoint.errors_of_the_state(path):
        state = checkpoint.read_state(path)
        config = stored_architecture(state.identity["model"], path / checkpoint.TRAIN_STATE_NAME)
        trained_length = state.trained_length
    weights = checkpoint.weights(path)
    left_out = {name.split(".")[0]: weights.pop(name) for name in list(weights) if not known_to_transformers(name)}
    with checkpoint.errors_of_the_state(path):
        card = model_card(config, state, weights, path)
    difference = export(config, weights, path / TOKENIZER_FOLDER, trained_length, output, card)
    without = f", without {' and '.join(left_out)}" if left_out else ""
    compared = f"{compared_outputs(weights)} equal transformers' within {difference:.1g}"
    logger.info(f"exported {path} to {output}{without}; its {compared}")


_HEADER = """---
library_name: transformers
{task}---
"""
_FILL_MASK = """pipeline_tag: fill-mask
tags:
- {model_type}
- masked-lm
mask_token: <mask>
"""
_ENCODER = """tags:
- {model_type}
"""
_FILL_MASK_EXAMPLE = """pipeline("fill-mask", model="THIS_FOLDER")("The answer is <mask>.")
"""


def model_card(config: ModelConfig, state: TrainState, weights: Mapping[str, torch.Tensor], checkpoint: Path) -> str:
    """The text of `README.md` in the form of Hugging Face's model cards.

    Args:
        weights: the exported weights, by parameter name.
        checkpoint: `RUN/checkpoints/global_stepN`; outside a run's folder the card has only the checkpoint's facts.

    Raises:
        UserError: the run's `config.json` or `metrics.jsonl` is broken.
    """
    run = checkpoint.resolve().parent.parent
    is_in_run = checkpoint.resolve().parent.name == CHECKPOINTS_FOLDER
    record = {}
    if is_in_run and (run / CONFIG_NAME).is_file():
        record = read_json_object(run / CONFIG_NAME, "fix or remove it")
    if "run" not in record:  # written by another program
        record = {}
    evaluation = _evaluation(state, run / METRICS_NAME) if is_in_run else {}
    facts = {**_training(state), **evaluation, **_lines(state), **_circumstances(record)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    has_head, parameters = has_masked_lm_head(weights), sum(map(torch.Tensor.numel, weights.values()))
    task = (_FILL_MASK if has_head else _ENCODER).format(model_type=config.model_type)
    return f"""{_HEADER.format(task=task)}
# {run.name if record else "RoBERTa"}

A RoBERTa encoder: {config.num_hidden_layers} layers of width {config.hidden_size} with {config.num_attention_heads} \
heads, {parameters:,} parameters, a vocabulary of {config.vocab_size:,} tokens, sequences of at most \
{state.trained_length} of them. It was {CARD_SIGNATURE} and not fine-tuned.

```python
from transformers import AutoModel, AutoModelForSequenceClassification{", pipeline" if has_head else ""}

{_FILL_MASK_EXAMPLE if has_head else ""}\
AutoModel.from_pretrained("THIS_FOLDER")  # hidden states; its pooler is not trained
AutoModelForSequenceClassification.from_pretrained("THIS_FOLDER", num_labels=2)  # to be fine-tuned
```

It knows no more than the text it was trained on, and repeats its errors and prejudices.

| of the training | |
|---|---|
{rows}
"""


def _training(state: TrainState) -> dict[str, Any]:
    identity, masking, packing = state.identity, state.identity.get("masking"), state.identity["packing"]
    objective = objective_of(identity)
    facts = {
        "objective": objective.description,
        objective.chosen: _masking(masking) if masking else None,
        "sequences": f"{packing['max_seq_length']} tokens",
        "packing": packing.get("format"),
        "sequence length schedule": _schedule(identity.get("max_seq_length_schedule")),
        "sequences per step": identity.get("train_batch_size"),
        "batch size schedule": _schedule(identity.get("train_batch_size_schedule")),
        "steps": f"{state.global_step:,}",
        "sequences seen": f"{state.consumed_samples:,}",
        "tokens seen": f"{state.consumed_tokens:,}",
        "started from": f"weights of checksum {identity['init_from']}"
        if identity.get("init_from")
        else "random weights",
        "data": f"fingerprint {identity['data']}" if "data" in identity else None,
        "source weights": identity.get("source_weights"),
        "seed": identity.get("seed"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _masking(masking: dict[str, Any]) -> str:
    share = f"{masking['mlm_probability']:g}"
    if (last := masking.get("mlm_probability_end")) is not None:
        share += f" to {last:g}"
    held_out = masking.get("eval_mlm_probability")
    copies = masking.get("copies")
    replaced = masking["mask_replace_prob"], masking["random_replace_prob"]
    usual = replaced == (MaskingConfig.mask_replace_prob, MaskingConfig.random_replace_prob)
    return f"{share} of the tokens, by {masking['unit']}, {f'{copies} fixed masks' if copies else 'dynamic'}" + (
        ("" if usual else "; of these, {:g} become the mask token, {:g} random ones".format(*replaced))
        + ("" if held_out is None else f"; {held_out:g} in held-out sequences")
    )


def _schedule(text: str | None) -> str | None:
    """The schedule if it has more than one stage, else None."""
    return text if text and "," in text else None


def _evaluation(state: TrainState, metrics: Path) -> dict[str, str]:
    """The last held-out loss up to the checkpoint, if the run's metrics exist."""
    if not metrics.is_file():
        return {}
    losses = [
        row
        for row in read_metrics(metrics)[0]
        if row.get("eval_loss") is not None and row["global_step"] <= state.global_step
    ]
    if not losses:
        return {}
    last = losses[-1]
    evaluation = {name.removeprefix("eval_"): value for name, value in last.items()}
    report = objective_of(state.identity).report(evaluation)
    return {name: f"{text}, after step {last['global_step']:,}" for name, text in report.items()}


def _lines(state: TrainState) -> dict[str, str]:
    names = {UNIGRAM_LOSS: "frequencies of the training text's tokens alone", NEIGHBOUR_LOSS: "counts of neighbours"}
    return {
        f"held-out loss from {text}": f"{state.lines[name]:.4f} nats per masked token"
        for name, text in names.items()
        if name in state.lines
    }


def _circumstances(record: dict[str, Any]) -> dict[str, str]:
    """What the run's `config.json` adds, as its last start wrote it; an earlier version's has less."""
    deepspeed, optimizer = ("deepspeed",), ("deepspeed", "optimizer", "params")
    rate = "lr" if value_at(record, (*optimizer, "adam_lr")) is None else "adam_lr"
    places: dict[str, tuple[str | int, ...]] = {
        "data folder": ("run", "data_dir"),
        "folder of the initial model": ("run", "init_from"),
        "optimizer": (*deepspeed, "optimizer", "type"),
        "peak learning rate": (*optimizer, rate),
        "peak rate of Muon": (*optimizer, "muon_lr"),
        "weight decay": (*optimizer, "weight_decay"),
        "attention": ("run", "attention"),
        "dropout": ("run", "model", "hidden_dropout_prob"),
        "initial attention": ("run", "initial_attention"),
        "initial bias of the head": ("run", "initial_bias"),
        "no weight decay of biases and LayerNorms": ("run", "no_decay_bias_and_norm"),
        "learning rate schedule": ("run", "schedule", "lr_scheduler_type"),
        "warm-up steps": ("run", "schedule", "warmup_steps"),
        "precision": ("precision",),
        "ZeRO stage": (*deepspeed, "zero_optimization", "stage"),
        "processes": ("batches", -1, "world_size"),
        **{name: ("versions", name) for name in record.get("versions") or {}},
        "commit of ds_roberta": ("commit",),
    }
    found = {name: value_at(record, place) for name, place in places.items()}
    if found["folder of the initial model"]:  # these are of random weights
        del found["initial attention"], found["initial bias of the head"]
    for name in ("data folder", "folder of the initial model"):
        found[name] = found[name] and Path(found[name]).name  # its parents are private
    return {name: str(value) for name, value in found.items() if value is not None}
