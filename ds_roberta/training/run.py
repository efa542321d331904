"""A pretraining run from its options to the exported model: makes the parts, checks them against each other, starts."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ds_roberta.config import PackingConfig, RunConfig
from ds_roberta.data.loader import Collator, LoaderStage, TrainLoader
from ds_roberta.data.masking import evaluation_masker, training_masker
from ds_roberta.data.mixture import MixedOrder, sample_order
from ds_roberta.data.packing import PackedSplit, build_index, open_index
from ds_roberta.data.shards import TOKENIZER_FOLDER, TRAIN_SPLIT, VALIDATION_SPLIT, Corpus
from ds_roberta.data.stages import places_behind
from ds_roberta.data.words import share_without_spaces, word_starts
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import STOPPED_EXIT_CODE, Ranks, set_up_logging
from ds_roberta.errors import UserError
from ds_roberta.evaluation.held_out import HeldOutSample
from ds_roberta.files import write_json
from ds_roberta.model.objectives import Objective, find_objective
from ds_roberta.training import checkpoint, deepspeed_checkpoint
from ds_roberta.training.checkpoint_writer import mend
from ds_roberta.training.compilation import compilation_notice, compile_layers, resolve_torch_compile
from ds_roberta.training.device import choose_precision, fastest_precision, init_distributed, on_gpu
from ds_roberta.training.engine import Engine
from ds_roberta.training.facts import run_record, shared_facts
from ds_roberta.training.initial_state import initial_state
from ds_roberta.training.metrics import CONFIG_NAME, METRICS_NAME
from ds_roberta.training.micro_batch import BatchPlan, Trial, find_micro_batch_size, finding_conditions
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.optimizer import mlm_probability, without_bias_and_norm
from ds_roberta.training.peak import MEASURED, device_peak
from ds_roberta.training.settings import run_config
from ds_roberta.training.trainer import Trainer

if TYPE_CHECKING:
    from ds_roberta.training.initial_model import InitialModel

EXPORT_FOLDER = "hf"
_SAMPLE_SEQUENCES = 256


def pretrain(options: Namespace) -> int:
    """Pretrain, or go on pretraining, and export the model.

    Returns:
        The process's exit code: 0, or `STOPPED_EXIT_CODE` for a run that stopped on request.

    Raises:
        UserError: an option, file or folder is wrong; nothing is half-written.
    """
    set_up_logging()
    ranks = init_distributed(options.rendezvous_timeout)
    deepspeed_config, corpus, config, precision, initial_model = ranks.together(lambda: _read_inputs(options))
    ranks.check_same(shared_facts(vars(options), deepspeed_config, corpus, precision))
    for note in deepspeed_config.notes:
        ranks.log(note)
    monitors = Monitors(config.output_dir, deepspeed_config.monitors, config.guard.loss_spike == "rollback")
    ranks.on_main(monitors.check)
    zero_stage = deepspeed_config.zero_stage
    compiled = ranks.together(lambda: resolve_torch_compile(config.torch_compile, zero_stage, on_gpu()))
    chosen = (
        ""
        if options.model or initial_model
        else f" (the default {'with' if on_gpu() else 'without'} a GPU; --model chooses)"
    )
    ranks.log(f"model {config.model_name}{chosen}, precision {precision}, ZeRO stage {zero_stage}")
    state, checkpoint_path, deepspeed_path = initial_state(
        config, corpus, deepspeed_config, precision, options.allow_change, initial_model, ranks
    )
    ranks.on_main(lambda: _make_output_dir(config.output_dir, state.best_step))
    ranks.on_main(lambda: monitors.open(ranks.log))
    train_data, held_out_data = _open_data(corpus, config, ranks)
    orders = {length: sample_order(packed, config.source_weights, config.seed) for length, packed in train_data.items()}
    for length, order in orders.items():
        if isinstance(order, MixedOrder):
            places = places_behind(config.stages, length, config.schedule.max_steps)
            ranks.log(f"sources of {length} tokens over the run: {order.summary(places)}")

    torch.manual_seed(config.seed)
    model = _make_model(config)
    if initial_model is not None and checkpoint_path is None and deepspeed_path is None:
        for line in ranks.together(lambda: initial_model.initialize(model, config, corpus)):
            ranks.log(line)
    groups = without_bias_and_norm(model) if config.no_decay_bias_and_norm else None
    resolved = deepspeed_config.resolved(precision, on_gpu())
    if (notice := compilation_notice(resolved)) is not None:
        ranks.log(notice)
    engine = Engine(model, resolved, ranks, config.seed, groups)
    plans = _batch_plans(config, deepspeed_config, engine, precision, checkpoint_path)
    for stage, plan in zip(config.stages, plans, strict=True):
        begin = f"from step {stage.first_step}: " if stage.first_step else ""
        sequences = len(train_data[stage.max_seq_length])
        ranks.log(f"{begin}{stage.max_seq_length} tokens a sequence, {sequences:,} sequences in the data; {plan}")

    peak = device_peak(engine.device, fastest_precision(), ranks)
    if peak.source == MEASURED:
        ranks.log(f"peak of a process: {peak.flops_per_second / 1e9:,.0f} GFLOP/s, measured ({fastest_precision()})")
    if compiled:  # only now: rehearsal and trials of micro-batches have sizes that do not come again
        compile_layers(model.roberta.encoder)
        ranks.log("the encoder is compiled (--torch_compile): the first steps of each length take longer")
    if checkpoint_path is not None:
        checkpoint.load(engine, checkpoint_path)
    elif deepspeed_path is not None:
        deepspeed_checkpoint.load(engine, deepspeed_path, state)
    record = config.output_dir / CONFIG_NAME
    settings = (deepspeed_config.monitors, plans, precision, compiled, peak)
    ranks.on_main(lambda: write_json(record, run_record(config, engine, *settings)))
    tokenizer = corpus.manifest.tokenizer
    words = None
    if config.masking.unit != "token":
        words = word_starts(corpus.folder / TOKENIZER_FOLDER, tokenizer.vocab_size)
        ranks.on_main(
            lambda: _tell_text_without_words(corpus, train_data[config.packing.max_seq_length], config, ranks)
        )
    masker = training_masker(config.masking, tokenizer, config.seed, words, model.masker)
    collators = {length: Collator(packed, masker, tokenizer, length) for length, packed in train_data.items()}
    loader = TrainLoader(
        [
            LoaderStage(stage, collators[stage.max_seq_length], orders[stage.max_seq_length], plan.micro_batch_size)
            for stage, plan in zip(config.stages, plans, strict=True)
        ],
        ranks.rank,
        ranks.world_size,
        lambda step: mlm_probability(config.schedule, config.masking, step),
        config.masking.copies,
    )
    held_out = None
    if held_out_data is not None:
        masker = evaluation_masker(config.masking, tokenizer, words, model.masker)
        collator = Collator(held_out_data, masker, tokenizer, config.packing.max_seq_length)
        held_out = HeldOutSample(collator, config.eval_sequences, plans[-1].micro_batch_size, ranks)
    trainer = Trainer(
        config,
        deepspeed_config.learning_rate,
        engine,
        loader,
        held_out,
        state,
        checkpoint_path,
        peak.flops_per_second,
        monitors,
    )
    complete = False
    try:
        complete = trainer.train()
    finally:
        monitors.close(complete)
    if not complete:
        ranks.log("stopped on request; the same command goes on from here")
        return STOPPED_EXIT_CODE
    last = trainer.last_checkpoint
    assert last is not None
    from ds_roberta.training.export import export_checkpoint  # transformers is not needed, nor its memory, until here

    ranks.on_main(lambda: export_checkpoint(last, config.output_dir / EXPORT_FOLDER))
    return 0


def _read_inputs(
    options: Namespace,
) -> tuple[DeepSpeedConfig, Corpus, RunConfig, str, InitialModel | None]:
    """The JSON, the data, the run's settings, its precision and the model to go on with, as this host has them."""
    deepspeed_config = DeepSpeedConfig.read(options.deepspeed_config, options.train_batch_size, options.learning_rate)
    corpus = Corpus.open(options.data_dir)
    initial_model = None
    if options.init_from is not None:
        from ds_roberta.training.initial_model import InitialModel  # other runs need no transformers until their end

        initial_model = InitialModel.open(options.init_from)
    config = run_config(options, corpus, deepspeed_config.train_batch_size, on_gpu(), initial_model)
    _check_output_dir(config)
    if config.no_decay_bias_and_norm and not deepspeed_config.content["optimizer"]["params"].get("weight_decay"):
        raise UserError(
            f"--no_decay_bias_and_norm does nothing: {deepspeed_config.source!r} has no optimizer.params.weight_decay "
            "above 0: give one there, or remove the option"
        )
    if config.resume != "auto" and not Path(config.resume).is_dir():
        raise UserError(f"--resume {config.resume!r} is not a folder: give a checkpoint's, or 'auto'")
    return deepspeed_config, corpus, config, choose_precision(deepspeed_config), initial_model


def _make_model(config: RunConfig) -> Objective:
    return find_objective(config.objective, config.packing)(config.model)


def _check_output_dir(config: RunConfig) -> None:
    """Refuse a folder whose own files the run's would replace."""
    output = config.output_dir.resolve()
    for option, folder in (("data_dir", config.data_dir), ("init_from", config.init_from)):
        if folder is not None and folder.resolve() == output:
            raise UserError(f"--output_dir {str(config.output_dir)!r} is --{option}: give a folder of the run's own")
    record = output / CONFIG_NAME
    if not record.is_file():
        return
    try:
        is_runs = "run" in json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        is_runs = (output / METRICS_NAME).is_file()  # a run's damaged record, which is written anew
    if not is_runs:
        raise UserError(
            f"--output_dir {str(config.output_dir)!r} has a {CONFIG_NAME} that is no run's, perhaps a model's: give "
            "another folder"
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


def _open_data(corpus: Corpus, config: RunConfig, ranks: Ranks) -> tuple[dict[int, PackedSplit], PackedSplit | None]:
    """The training sequences of each length and the held-out ones; rank 0 makes their indices where there are none."""

    def packed(split: str, packing: PackingConfig) -> PackedSplit:
        ranks.on_main(lambda: build_index(corpus, split, packing))
        return open_index(corpus, split, packing)

    lengths = sorted({stage.max_seq_length for stage in config.stages})
    train = {length: packed(TRAIN_SPLIT, replace(config.packing, max_seq_length=length)) for length in lengths}
    if not corpus.manifest.splits.get(VALIDATION_SPLIT):
        ranks.log("no held-out documents: no evaluation (preprocess shard --validation_fraction makes some)")
        return train, None
    return train, packed(VALIDATION_SPLIT, config.packing)


def _tell_text_without_words(corpus: Corpus, packed: PackedSplit, config: RunConfig, ranks: Ranks) -> None:
    """Log the share of the data, by a sample of its sequences, in which `--masking` finds no words."""
    sample = np.linspace(0, len(packed) - 1, min(len(packed), _SAMPLE_SEQUENCES)).astype(np.int64)
    special_ids = corpus.manifest.tokenizer.special_ids
    ids = np.full((len(sample), config.packing.max_seq_length), special_ids[0])
    packed.gather(sample, ids)
    share = share_without_spaces(corpus.folder / TOKENIZER_FOLDER, ids[~np.isin(ids, special_ids)])
    if share >= 0.001:
        ranks.log(
            f"--masking {config.masking.unit}: {share:.1%} of the characters in {len(sample)} sequences are of scripts "
            "written without spaces, where no words are known: tokens stand in for them"
        )


def _batch_plans(
    config: RunConfig, deepspeed_config: DeepSpeedConfig, engine: Engine, precision: str, checkpoint_path: Path | None
) -> list[BatchPlan]:
    """How each stage's batch is divided.

    The JSON's micro-batch holds for every length, which fits if it does for the longest; "auto" is found for each.
    """
    folders = [config.output_dir]
    if checkpoint_path is not None:  # it may be another run's
        folders.append(checkpoint_path.resolve().parents[1])
    sizes = {}
    for length in {stage.max_seq_length: None for stage in config.stages}:
        largest = max(stage.train_batch_size for stage in config.stages if stage.max_seq_length == length)
        share = -(-largest // engine.ranks.world_size)
        sizes[length] = deepspeed_config.micro_batch_size or find_micro_batch_size(
            engine,
            Trial(engine, lambda: _make_model(config), length, config.masking),
            finding_conditions(engine, config.model, length, config.masking, precision, share, config.objective),
            share,
            folders,
        )
    return [
        BatchPlan.fit(stage.train_batch_size, sizes[stage.max_seq_length], engine.ranks.world_size)
        for stage in config.stages
    ]
