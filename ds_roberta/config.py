"""Groups of a run's settings; `training.settings` joins them into `RunConfig`.

Each setting has one owner: batch sizes, precision, ZeRO, optimizer, peak learning rate, clipping and monitors belong to
the DeepSpeed JSON (`deepspeed_config`); model, data, masking, sequence length, schedule, intervals, seed and paths
belong to these dataclasses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.options import (
    Settings,
    option,
    require_open_share,
    require_positive,
    require_positive_number,
    require_share,
)

LR_SCHEDULER_TYPES = ("linear", "polynomial", "cosine", "warmup_stable_decay")
LR_DECAY_TYPES = ("1-sqrt", "cosine", "linear")
LOSS_SPIKE_POLICIES = ("off", "warn", "stop", "rollback")
LOSS_PLATEAU_POLICIES = ("off", "warn", "stop")
PAIR_FORMATS = ("segment-pair", "sentence-pair")
PACKED_ACROSS_DOCUMENTS = ("full-sentences", "contiguous")
PACKING_FORMATS = ("full-sentences", "doc-sentences", "contiguous", *PAIR_FORMATS)
MASKING_UNITS = ("token", "whole-word", "span")
SPECIAL_TOKENS_PER_SEQUENCE, SPECIAL_TOKENS_PER_PAIR = 2, 4
EVAL_SEQUENCES = 2_048
MODEL_TYPES = {"roberta": "Roberta", "camembert": "Camembert", "xlm-roberta": "XLMRoberta"}
"""transformers' types of models with RoBERTa's architecture, and how the names of their classes begin."""


def class_name(model_type: str, of_roberta: str) -> str:
    """transformers' name of the class that corresponds to one of RoBERTa's, such as `RobertaForMaskedLM`."""
    return MODEL_TYPES[model_type] + of_roberta.removeprefix(MODEL_TYPES["roberta"])


@dataclass(frozen=True)
class ModelConfig:
    """The encoder's architecture, named as in transformers' `RobertaConfig`.

    Attributes:
        max_position_embeddings: rows of the position table; a sequence's first token is at `pad_token_id + 1`.
        intermediate_size: width of the MLP; 0 becomes four times the hidden size, as in every size of the paper.
        hidden_act: the MLP's activation, one of `model.encoder.ACTIVATIONS`.
        model_type: one of `MODEL_TYPES`; it decides only as which of transformers' classes the model is exported.
    """

    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int = 514
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    type_vocab_size: int = 1
    intermediate_size: int = 0
    hidden_act: str = "gelu"
    model_type: str = "roberta"

    @property
    def max_length(self) -> int:
        """The maximum number of tokens in a sequence."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def __post_init__(self) -> None:
        if not self.intermediate_size:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Preset:
    """A model size and its default training recipe."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    max_seq_length: int
    max_steps: int
    warmup_steps: int


# base and large are the paper's (Liu et al. 2019, section 5 and appendix, table 9); tiny and small are for trials on
# one machine; nano, as large as BERT-Tiny (Turc et al. 2019, arXiv:1908.08962), learns most in minutes on a CPU.
PRESETS = {
    "nano": Preset(2, 128, 2, max_seq_length=128, max_steps=2_000, warmup_steps=120),
    "tiny": Preset(4, 256, 4, max_seq_length=128, max_steps=1_000, warmup_steps=60),
    "small": Preset(6, 512, 8, max_seq_length=512, max_steps=20_000, warmup_steps=1_200),
    "base": Preset(12, 768, 12, max_seq_length=512, max_steps=500_000, warmup_steps=24_000),
    "large": Preset(24, 1024, 16, max_seq_length=512, max_steps=500_000, warmup_steps=30_000),
}
_MIN_POSITIONS = 512


def model_config(model: str, vocab_size: int, max_seq_length: int, pad_token_id: int = 1, **others: Any) -> ModelConfig:
    """The architecture of a preset for a tokenizer and a sequence length.

    Positions are counted from `pad_token_id + 1`, so the table has that many more rows than a sequence has tokens.

    Args:
        others: further fields of `ModelConfig`.
    """
    preset = PRESETS[model]
    return ModelConfig(
        vocab_size=vocab_size,
        num_hidden_layers=preset.num_hidden_layers,
        hidden_size=preset.hidden_size,
        num_attention_heads=preset.num_attention_heads,
        max_position_embeddings=max(_MIN_POSITIONS, max_seq_length) + pad_token_id + 1,
        pad_token_id=pad_token_id,
        **others,
    )


@dataclass(frozen=True)
class PackingConfig(Settings):
    """Packing of documents into sequences."""

    max_seq_length: int = option(
        "tokens per sequence (default: 512, nano and tiny 128; less if the model has fewer positions; with --init_from "
        "the length that it was trained with)"
    )
    format: str = option("how documents become sequences", "full-sentences", name="packing", choices=PACKING_FORMATS)

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = SPECIAL_TOKENS_PER_PAIR + 2 if self.is_paired else SPECIAL_TOKENS_PER_SEQUENCE + 1
        if self.max_seq_length < shortest:
            raise UserError(f"--max_seq_length must be at least {shortest}, got {self.max_seq_length}")

    @property
    def is_paired(self) -> bool:
        """Whether a sequence is two segments, `<s> A </s></s> B </s>`."""
        return self.format in PAIR_FORMATS

    @property
    def capacity(self) -> int:
        """Tokens of a sequence, not counting the special tokens that frame it and divide a pair."""
        return self.max_seq_length - (SPECIAL_TOKENS_PER_PAIR if self.is_paired else SPECIAL_TOKENS_PER_SEQUENCE)


@dataclass(frozen=True)
class MaskingConfig(Settings):
    """Masking options; the probabilities are named as in transformers' `DataCollatorForLanguageModeling`.

    Attributes:
        mlm_probability_end: if given, the share moves linearly from `mlm_probability` to this over the run.
        eval_mlm_probability: of held-out sequences; None: the share at the end of the run.
        unit: see `ds_roberta.data.masking`.
        copies: number of fixed masks per sequence, used in turn, one per epoch; None: new masks in every epoch.
    """

    mlm_probability: float = option("share of the tokens to mask", 0.15, check=require_open_share)
    mask_replace_prob: float = option("share of these that the mask token replaces", 0.8, check=require_share)
    random_replace_prob: float = option(
        "share of these that random tokens replace; the others stay", 0.1, check=require_share
    )
    mlm_probability_end: float | None = option(
        "share at the last step, reached linearly (default: no change)", None, check=require_open_share
    )
    eval_mlm_probability: float | None = option(
        "share in held-out sequences (default: that of the last step)", None, check=require_open_share
    )
    unit: str = option("what is masked as a whole", "token", name="masking", choices=MASKING_UNITS)
    copies: int | None = option(
        "static masking: number of fixed masks per sequence, used in turn; BERT had 10 (default: dynamic)",
        None,
        name="masking_copies",
        check=require_positive,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies is not None and self.mlm_probability_end is not None:
            raise UserError(
                "--masking_copies fixes the masks, --mlm_probability_end moves their share: remove one of them"
            )
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise UserError(
                "--mask_replace_prob and --random_replace_prob must add up to at most 1, got "
                f"{self.mask_replace_prob} and {self.random_replace_prob}"
            )

    @property
    def final_probability(self) -> float:
        """The share at the end of the run."""
        return self.mlm_probability if self.mlm_probability_end is None else self.mlm_probability_end

    @property
    def held_out_probability(self) -> float:
        """The share in held-out sequences."""
        return self.final_probability if self.eval_mlm_probability is None else self.eval_mlm_probability

    @property
    def largest_probability(self) -> float:
        """The largest share in any sequence of a run."""
        return max(self.mlm_probability, self.final_probability, self.held_out_probability)


def step_number(name: str, text: int | str, max_steps: int) -> int:
    """A number of steps, given as such or as a percent of the run, which is rounded down to a whole step.

    Args:
        name: the option's, for the error.

    Raises:
        UserError: it is neither.
    """
    matched = re.fullmatch(r"(-?\d+)|(\d+(?:\.\d+)?)%", str(text))
    if matched is None:
        raise UserError(f"{name} must be a number of steps, or a percent of the run such as 6%, got {text!r}")
    steps, percent = matched.groups()
    return int(steps) if steps else int(Fraction(percent) * max_steps / 100)


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Steps and learning rate; see `training.optimizer.learning_rate`.

    Options that the schedule's type does not use are None; for the others, None is replaced by the default.

    Attributes:
        lr_scheduler_type: named as in transformers' `SchedulerType`.
        lr_power: 1, the default, gives a straight line.
        min_lr_ratio: not used by "linear".
        decay_steps: a tenth of the run by default, which Hu et al. (2024, MiniCPM, arXiv:2404.06395, section 4) found
            enough.
        decay_type: "1-sqrt" by default, the best of those that Hägele et al. (2024, arXiv:2405.18392) compared.
    """

    max_steps: int = option("optimizer steps of the run (default: depends on the model's size)", check=require_positive)
    warmup_steps: int = option(
        "steps of linear warm-up, or a percentage of the run such as 6%% (default: 6%%, base 4.8%%)", type=str
    )
    lr_scheduler_type: str = option(
        "shape of the learning rate after the warm-up", "linear", choices=LR_SCHEDULER_TYPES
    )
    lr_power: float | None = option(
        "exponent of the polynomial decay (default: 1)", None, check=require_positive_number
    )
    min_lr_ratio: float | None = option(
        "final rate of polynomial, cosine and warmup_stable_decay, as a share of the peak (default: 0)",
        None,
        check=require_share,
    )
    decay_steps: int | None = option(
        "number of final steps, or percentage of the run, in which warmup_stable_decay decays (default: 10%%)",
        None,
        type=str,
    )
    decay_type: str | None = option(
        "shape of the decay of warmup_stable_decay (default: 1-sqrt)", None, choices=LR_DECAY_TYPES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise UserError(
                f"--warmup_steps must be from 0 to max_steps ({self.max_steps}), got {self.warmup_steps}: give both"
            )
        longest_decay = self.max_steps - self.warmup_steps
        used: dict[str, dict[str, Any]] = {
            "linear": {},
            "polynomial": {"lr_power": 1.0, "min_lr_ratio": 0.0},
            "cosine": {"min_lr_ratio": 0.0},
            "warmup_stable_decay": {
                "min_lr_ratio": 0.0,
                "decay_steps": min(-(-self.max_steps // 10), longest_decay),
                "decay_type": "1-sqrt",
            },
        }
        for name in ("lr_power", "min_lr_ratio", "decay_steps", "decay_type"):
            value, defaults = getattr(self, name), used[self.lr_scheduler_type]
            if value is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                raise UserError(f"--{name} does nothing with --lr_scheduler_type {self.lr_scheduler_type}: remove it")
        if self.decay_steps is not None and not 0 <= self.decay_steps <= longest_decay:
            raise UserError(
                f"--decay_steps must be from 0 to max_steps - warmup_steps ({longest_decay}), got {self.decay_steps}"
            )


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with the same sequence length and batch size.

    Attributes:
        first_step: counted from 0; the stage lasts until the next one begins.
    """

    first_step: int
    max_seq_length: int
    train_batch_size: int


@dataclass(frozen=True)
class GuardConfig(Settings):
    """Loss spikes and plateaus, and what to do about them; see `training.loss_spikes` and `training.loss_plateau`.

    Attributes:
        loss_spike_threshold: None if the loss is not checked for spikes.
    """

    loss_spike: str = option("what to do about a loss spike", "warn", choices=LOSS_SPIKE_POLICIES)
    loss_spike_threshold: float | None = option(
        "a spike is this many robust standard deviations above the recent median (default: 10)",
        None,
        check=require_positive_number,
    )
    loss_plateau: str = option(
        "what to do if a masked LM's held-out loss stalls after 30%% of the run",
        "warn",
        choices=LOSS_PLATEAU_POLICIES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_spike == "off":
            if self.loss_spike_threshold is not None:
                raise UserError("--loss_spike_threshold does nothing with --loss_spike off: remove it")
        elif self.loss_spike_threshold is None:
            object.__setattr__(self, "loss_spike_threshold", 10.0)


@dataclass(frozen=True)
class IntervalConfig(Settings):
    """Intervals, in optimizer steps."""

    save_interval: int = option("steps between checkpoints", 1_000, check=require_positive)
    eval_interval: int = option("steps between evaluations on the held-out split", 1_000, check=require_positive)
    log_interval: int = option("steps between rows of metrics.jsonl", 1, check=require_positive)
    keep_last: int = option(
        "number of newest checkpoints to keep; the one with the lowest held-out loss is also kept",
        3,
        check=require_positive,
    )
    keep_every: int | None = option(
        "also keep the checkpoint of every multiple of this many steps (default: none)", None, check=require_positive
    )
