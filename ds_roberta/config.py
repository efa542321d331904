"""The settings of a run, one frozen tree of dataclasses; what the DeepSpeed JSON owns is in `deepspeed_config`.

Nothing has two owners: batch sizes, precision, ZeRO, optimizer, peak learning rate, clipping and monitors are the
JSON's; model, data, masking, sequence length, schedule, intervals, seed and paths are here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError

PACKING_FORMATS = ("full-sentences", "doc-sentences", "contiguous")
MASKING_UNITS = ("token", "whole-word", "span")
SPECIAL_TOKENS_PER_SEQUENCE = 2
DEFAULT_DATA_DIR = Path("data/corpus")
DEFAULT_OUTPUT_ROOT = Path("runs")


@dataclass(frozen=True)
class ModelConfig:
    """The encoder's architecture, named as in transformers' `RobertaConfig`."""

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

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP: four times the hidden size in every size of BERT and RoBERTa."""
        return 4 * self.hidden_size

    def __post_init__(self) -> None:
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
        if self.max_seq_length <= SPECIAL_TOKENS_PER_SEQUENCE:
            raise UserError(f"--max_seq_length must be at least 3, got {self.max_seq_length}")
        if self.format not in PACKING_FORMATS:
            raise UserError(f"--packing must be one of {', '.join(PACKING_FORMATS)}, got {self.format!r}")

    @property
    def capacity(self) -> int:
        """Tokens of a sequence between its `<s>` and `</s>`."""
        return self.max_seq_length - SPECIAL_TOKENS_PER_SEQUENCE


@dataclass(frozen=True)
class MaskingConfig:
    """What is masked, and how much; shares are named as in transformers' `DataCollatorForLanguageModeling`.

    Attributes:
        mlm_probability_end: where given, the share moves from `mlm_probability` at the run's first step in a straight
            line to this at its last.
        unit: what is chosen as a whole; see `ds_roberta.data.masking`.
    """

    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    mlm_probability_end: float | None = None
    unit: str = "token"

    def __post_init__(self) -> None:
        if self.unit not in MASKING_UNITS:
            raise UserError(f"--masking must be one of {', '.join(MASKING_UNITS)}, got {self.unit!r}")
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
    """Length of the run and shape of its learning rate, in optimizer steps."""

    max_steps: int
    warmup_steps: int

    def __post_init__(self) -> None:
        require_positive("--max_steps", self.max_steps)
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise UserError(
                f"--warmup_steps must be from 0 to max_steps ({self.max_steps}), got {self.warmup_steps}: give both"
            )


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
    model: ModelConfig
    packing: PackingConfig
    schedule: ScheduleConfig
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    seed: int = 0
    eval_sequences: int = 2_048
    resume: str = "auto"
    save_deepspeed_checkpoint: bool = False

    def __post_init__(self) -> None:
        require_positive("--eval_sequences", self.eval_sequences)
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, got {self.seed}")

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        tree["data_dir"], tree["output_dir"] = str(self.data_dir), str(self.output_dir)
        return tree


def require_positive(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a positive whole number, got {value!r}")
