"""A transformers folder with a RoBERTa model, opened for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

from ds_roberta.data.tokenizer_files import training_tokenizer
from ds_roberta.errors import UserError
from ds_roberta.model.kernels import set_gpu_arithmetic
from ds_roberta.process import keep_freed_memory
from ds_roberta.transformers_folder import TransformersFolder, open_folder, read_model

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RobertaFolder(TransformersFolder):
    """A folder with its model, in evaluation mode, and its tokenizer, as training uses it."""

    model: transformers.RobertaForMaskedLM
    tokenizer: tokenizers.Tokenizer

    def log_likelihoods(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probabilities of tokens, in nats; what follows the last layer's attention is computed only at their
        positions.

        Args:
            input_ids: (B, T) int64, padded on the right: RoBERTa counts positions over what is not padding.
            attention_mask: (B, T) bool, false at padding; None if there is none.
            positions: (M,) int64, flat: b * T + t.
            labels: (M,) int64, the token at each.

        Returns:
            (M,) float32 on the CPU.

        Raises:
            UserError: a log-probability is not finite.
        """
        device = self.model.device
        mask = None if attention_mask is None else attention_mask.to(device)
        with torch.inference_mode(), self._last_layer_only_at(positions.to(device)):
            hidden = self.model.roberta(input_ids=input_ids.to(device), attention_mask=mask).last_hidden_state
            logits = self.model.lm_head(hidden[0]).float()
            chosen = logits.gather(1, labels.to(device)[:, None])[:, 0]
            log_likelihoods = (chosen - logits.logsumexp(1)).cpu()
        if not bool(log_likelihoods.isfinite().all()):
            raise UserError(
                f"the log-probabilities of the model in {str(self.path)!r} are not finite: its training has "
                "diverged or its weights are damaged; export an earlier checkpoint"
            )
        return log_likelihoods

    @contextmanager
    def _last_layer_only_at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within it the encoder's output is (1, M, D): that of these M flat positions, which attend to all others."""

        def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(states.flatten(0, 1).index_select(0, positions)[None] for states in inputs)

        # The first module of a layer that treats positions apart; its inputs are the attention's output and input.
        hook = self.model.roberta.encoder.layer[-1].attention.output.register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()


def open_roberta(folder: Path, precision: str = "fp32") -> RobertaFolder:
    """Read a folder with a masked-LM head; the model goes to the GPU if there is one.

    Args:
        precision: a key of `PRECISIONS`.

    Raises:
        UserError: as `open_folder` and `read_model`.
    """
    set_gpu_arithmetic()
    keep_freed_memory()
    opened = open_folder(folder)
    model = read_model(folder, transformers.RobertaForMaskedLM, PRECISIONS[precision])
    return RobertaFolder(
        **vars(opened),
        model=model.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        tokenizer=training_tokenizer(folder),
    )
