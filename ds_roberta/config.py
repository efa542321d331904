"""The settings of a run, one frozen tree of dataclasses; what the DeepSpeed JSON owns is in `deepspeed_config`.

Nothing has two owners: batch sizes, precision, ZeRO, optimizer, peak learning rate, clipping and monitors are the
JSON's; model, data, masking, sequence length, schedule, intervals, seed and paths are here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError

LR_SCHEDULER_TYPES = ("linear", "polynomial", "cosine", "warmup_stable_decay")
LR_DECAY_TYPES = ("1-sqrt", "cosine", "linear")
LOSS_SPIKE_POLICIES = ("off", "warn", "stop", "rollback")
PAIR_FORMATS = ("segment-pair", "sentence-pair")
PACKING_FORMATS = ("full-sentences", "doc-sentences", "contiguous", *PAIR_FORMATS)
TORCH_COMPILE = ("auto", "on", "off")
OBJECTIVES = ("mlm", "rts")
MASKING_UNITS = ("token", "whole-word", "span")
SPECIAL_TOKENS_PER_SEQUENCE, SPECIAL_TOKENS_PER_PAIR = 2, 4
DEFAULT_DATA_DIR = Path("data/corpus")
DEFAULT_OUTPUT_ROOT = Path("runs")


@dataclass(frozen=True)
class ModelConfig:
    """The encoder's architecture, named as in transformers' `RobertaConfig`.

    Attributes:
        max_position_embeddings: rows of the table; positions begin behind the padding's, at `pad_token_id + 1`.
        intermediate_size: width of the MLP; 0 becomes four times the hidden size, as in every size of the paper.
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

    @property
    def max_length(self) -> int:
        """The most tokens that a sequence may have."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def __post_init__(self) -> None:
        if not self.intermediate_size:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Preset:
    """A size of model, with the recipe it is trained by where the command line says nothing else."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    max_seq_length: int
    max_steps: int
    warmup_steps: int


# base and large are the paper's (Liu et al. 2019, section 5 and appendix, table 9); tiny and small are for trials on
# one machine.
PRESETS = {
    "tiny": Preset(4, 256, 4, max_seq_length=128, max_steps=1_000, warmup_steps=60),
    "small": Preset(6, 512, 8, max_seq_length=512, max_steps=20_000, warmup_steps=1_200),
    "base": Preset(12, 768, 12, max_seq_length=512, max_steps=500_000, warmup_steps=24_000),
    "large": Preset(24, 1024, 16, max_seq_length=512, max_steps=500_000, warmup_steps=30_000),
}
_MIN_POSITIONS = 512


def model_config(
    model: str,
    vocab_size: int,
    max_seq_length: int,
    pad_token_id: int = 1,
    bos_token_id: int = 0,
    eos_token_id: int = 2,
    hidden_dropout_prob: float = 0.1,
    attention_probs_dropout_prob: float = 0.1,
) -> ModelConfig:
    """The architecture of a preset for a tokenizer and a sequence length.

    Positions begin behind the padding's, so there are `pad_token_id + 1` more of them than tokens in a sequence.
    """
    preset = PRESETS[model]
    return ModelConfig(
        vocab_size=vocab_size,
        num_hidden_layers=preset.num_hidden_layers,
        hidden_size=preset.hidden_size,
        num_attention_heads=preset.num_attention_heads,
        max_position_embeddings=max(_MIN_POSITIONS, max_seq_length) + pad_token_id + 1,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
    )


@dataclass(frozen=True)
class PackingConfig:
    """Which slices of the documents are the sequences."""

    max_seq_length: int
    format: str = "full-sentences"

    def __post_init__(self) -> None:
        require_one_of("--packing", self.format, PACKING_FORMATS)
        shortest = SPECIAL_TOKENS_PER_PAIR + 2 if self.is_paired else SPECIAL_TOKENS_PER_SEQUENCE + 1
        if self.max_seq_length < shortest:
            raise UserError(f"--max_seq_length must be at least {shortest}, got {self.max_seq_length}")

    @property
    def is_paired(self) -> bool:
        """Whether a sequence is two segments, `<s> A </s></s> B </s>`."""
        return self.format in PAIR_FORMATS

    @property
    def capacity(self) -> int:
        """Tokens of a sequence but for the special ones that frame it and divide a pair."""
        return self.max_seq_length - (SPECIAL_TOKENS_PER_PAIR if self.is_paired else SPECIAL_TOKENS_PER_SEQUENCE)


@dataclass(frozen=True)
class MaskingConfig:
    """What is masked, and how much; shares are named as in transformers' `DataCollatorForLanguageModeling`.

    Attributes:
        mlm_probability_end: where given, the share moves from `mlm_probability` at the run's first step in a straight
            line to this at its last.
        unit: what is chosen as a whole; see `ds_roberta.data.masking`.
        copies: fixed masks of each sequence, one an epoch by turns; where None, each epoch has its own.
    """

    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    mlm_probability_end: float | None = None
    unit: str = "token"
    copies: int | None = None

    def __post_init__(self) -> None:
        require_one_of("--masking", self.unit, MASKING_UNITS)
        if self.copies is not None:
            require_positive("--masking_copies", self.copies)
            if self.mlm_probability_end is not None:
                raise UserError(
                    "--masking_copies fixes the masks, --mlm_probability_end moves their share: remove one of them"
                )
        for name, share in (("mlm_probability", self.mlm_probability), ("mlm_probability_end", self.final_probability)):
            if not 0 < share < 1:
                raise UserError(f"--{name} must be between 0 and 1, got {share}")
        replaced = self.mask_replace_prob + self.random_replace_prob
        if min(self.mask_replace_prob, self.random_replace_prob) < 0 or replaced > 1:
            raise UserError(
                "mask_replace_prob and random_replace_prob must not be negative and add up to at most 1, got "
                f"{self.mask_replace_prob} and {self.random_replace_prob}"
            )

    @property
    def final_probability(self) -> float:
        """The share at the end of the run, by which it is evaluated too."""
        return self.mlm_probability if self.mlm_probability_end is None else self.mlm_probability_end


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and shape of its learning rate, in optimizer steps; see `training.schedule.learning_rate`.

    The options of a shape are None where the type has no use for them; where it has, None becomes the default.

    Attributes:
        lr_scheduler_type: named as in transformers' `SchedulerType`.
        lr_power: exponent of "polynomial"; 1 by default, a straight line.
        min_lr_ratio: where the decay ends, as a share of the peak; 0 by default. Not for "linear".
        decay_steps: the last steps, in which "warmup_stable_decay" decays; a tenth of the run by default, which
            Hu et al. (2024, MiniCPM, arXiv:2404.06395, section 4) found enough.
        decay_type: shape of that decay; "1-sqrt" by default, the best of those that Hägele et al. (2024,
            arXiv:2405.18392) compared.
    """

    max_steps: int
    warmup_steps: int
    lr_scheduler_type: str = "linear"
    lr_power: float | None = None
    min_lr_ratio: float | None = None
    decay_steps: int | None = None
    decay_type: str | None = None

    def __post_init__(self) -> None:
        require_positive("--max_steps", self.max_steps)
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise UserError(
                f"--warmup_steps must be from 0 to max_steps ({self.max_steps}), got {self.warmup_steps}: give both"
            )
        require_one_of("--lr_scheduler_type", self.lr_scheduler_type, LR_SCHEDULER_TYPES)
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
        if self.lr_power is not None and not 0 < self.lr_power < math.inf:
            raise UserError(f"--lr_power must be a positive number, got {self.lr_power}")
        if self.min_lr_ratio is not None and not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"--min_lr_ratio must be from 0 to 1, got {self.min_lr_ratio}")
        if self.decay_steps is not None and not 0 <= self.decay_steps <= longest_decay:
            raise UserError(
                f"--decay_steps must be from 0 to max_steps - warmup_steps ({longest_decay}), got {self.decay_steps}"
            )
        if self.decay_type is not None:
            require_one_of("--decay_type", self.decay_type, LR_DECAY_TYPES)


@dataclass(frozen=True)
class Stage:
    """Steps that share the length of their sequences and their number.

    Attributes:
        first_step: counted from 0; the stage lasts until the next one begins.
    """

    first_step: int
    max_seq_length: int
    train_batch_size: int


@dataclass(frozen=True)
class GuardConfig:
    """What is done about a spike of the loss; see `ds_roberta.training.guard`.

    Attributes:
        loss_spike_threshold: how far a loss may lie above the median of the steps before, in robust standard
            deviations; 10 by default, None where nothing is watched.
    """

    loss_spike: str = "warn"
    loss_spike_threshold: float | None = None

    def __post_init__(self) -> None:
        require_one_of("--loss_spike", self.loss_spike, LOSS_SPIKE_POLICIES)
        if self.loss_spike == "off":
            if self.loss_spike_threshold is not None:
                raise UserError("--loss_spike_threshold does nothing with --loss_spike off: remove it")
            return
        if self.loss_spike_threshold is None:
            object.__setattr__(self, "loss_spike_threshold", 10.0)
        elif not 0 < self.loss_spike_threshold < math.inf:
            raise UserError(f"--loss_spike_threshold must be a positive number, got {self.loss_spike_threshold}")


@dataclass(frozen=True)
class IntervalConfig:
    """How often things happen, in optimizer steps."""

    save_interval: int = 1_000
    eval_interval: int = 1_000
    log_interval: int = 1
    keep_last: int = 3
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                require_positive(f"--{name}", value)


@dataclass(frozen=True)
class RunConfig:
    """All that the command line decides."""

    data_dir: Path
    output_dir: Path
    model_name: str
    """The preset's name, or that of the folder that the run begins with."""
    model: ModelConfig
    packing: PackingConfig
    schedule: ScheduleConfig
    stages: tuple[Stage, ...]
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    source_weights: dict[str, int] | None = None
    """Of each source's sequences, by its name; where None, every sequence is trained on equally often."""
    seed: int = 0
    eval_sequences: int = 2_048
    resume: str = "auto"
    save_deepspeed_checkpoint: bool = False
    torch_compile: str = "auto"
    no_decay_bias_and_norm: bool = False
    """Whether the JSON's weight decay leaves out biases and LayerNorms."""
    objective: str = "mlm"
    """Of `OBJECTIVES`: masked language modelling, or random token substitution."""
    init_from: Path | None = None
    """The model that a fresh run begins with, instead of random weights."""

    def __post_init__(self) -> None:
        require_positive("--eval_sequences", self.eval_sequences)
        require_one_of("--torch_compile", self.torch_compile, TORCH_COMPILE)
        require_one_of("--objective", self.objective, OBJECTIVES)
        if self.objective == "rts" and self.packing.is_paired:
            raise UserError(
                f"--objective rts has no next sentence prediction, which --packing {self.packing.format} is for: use "
                "another packing, or --objective mlm"
            )
        if not 0 <= self.seed < 2**63:  # torch's generators take no more
            raise UserError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.stages[-1].first_step >= self.schedule.max_steps:
            raise UserError(
                f"a schedule changes at step {self.stages[-1].first_step}, which --max_steps {self.schedule.max_steps} "
                "does not reach: shorten the schedule or raise it"
            )

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in tree.items()}


def require_positive(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive whole number, got {value!r}")


def require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise `UserError` unless `value` is known."""
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
