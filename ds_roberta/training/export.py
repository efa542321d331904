"""From a checkpoint to a transformers folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_roberta.config import ModelConfig
from ds_roberta.distributed import logger
from ds_roberta.model.export import export
from ds_roberta.model.objectives import NEXT_SENTENCE_HEAD, SUBSTITUTION_HEAD
from ds_roberta.training import checkpoint
from ds_roberta.training.model_card import model_card


def export_checkpoint(folder: Path, output: Path, best: bool = False) -> None:
    """Export a checkpoint, or a run's newest good one or best one, whatever ZeRO stage and world size wrote it.

    Raises:
        UserError: there is no good checkpoint, the exported model's logits differ, or `output` cannot be written.
    """
    path = checkpoint.best(folder) if best else checkpoint.newest(folder)
    state = checkpoint.read_state(path)
    config = ModelConfig(**state.identity["model"])
    heads = (NEXT_SENTENCE_HEAD, SUBSTITUTION_HEAD)
    weights = {name: weight for name, weight in checkpoint.weights(path).items() if not name.startswith(heads)}
    difference = export(
        config,
        weights,
        path / checkpoint.TOKENIZER_FOLDER,
        state.trained_length,
        output,
        model_card(config, state, sum(map(torch.Tensor.numel, weights.values())), path),
    )
    without, compared = "", "logits"
    if state.identity.get("next_sentence_prediction"):
        without = ", without the head of next sentence prediction"
    if state.identity.get("objective") == "rts":
        without, compared = ", the encoder alone", "hidden states"
    logger.info(f"exported {path} to {output}{without}; its {compared} equal transformers' within {difference:.1g}")
