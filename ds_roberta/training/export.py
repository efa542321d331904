"""From a checkpoint to a transformers folder."""

from __future__ import annotations

from pathlib import Path

from ds_roberta.config import ModelConfig
from ds_roberta.distributed import logger
from ds_roberta.model.export import compared_outputs, export, known_to_transformers
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
    weights = checkpoint.weights(path)
    left_out = {name.split(".")[0]: weights.pop(name) for name in list(weights) if not known_to_transformers(name)}
    difference = export(
        config,
        weights,
        path / checkpoint.TOKENIZER_FOLDER,
        state.trained_length,
        output,
        model_card(config, state, weights, path),
    )
    without = f", without {' and '.join(left_out)}" if left_out else ""
    compared = compared_outputs(weights)
    logger.info(f"exported {path} to {output}{without}; its {compared} equal transformers' within {difference:.1g}")
