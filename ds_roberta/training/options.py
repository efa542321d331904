"""The options of `launch/pretrain.py`, and the settings that they make with the model's preset and the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_roberta.config import (
    DEFAULT_OUTPUT_ROOT,
    PRESETS,
    GuardConfig,
    IntervalConfig,
    MaskingConfig,
    ModelConfig,
    PackingConfig,
    RunConfig,
    ScheduleConfig,
    model_config,
)
from ds_roberta.data.mixture import parse_source_weights
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import make_stages
from ds_roberta.errors import UserError
from ds_roberta.rendezvous import RENDEZVOUS_TIMEOUT

if TYPE_CHECKING:  # it needs transformers, which a run that begins with nothing does not
    from ds_roberta.training.initial_model import InitialModel

CONTINUED_WARMUP_SHARE = 0.06
"""Of the steps, where a run goes on with a model: as in domain-adaptive pretraining (Gururangan et al. 2020)."""


@dataclass(frozen=True)
class PretrainOptions:
    """The options of `launch/pretrain.py`, by the same names; None means the model preset's or the JSON's value."""

    deepspeed_config: Path
    data_dir: Path
    output_dir: Path | None = None
    model: str | None = None
    init_from: Path | None = None
    extend_positions: bool = False
    remap_token_embeddings: bool = False
    max_seq_length: int | None = None
    objective: str = RunConfig.objective
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
    no_decay_bias_and_norm: bool = False
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    rendezvous_timeout: float = RENDEZVOUS_TIMEOUT
    torch_compile: str = RunConfig.torch_compile


def run_config(
    options: PretrainOptions, corpus: Corpus, train_batch_size: int, has_gpu: bool, initial: InitialModel | None
) -> RunConfig:
    """The run's settings, completed from the model's preset, or from the model to go on with, and the batch size.

    Raises:
        UserError: a value is out of its range, missing, or of no use.
    """
    start = _of_preset(options, corpus, has_gpu) if initial is None else _of_initial(options, corpus, initial)
    max_seq_length, max_steps = start.max_seq_length, start.max_steps
    packing = PackingConfig(max_seq_length, options.packing)
    warmup_steps = start.warmup_steps if options.warmup_steps is None else options.warmup_steps
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    dropout = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return RunConfig(
        data_dir=options.data_dir,
        output_dir=start.output_dir,
        model_name=start.name,
        init_from=options.init_from,
        model=replace(start.model, **dropout),
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
        no_decay_bias_and_norm=options.no_decay_bias_and_norm,
        objective=options.objective,
    )


@dataclass(frozen=True)
class _Start:
    """What a preset, or a model to go on with, says where the command line may say nothing."""

    name: str
    model: ModelConfig
    output_dir: Path
    max_seq_length: int
    max_steps: int
    warmup_steps: int


def _of_preset(options: PretrainOptions, corpus: Corpus, has_gpu: bool) -> _Start:
    for name in ("extend_positions", "remap_token_embeddings"):
        if getattr(options, name):
            raise UserError(f"--{name} is for the model of --init_from: give this, or remove it")
    name = options.model or ("base" if has_gpu else "tiny")
    preset, tokenizer = PRESETS[name], corpus.manifest.tokenizer
    max_seq_length = preset.max_seq_length if options.max_seq_length is None else options.max_seq_length
    max_steps = preset.max_steps if options.max_steps is None else options.max_steps
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return _Start(
        name,
        model_config(name, tokenizer.vocab_size, max_seq_length, *special),
        options.output_dir or DEFAULT_OUTPUT_ROOT / name,
        max_seq_length,
        max_steps,
        min(preset.warmup_steps, max_steps * preset.warmup_steps // preset.max_steps),
    )


def _of_initial(options: PretrainOptions, corpus: Corpus, initial: InitialModel) -> _Start:
    if options.model is not None:
        raise UserError(f"--model {options.model} does nothing with --init_from, whose model it is: remove one of them")
    if options.output_dir is None or options.max_steps is None:
        raise UserError(
            "--init_from has no run's recipe: give --output_dir and --max_steps (12500 of 2,048 sequences in "
            "domain-adaptive pretraining, Gururangan et al. 2020)"
        )
    max_seq_length = initial.learned_positions if options.max_seq_length is None else options.max_seq_length
    model = initial.resized(corpus, max_seq_length, options.extend_positions, options.remap_token_embeddings)
    warmup_steps = int(CONTINUED_WARMUP_SHARE * options.max_steps)
    name = initial.folder.resolve().name
    return _Start(name, model, options.output_dir, max_seq_length, options.max_steps, warmup_steps)
