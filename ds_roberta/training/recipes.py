"""Recipes: a DeepSpeed JSON and values of options that go together; `--recipe` names one.

Every value is only a default: an option on the command line takes its place, and `--deepspeed_config` that of the JSON
with its batch, optimizer and rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_roberta.model.initialization import FREQUENCIES, NEIGHBOURS
from ds_roberta.model.objectives import OBJECTIVES

_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@dataclass(frozen=True)
class Recipe:
    """What a recipe sets.

    Attributes:
        deepspeed_config: the JSON: batch, optimizer, clipping.
        options: values by the options' names.
        optimizer_params: values of the JSON's `optimizer.params` by the model's width: those of the largest width that
            does not exceed the model's apply.
    """

    deepspeed_config: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_params: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def options_beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of options that are not given, and that mean something beside those that are.

        Args:
            given: values by all options' names, None for those that are not given.
        """
        values = dict(self.options)
        if given["lr_scheduler_type"] not in (None, values.get("lr_scheduler_type")):
            for name in ("decay_steps", "decay_type"):
                values.pop(name, None)
        if given["init_from"] is not None:
            values.pop("initial_attention", None)
        predicts_tokens = given["objective"] in {each.name for each in OBJECTIVES if each.predicts_tokens}
        if given["init_from"] is not None or not predicts_tokens:
            values.pop("initial_bias", None)
        if not predicts_tokens:
            for name in ("mlm_probability", "eval_mlm_probability"):
                values.pop(name, None)
        return {name: value for name, value in values.items() if given[name] is None}

    def params_for(self, hidden_size: int) -> Mapping[str, float]:
        """The values of `optimizer.params` for a model of this width, in place of the JSON's."""
        widths = sorted(self.optimizer_params)
        fitting = [width for width in widths if width <= hidden_size] or widths[:1]
        return self.optimizer_params[fitting[-1]] if fitting else {}


RECIPES = {
    # Liu et al. 2019: the defaults of all options are theirs.
    "paper": Recipe(_CONFIGS / "zero2.json"),
    "fast": Recipe(
        _CONFIGS / "fast.json",
        {
            "initial_attention": NEIGHBOURS,
            "initial_bias": FREQUENCIES,
            "packing": "contiguous",
            "mlm_probability": 0.4,
            "eval_mlm_probability": 0.15,  # the paper's share, so that losses can be compared
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "warmup_steps": "6%",
            "lr_scheduler_type": "warmup_stable_decay",
            "decay_type": "linear",
            "decay_steps": "60%",
        },
        optimizer_params={
            128: {"muon_lr": 0.01, "adam_lr": 2e-3},
            256: {"muon_lr": 0.01, "adam_lr": 2e-3},
            512: {"muon_lr": 0.01, "adam_lr": 1e-3},
            768: {"muon_lr": 0.01, "adam_lr": 6e-4},
            1024: {"muon_lr": 0.01, "adam_lr": 4e-4},
        },
    ),
}
OPTIONS_OF_RECIPES = frozenset({name for recipe in RECIPES.values() for name in recipe.options})
"""Names of the options that a recipe may set: those that are not given must stay None until it is known."""
