"""A pretraining run from its options to the exported model: makes the parts, checks them against each other, starts."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import ds_roberta
from ds_roberta.config import (
    DEFAULT_OUTPUT_ROOT,
    PRESETS,
    IntervalConfig,
    MaskingConfig,
    PackingConfig,
    RunConfig,
    ScheduleConfig,
    model_config,
)
from ds_roberta.data.loader import Collator, TrainLoader
from ds_roberta.data.masking import evaluation_masker, training_masker
from ds_roberta.data.order import SampleOrder
from ds_roberta.data.packing import PackedSplit, build_index, open_index
from ds_roberta.data.shards import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT, Corpus
from ds_roberta.data.words import word_starts
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks, set_up_logging
from ds_roberta.errors import UserError
from ds_roberta.evaluation.masked_lm import HeldOutLoss
from ds_roberta.files import write_json
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training import checkpoint, deepspeed_checkpoint
from ds_roberta.training.batch import BatchPlan
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import mend
from ds_roberta.training.engine import Engine, choose_precision, init_distributed, on_gpu
from ds_roberta.training.export import export_checkpoint
from ds_roberta.training.micro_batch import largest_micro_batch_size
from ds_roberta.training.schedule import mlm_probability
from ds_roberta.training.trainer import Trainer

EXPORT_FOLDER = "hf"
CONFIG_NAME = "config.json"
STOPPED_EXIT_CODE = 85
"""Exit code of a run that was asked to stop and saved: start the same command again to go on."""


@dataclass(frozen=True)
class PretrainOptions:
    """The options of `launch/pretrain.py`, by the same names; None means the model preset's or the JSON's value."""

    deepspeed_config: Path
    data_dir: Path
    output_dir: Path | None = None
    model: str | None = None
    max_seq_length: int | None = None
    packing: str = PackingConfig.format
    masking: str = MaskingConfig.unit
    mlm_probability: float = MaskingConfig.mlm_probability
    mlm_probability_end: float | None = None
    max_steps: int | None = None
    warmup_steps: int | None = None
    seed: int = 0
    save_interval: int = IntervalConfig.save_interval
    eval_interval: int = IntervalConfig.eval_interval
    log_interval: int = IntervalConfig.log_interval
    keep_last: int = IntervalConfig.keep_last
    keep_every: int | None = None
    save_deepspeed_checkpoint: bool = False
    eval_sequences: int = RunConfig.eval_sequences
    resume: str = "auto"
    train_batch_size: int | None = None
    learning_rate: float | None = None
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1


def pretrain(options: PretrainOptions) -> int:
    """Pretrain, or go on pretraining, and export the model.

    Returns:
        The process's exit code: 0, or `STOPPED_EXIT_CODE` for a run that stopped on request.

    Raises:
        UserError: an option, file or folder is wrong; nothing is half-written.
    """
    set_up_logging()
    deepspeed_config = DeepSpeedConfig.read(options.deepspeed_config, options.train_batch_size, options.learning_rate)
    corpus = Corpus.open(options.data_dir)
    config = run_config(options, corpus, on_gpu())
    precision = choose_precision(deepspeed_config)
    if config.resume != "auto" and not Path(config.resume).is_dir():
        raise UserError(f"--resume {config.resume!r} is not a folder: give a checkpoint's, or 'auto'")

    ranks = init_distributed()
    chosen = "" if options.model else f" (the default {'with' if on_gpu() else 'without'} a GPU; --model chooses)"
    ranks.log(f"model {config.model_name}{chosen}, precision {precision}, ZeRO stage {deepspeed_config.zero_stage}")
    state, checkpoint_path, deepspeed_path = _initial_state(config, corpus, deepspeed_config, precision, ranks)
    ranks.on_main(lambda: _make_output_dir(config.output_dir, state.best_step))
    train_data, held_out_data = _open_data(corpus, config.packing, ranks)
    ranks.log(f"{config.packing.max_seq_length} tokens a sequence, {len(train_data):,} sequences an epoch")

    torch.manual_seed(config.seed)
    engine = Engine(MaskedLM(config.model), deepspeed_config.resolved(precision, on_gpu()), ranks, config.seed)
    share = -(-deepspeed_config.train_batch_size // ranks.world_size)
    micro_batch_size = deepspeed_config.micro_batch_size or largest_micro_batch_size(
        engine, config.packing.max_seq_length, config.masking, share
    )
    plan = BatchPlan.fit(deepspeed_config.train_batch_size, min(micro_batch_size, share), ranks.world_size)
    engine.set_batch(plan)
    ranks.log(str(plan))

    if checkpoint_path is not None:
        checkpoint.load(engine, checkpoint_path)
    elif deepspeed_path is not None:
        deepspeed_checkpoint.load(engine, deepspeed_path, state)
    if ranks.is_main:
        write_json(config.output_dir / CONFIG_NAME, _record(config, engine, plan, precision))
    tokenizer = corpus.manifest.tokenizer
    words = None
    if config.masking.unit != "token":
        words = word_starts(corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
    masker = training_masker(config.masking, tokenizer, config.seed, words)
    loader = TrainLoader(
        Collator(train_data, masker, tokenizer, config.packing.max_seq_length),
        SampleOrder(len(train_data), config.seed),
        plan.train_batch_size,
        plan.micro_batch_size,
        ranks.rank,
        ranks.world_size,
        lambda step: mlm_probability(config.schedule, config.masking, step),
    )
    held_out = None
    if held_out_data is not None:
        masker = evaluation_masker(config.masking, tokenizer, words)
        collator = Collator(held_out_data, masker, tokenizer, config.packing.max_seq_length)
        held_out = HeldOutLoss(collator, config.eval_sequences, plan.micro_batch_size, ranks)
    trainer = Trainer(config, deepspeed_config.learning_rate, engine, loader, held_out, state, checkpoint_path)
    if not trainer.train():
        ranks.log("stopped on request; the same command goes on from here")
        return STOPPED_EXIT_CODE
    last = trainer.last_checkpoint
    assert last is not None
    ranks.on_main(lambda: export_checkpoint(last, config.output_dir / EXPORT_FOLDER))
    return 0


def run_config(options: PretrainOptions, corpus: Corpus, has_gpu: bool) -> RunConfig:
    """The run's settings, completed from the model's preset.

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
        schedule=ScheduleConfig(max_steps, warmup_steps),
        masking=MaskingConfig(
            options.mlm_probability, mlm_probability_end=options.mlm_probability_end, unit=options.masking
        ),
        intervals=IntervalConfig(
            options.save_interval, options.eval_interval, options.log_interval, options.keep_last, options.keep_every
        ),
        seed=options.seed,
        eval_sequences=options.eval_sequences,
        resume=options.resume,
        save_deepspeed_checkpoint=options.save_deepspeed_checkpoint,
    )


def _make_output_dir(output_dir: Path, best_step: int | None) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
        mend(output_dir / checkpoint.CHECKPOINTS_FOLDER, best_step)
        mend(output_dir / deepspeed_checkpoint.FOLDER, None)
    except OSError as error:
        raise UserError(f"cannot write --output_dir {str(output_dir)!r} ({error.strerror}): choose another") from error


def _open_data(corpus: Corpus, packing: PackingConfig, ranks: Ranks) -> tuple[PackedSplit, PackedSplit | None]:
    """The training and the held-out sequences; rank 0 makes their indices where there are none."""
    splits = [split for split in (TRAIN_SPLIT, VALIDATION_SPLIT) if corpus.manifest.splits.get(split)]
    for split in splits:
        ranks.on_main(lambda split=split: build_index(corpus, split, packing))  # type: ignore[misc]
    if VALIDATION_SPLIT not in splits:
        ranks.log("no held-out documents: no evaluation (preprocess shard --validation_fraction makes some)")
        return open_index(corpus, TRAIN_SPLIT, packing), None
    return open_index(corpus, TRAIN_SPLIT, packing), open_index(corpus, VALIDATION_SPLIT, packing)


def _initial_state(
    config: RunConfig, corpus: Corpus, deepspeed_config: DeepSpeedConfig, precision: str, ranks: Ranks
) -> tuple[TrainState, Path | None, Path | None]:
    """The state to begin with, and the checkpoint that it is of: a portable one, or one of DeepSpeed's, or neither."""
    identity = {
        "data": corpus.manifest.fingerprint,
        "tokenizer": corpus.manifest.tokenizer.fingerprint,
        "model": asdict(config.model),
        "packing": asdict(config.packing),
        "masking": asdict(config.masking),
        "seed": config.seed,
        "train_batch_size": deepspeed_config.train_batch_size,
    }
    folder = config.output_dir / checkpoint.CHECKPOINTS_FOLDER
    of_deepspeed = None if config.resume == "auto" else deepspeed_checkpoint.find(Path(config.resume))
    path = of_deepspeed or ranks.on_main(lambda: checkpoint.choose(config.resume, folder))
    if path is None:
        return TrainState(identity), None, None
    if of_deepspeed:
        zero_stage = deepspeed_config.zero_stage
        state = deepspeed_checkpoint.read_state(path, ranks.world_size, zero_stage, precision)
    else:
        state = checkpoint.read_state(path)
    checkpoint.check_identity(path, state.identity, identity)
    newer = [step for step in checkpoint.saved_steps(folder) if step > state.global_step]
    if newer and config.resume != "auto":
        raise UserError(
            f"{str(folder)!r} has checkpoints newer than --resume {config.resume!r} (step {newer[0]}): move them away, "
            "give another --output_dir, or go on from the newest with --resume auto"
        )
    if state.global_step > config.schedule.max_steps:
        raise UserError(
            f"{str(path)!r} is of step {state.global_step}, beyond --max_steps {config.schedule.max_steps}: raise it"
        )
    ranks.log(f"resuming from {path}, step {state.global_step} of {config.schedule.max_steps}")
    return (state, None, path) if of_deepspeed else (state, path, None)


def _record(config: RunConfig, engine: Engine, plan: BatchPlan, precision: str) -> dict[str, Any]:
    """All that reproduces the run: settings, the DeepSpeed configuration as resolved, versions, commit, machine."""
    return {
        "run": config.as_json(),
        "deepspeed": engine.config,
        "batch": asdict(plan),
        "precision": precision,
        "device": str(engine.device),
        "versions": {
            "ds_roberta": ds_roberta.__version__,
            "deepspeed": engine.deepspeed_version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this program, where it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
