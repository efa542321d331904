"""The options of `launch/pretrain.py`, and the settings that they make with the model's preset and the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_roberta.config import (
    DEFAULT_OUTPUT_ROOT,
    PRESETS,
    GuardConfig,
    IntervalConfig,
    MaskingConfig,
    PackingConfig,
    RunConfig,
    ScheduleConfig,
    model_config,
)
from ds_roberta.data.mixture import parse_source_weights
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import make_stages
from ds_roberta.rendezvous import RENDEZVOUS_TIMEOUT


@dataclass(frozen=True)
class PretrainOptions:
    """The options of `launch/pretrain.py`, by the same names; None means the model preset's or the JSON's value."""

    deepspeed_config: Path
    data_dir: Path
    output_dir: Path | None = None
    model: str | None = None
    max_seq_length: int | None = None
    packing: str = PackingConfig.format
    source_weights: str | None = None
    masking: str = MaskingConfig.unit
    masking_copies: int | None = None
    mlm_probability: float = MaskingConfig.mlm_probability
    mlm_probability_end: float | None = None
    max_steps: int | None = None
    warmup_steps: int | None = None
    lr_scheduler_type: str = ScheduleConfig.lr_scheduler_type
    lr_power: float | None = None
    min_lr_ratio: float | None = None
    decay_steps: int | None = None
    decay_type: str | None = None
    max_seq_length_schedule: str | None = None
    train_batch_size_schedule: str | None = None
    loss_spike: str = GuardConfig.loss_spike
    loss_spike_threshold: float | None = None
    seed: int = 0
    save_interval: int = IntervalConfig.save_interval
    eval_interval: int = IntervalConfig.eval_interval
    log_interval: int = IntervalConfig.log_interval
    keep_last: int = IntervalConfig.keep_last
    keep_every: int | None = None
    save_deepspeed_checkpoint: bool = False
    eval_sequences: int = RunConfig.eval_sequences
    resume: str = "auto"
    allow_change: str | None = None
    train_batch_size: int | None = None
    learning_rate: float | None = None
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    rendezvous_timeout: float = RENDEZVOUS_TIMEOUT
    torch_compile: str = RunConfig.torch_compile


def run_config(options: PretrainOptions, corpus: Corpus, train_batch_size: int, has_gpu: bool) -> RunConfig:
    """The run's settings, completed from the model's preset and the JSON's batch size.

    Raises:
        UserError: a value is out of its range.
    """
    model = options.model or ("base" if has_gpu else "tiny")
    preset = PRESETS[model]
    max_seq_length = preset.max_seq_length if options.max_seq_length is None else options.max_seq_length
    packing = PackingConfig(max_seq_length, options.packing)
    max_steps = preset.max_steps if options.max_steps is None else options.max_steps
    warmup_steps = options.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(preset.warmup_steps, max_steps * preset.warmup_steps // preset.max_steps)
    tokenizer = corpus.manifest.tokenizer
    return RunConfig(
        data_dir=options.data_dir,
        output_dir=options.output_dir or DEFAULT_OUTPUT_ROOT / model,
        model_name=model,
        model=model_config(
            model,
            tokenizer.vocab_size,
            max_seq_length,
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            hidden_dropout_prob=options.hidden_dropout_prob,
            attention_probs_dropout_prob=options.attention_probs_dropout_prob,
        ),
        packing=packing,
        schedule=ScheduleConfig(
            max_steps,
            warmup_steps,
            options.lr_scheduler_type,
            options.lr_power,
            options.min_lr_ratio,
            options.decay_steps,
            options.decay_type,
        ),
        stages=make_stages(
            max_seq_length, train_batch_size, options.max_seq_length_schedule, options.train_batch_size_schedule
        ),
        masking=MaskingConfig(
            options.mlm_probability,
            mlm_probability_end=options.mlm_probability_end,
            unit=options.masking,
            copies=options.masking_copies,
        ),
        intervals=IntervalConfig(
            options.save_interval, options.eval_interval, options.log_interval, options.keep_last, options.keep_every
        ),
        guard=GuardConfig(options.loss_spike, options.loss_spike_threshold),
        source_weights=parse_source_weights(options.source_weights, corpus.manifest),
        seed=options.seed,
        eval_sequences=options.eval_sequences,
        resume=options.resume,
        save_deepspeed_checkpoint=options.save_deepspeed_checkpoint,
        torch_compile=options.torch_compile,
    )
