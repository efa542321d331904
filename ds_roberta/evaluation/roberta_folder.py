"""A transformers folder of a RoBERTa, opened for evaluation: weights and tokenizer, checked to belong together."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError

from ds_roberta.data.tokenizer import TokenizerInfo, check_text_is_kept
from ds_roberta.data.tokenizer_files import stated_length, training_tokenizer
from ds_roberta.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RobertaFolder:
    """A model in evaluation mode, and its tokenizer.

    Attributes:
        max_positions: the most tokens that a sequence may have, `<s>` and `</s>` included.
        max_seq_length: what the tokenizer truncates to, where it says so: an exported model's length in training. At
            most `max_positions`.
    """

    model: transformers.RobertaForMaskedLM
    tokenizer: tokenizers.Tokenizer
    special: TokenizerInfo
    max_positions: int
    max_seq_length: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    def log_likelihoods(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probabilities of tokens, in nats; the vocabulary's logits are computed at their positions alone.

        Args:
            input_ids: (B, T) int64, padded on the right: RoBERTa counts positions over what is not padding.
            attention_mask: (B, T) bool, false at padding; None where there is none.
            positions: (M,) int64, flat: b * T + t.
            labels: (M,) int64, the token at each.

        Returns:
            (M,) float32 on the CPU.

        Raises:
            UserError: one is not finite.
        """
        device = self.device
        mask = None if attention_mask is None else attention_mask.to(device)
        with torch.inference_mode():
            hidden = self.model.roberta(input_ids=input_ids.to(device), attention_mask=mask).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1).index_select(0, positions.to(device))).float()
            chosen = logits.gather(1, labels.to(device)[:, None])[:, 0]
            log_likelihoods = (chosen - logits.logsumexp(1)).cpu()
        if not bool(log_likelihoods.isfinite().all()):
            raise UserError(
                f"the log-probabilities of the model in {self.model.name_or_path!r} are not finite: its training has "
                "diverged or its weights are damaged; export an earlier checkpoint"
            )
        return log_likelihoods


def open_roberta(folder: Path, precision: str = "fp32") -> RobertaFolder:
    """Read a folder as `save_pretrained` writes it; the model goes to the GPU where there is one.

    Args:
        precision: a key of `PRECISIONS`.

    Raises:
        UserError: it is no such folder, not of RoBERTa's architecture, without masked-LM head, tokenizer or `<mask>`,
            or its parts do not fit together.
    """
    config = read_config(folder)
    special = TokenizerInfo.read(folder)
    pad_token_id, vocab_size = config.get("pad_token_id", 1), config.get("vocab_size", 0)
    if pad_token_id != special.pad_token_id or vocab_size < special.vocab_size:
        raise UserError(
            f"the tokenizer in {str(folder)!r} ({special.vocab_size} ids, <pad> is {special.pad_token_id}) is not the "
            f"model's ({vocab_size} ids, <pad> is {pad_token_id}): put the tokenizer that it was trained with there"
        )
    model = read_model(folder, PRECISIONS[precision])
    max_positions = model.config.max_position_embeddings - special.pad_token_id - 1
    return RobertaFolder(
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        read_tokenizer(folder),
        special,
        max_positions,
        min(max_positions, stated_length(folder) or max_positions),
    )


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder that `TokenizerInfo.read` accepts, without truncation and padding.

    Raises:
        UserError: `tokenizers` does not accept its file, or it would lose text.
    """
    tokenizer = training_tokenizer(folder)
    check_text_is_kept(tokenizer, folder)
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a RoBERTa's folder.

    Raises:
        UserError: there is none, or it is of another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"no model in {str(folder)!r} (config.json is missing): give a local transformers folder, such as "
            "launch/export_hf.py writes"
        )
    config = _read_json(path)
    if "model_type" not in config and "run" in config:
        raise UserError(f"{str(folder)!r} is a run's folder: give the model in it, such as {str(folder / 'hf')!r}")
    if config.get("model_type") != "roberta":
        raise UserError(
            f"the model in {str(folder)!r} is of the type {config.get('model_type')!r}: only 'roberta' is known here"
        )
    return config


def read_model(folder: Path, dtype: torch.dtype) -> transformers.RobertaForMaskedLM:
    """The model of a folder, on the CPU; of pickled weights nothing but tensors is read.

    Raises:
        UserError: there are no weights, they are damaged, or the masked-LM head is missing.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, report = transformers.RobertaForMaskedLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the pickled weights in {str(folder)!r} are damaged or hold more than tensors, which could run code: "
            "give model.safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the weights in {str(folder)!r} cannot be read ({error}): export or copy them again"
        ) from error
    if report["missing_keys"]:
        raise UserError(
            f"the model in {str(folder)!r} lacks {min(report['missing_keys'])!r}: give the folder of a pretrained "
            "RobertaForMaskedLM, which still has its head"
        )
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): export or copy the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a JSON object: export or copy the model again")
    return content
