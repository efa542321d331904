"""Random token substitution: some tokens give way to random ones, and every token is asked whether it did.

Which tokens are chosen, and by which units, is as in masking (`ds_roberta.data.masking`), a pure function of the same
numbers. What takes their place is drawn evenly from the ordinary tokens (Di Liello et al. 2022, "Effective Pretraining
Objectives for Transformer-based Autoencoders", Findings of EMNLP: random token substitution), where ELECTRA (Clark et
al. 2020) asks a second model. A token that is drawn for itself counts as not replaced, as in ELECTRA (section 2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ds_roberta.config import MaskingConfig
from ds_roberta.data.masking import Masker


class Substituter(Masker):
    """A `Masker` that puts random tokens at all chosen positions, and labels all ordinary tokens."""

    def __init__(self, config: MaskingConfig, *arguments: Any):
        super().__init__(replace(config, mask_replace_prob=0.0, random_replace_prob=1.0), *arguments)

    def mask(
        self, input_ids: np.ndarray, places: np.ndarray, mlm_probability: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace tokens, in place; arguments as of `Masker.mask`.

        Returns:
            Flat positions of all tokens that are not special, rising, and 1 where the token is another than it was,
            else 0: two (M,) int64.
        """
        original = input_ids.copy()
        super().mask(input_ids, places, mlm_probability)
        ordinary = np.flatnonzero(~self._specials(original))
        return ordinary, (input_ids != original).reshape(-1)[ordinary].astype(np.int64)
