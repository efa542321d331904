"""Export of our parameters as a transformers folder, which is checked before it appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from ds_roberta.config import ModelConfig, class_name
from ds_roberta.data.tokenizer_files import write_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.files import TOKENIZER_FILES, holds_only, replaced_folder
from ds_roberta.model.encoder import RobertaModel
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.model.weights import first_not_finite, is_finite
from ds_roberta.transformers_folder import check_tokenizer, parameters_by_name, quiet, read_model

MODEL_CARD = "README.md"
CARD_SIGNATURE = "pretrained with ds_roberta"
PARITY_TOLERANCE = 1e-6
"""Largest difference of float64 logits between our model and transformers' that still counts as the same model, as a
share of the largest logit (or of 1, if all are smaller): rounding grows with the numbers."""

_DIVERGED = "the training has diverged, nothing was written; export an earlier checkpoint"
KIND = "an exported model without other files"
ENCODER, MASKED_LM_HEAD = "roberta.", "lm_head."
"""The prefixes, in our names, of the parameters that transformers' models have too."""


def hf_config(config: ModelConfig) -> transformers.RobertaConfig:
    """The configuration as transformers has it, of the class that belongs to the model's type."""
    values = asdict(config)
    config_class = getattr(transformers, class_name(values.pop("model_type"), "RobertaConfig"))
    # transformers 5 ignores the type of positions, but vLLM takes the tokenizer's length only where it is stated.
    return config_class(**values, tie_word_embeddings=True, position_embedding_type="absolute")


def to_transformers(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """A transformers model with our weights: `RobertaForMaskedLM`, or `RobertaModel` if they have no masked-LM head; of
    another type, the class that corresponds to it.

    Raises:
        UserError: a parameter is missing, unexpected or of another shape.
    """
    if has_masked_lm_head(weights):
        model = getattr(transformers, class_name(config.model_type, "RobertaForMaskedLM"))(hf_config(config))
        expected = parameters_by_name(model)
    else:
        encoder_class = getattr(transformers, class_name(config.model_type, "RobertaModel"))
        model = encoder_class(hf_config(config), add_pooling_layer=False)
        expected = {f"{ENCODER}{name}": parameter for name, parameter in model.named_parameters()}
    different = sorted(set(expected) ^ set(weights)) or [
        name for name, parameter in expected.items() if parameter.shape != weights[name].shape
    ]
    if different:
        raise UserError(f"the weights do not fit the model's configuration; the first that differs is {different[0]!r}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])
    return model.eval()


def known_to_transformers(name: str) -> bool:
    """Whether a parameter belongs to the encoder or the masked-LM head: other heads are not exported."""
    return name.startswith((ENCODER, MASKED_LM_HEAD))


def has_masked_lm_head(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights, by parameter name, have transformers' `lm_head`."""
    return any(name.startswith(MASKED_LM_HEAD) for name in weights)


def compared_outputs(weights: Mapping[str, torch.Tensor]) -> str:
    """What `check_parity` compares, in words."""
    return "logits" if has_masked_lm_head(weights) else "hidden states"


def check_parity(config: ModelConfig, weights: Mapping[str, torch.Tensor], hf_model: torch.nn.Module) -> float:
    """The largest difference between our logits and transformers', as a share, on random ids with padding.

    First transformers' logits are computed in fp32, as users do: finite weights may be so large that the logits are
    not finite. Then both are computed in float64, because sharp attention can amplify some machines' fp32 rounding
    beyond any tolerance; `hf_model` stays in float64.

    Without a masked-LM head, hidden states are compared instead.

    Raises:
        UserError: the difference is above `PARITY_TOLERANCE` or NaN, or the fp32 logits are not finite.
    """
    ours: MaskedLM | RobertaModel
    if has_masked_lm_head(weights):
        ours = MaskedLM(config)
        ours.load_state_dict(weights)
    else:
        ours = RobertaModel(config)
        ours.load_state_dict({name.removeprefix(ENCODER): weights[name] for name in weights})
    ours.double().eval()
    compared = compared_outputs(weights)
    length = min(64, config.max_position_embeddings - config.pad_token_id - 1)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    input_ids[input_ids == config.pad_token_id] = config.bos_token_id
    attention_mask = torch.ones(2, length, dtype=torch.bool)
    attention_mask[1, length // 2 :] = False
    input_ids[~attention_mask] = config.pad_token_id
    positions = attention_mask.flatten().nonzero().flatten()
    with torch.no_grad():
        in_fp32 = hf_model(input_ids=input_ids, attention_mask=attention_mask)[0].flatten(0, 1)[positions]
        if not is_finite(in_fp32):
            raise UserError(f"the model's {compared} are not finite in fp32: {_DIVERGED}")
        hf_model.double()
        if isinstance(ours, MaskedLM):
            mine = ours.logits(input_ids, attention_mask, positions)
        else:
            mine = ours(input_ids, attention_mask).flatten(0, 1)[positions]
        theirs = hf_model(input_ids=input_ids, attention_mask=attention_mask)[0].flatten(0, 1)[positions]
    difference = (mine - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    if not difference <= PARITY_TOLERANCE:
        raise UserError(
            f"the exported model's {compared} differ from the training model's by {difference:.3g} of the largest "
            f"(more than {PARITY_TOLERANCE:g}): nothing was written"
        )
    return difference


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds an exported model with its card and nothing else, which another export may replace."""
    card = folder / MODEL_CARD
    if not card.is_file() or not holds_only(folder, TOKENIZER_FILES | {"config.json", "model.safetensors", MODEL_CARD}):
        return False
    return CARD_SIGNATURE in card.read_text(encoding="utf-8", errors="replace")


def export(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    tokenizer_folder: Path,
    max_seq_length: int,
    output: Path,
    model_card: str,
) -> float:
    """Write a transformers folder (`config.json`, `model.safetensors`, tokenizer), completely or not at all.

    Args:
        weights: fp32 parameters by name.
        max_seq_length: the length that the tokenizer truncates to.
        model_card: the text of `README.md`; with `CARD_SIGNATURE` in it another export may replace the folder.

    Returns:
        The largest difference of logits in the parity check, as a share.

    Raises:
        UserError: the weights do not fit or are not finite, the logits are not finite or differ, the tokenizer differs,
            or the folder cannot be written.
    """
    if (name := first_not_finite(weights.items())) is not None:
        raise UserError(f"{name!r} is not finite: {_DIVERGED}")
    hf_model = to_transformers(config, weights)
    # Read back what was written: the files are checked, not the object they came from.
    with replaced_folder(output, is_model_folder, KIND) as temporary:
        with quiet():
            hf_model.save_pretrained(temporary)
        write_tokenizer(tokenizer_folder, temporary, max_seq_length)
        check_tokenizer(temporary, tokenizer_folder)
        (temporary / MODEL_CARD).write_text(model_card, encoding="utf-8")
        return check_parity(config, weights, read_model(temporary, type(hf_model)).eval())
