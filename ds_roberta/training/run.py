"""A pretraining run from its options to the exported model."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ds_roberta.data.count_models import token_frequencies
from ds_roberta.data.manifest import VALIDATION_SPLIT
from ds_roberta.data.shards import Corpus
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError
from ds_roberta.files import check_replaceable, created_parents, load_json, remove_leftovers, write_json
from ds_roberta.lease import Lease, leases_within, sole_writer
from ds_roberta.model.initialization import FREQUENCIES, NEIGHBOURS, look_at_neighbours, predict_frequencies
from ds_roberta.model.objectives import Objective, find_objective
from ds_roberta.model.weights import HEAD_BIAS, POSITION_EMBEDDINGS
from ds_roberta.options import require_positive, require_positive_number
from ds_roberta.process import STOPPED_EXIT_CODE, set_up_logging
from ds_roberta.training import checkpoint, deepspeed_checkpoint
from ds_roberta.training.budget import UNPLANNED_STEPS, budget_of, fix_steps, with_kept_plan
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import clean_up
from ds_roberta.training.compilation import compilation_notice, compile_layers, compile_model, resolve_torch_compile
from ds_roberta.training.device import (
    choose_precision,
    fastest_precision,
    init_distributed,
    make_deterministic,
    on_gpu,
)
from ds_roberta.training.engine import Engine
from ds_roberta.training.facts import run_record, shared_facts
from ds_roberta.training.loss_plateau import LossPlateau
from ds_roberta.training.loss_spikes import LossSpike
from ds_roberta.training.metrics import CONFIG_NAME, METRICS_NAME
from ds_roberta.training.micro_batch import BatchPlan, Trial, batch_plans, find_micro_batch_size, finding_conditions
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.optimizer import parameter_groups
from ds_roberta.training.peak import MEASURED, Peak, device_peak
from ds_roberta.training.recipes import RECIPES
from ds_roberta.training.run_data import RunData, find_lines, log_sources, make_loaders, open_data, resolve_padding_free
from ds_roberta.training.settings import Run, RunConfig, model_origin, run_config
from ds_roberta.training.start import Start, find_start
from ds_roberta.training.trainer import Trainer

if TYPE_CHECKING:
    from ds_roberta.training.initial_model import InitialModel

EXPORT_FOLDER = "hf"


def pretrain(options: Namespace) -> int:
    """Start or resume a run, train it to its end, and export the model.

    Args:
        options: those of `launch/pretrain.py`, as `pretrain_options` makes them.

    Returns:
        The process's exit code: 0, or `STOPPED_EXIT_CODE` for a run that stopped on request.

    Raises:
        UserError: an option, file or folder is wrong; nothing is left half-written.
    """
    set_up_logging()
    ranks = init_distributed(options.rendezvous_timeout)
    run = _read_settings(options, ranks)
    with ranks.main_holds(_held_output_dir(run.config.output_dir)) as lease:
        return _train(run, lease)


def _train(run: Run, lease: Lease | None) -> int:
    """Train from scratch or from the newest checkpoint, and export; returns the exit code. Rank 0 has the lease."""
    ranks = run.ranks
    start = find_start(run)
    ranks.on_main(lambda: _check_export(run.config.output_dir / EXPORT_FOLDER, start.is_fresh))
    ranks.on_main(lambda: _open_output_dir(run, start.state))
    data = open_data(run)
    engine, micro_batch_sizes, peak = _make_engine(run, start)
    run = fix_steps(run, start, data, engine, micro_batch_sizes)
    plans = _divide_batches(run, data, micro_batch_sizes)
    start.load(engine)
    ranks.on_main(lambda: write_json(run.config.output_dir / CONFIG_NAME, run_record(run, engine, plans, peak)))
    trainer = _make_trainer(run, start, data, engine, plans, peak, lease)
    complete = False
    try:
        complete = trainer.train()
    except (LossSpike, LossPlateau):  # in all processes, unlike a file that one of them cannot read
        run.monitors.close(complete)
        ranks.barrier()  # once one process exits, a launcher ends the first, too, whatever it still has to say
        raise
    finally:
        run.monitors.close(complete)
    if not complete:
        ranks.barrier()  # likewise
        ranks.log("stopped on request; run the same command again to continue")
        return STOPPED_EXIT_CODE
    _export(run, trainer)
    return 0


def _read_settings(options: Namespace, ranks: Ranks) -> Run:
    """Read and check all inputs of the run; nothing is written yet."""
    deepspeed, corpus, config, precision, initial_model = ranks.together(lambda: _read_inputs(options))
    ranks.check_same(shared_facts(vars(options), deepspeed, corpus, config.model, precision))
    for note in deepspeed.notes:
        ranks.log(note)
    if config.deterministic:
        make_deterministic()
    monitors = Monitors(config.output_dir, deepspeed.monitors, config.guard.loss_spike == "rollback")
    ranks.on_main(monitors.check)
    zero_stage = deepspeed.zero_stage
    compiled = ranks.together(lambda: resolve_torch_compile(config.torch_compile, zero_stage, on_gpu()))
    padding_free = ranks.together(lambda: resolve_padding_free(config, compiled, on_gpu(), precision))
    origin = "" if initial_model else model_origin(options.model, config.model, on_gpu())
    ranks.log(f"model {config.model_name}{origin}, precision {precision}, ZeRO stage {zero_stage}")
    budget = budget_of(options)
    how = (precision, compiled, padding_free)
    return with_kept_plan(Run(ranks, config, corpus, deepspeed, *how, options, budget, initial_model, monitors))


def _read_inputs(options: Namespace) -> tuple[DeepSpeedConfig, Corpus, RunConfig, str, InitialModel | None]:
    """Read on this host: the JSON, the data, the run's settings, its precision, and the model of `--init_from`."""
    if options.deepspeed_config is None and options.recipe is None:
        raise UserError(
            f"how to train is not given: name a --recipe ({', '.join(RECIPES)}), or a DeepSpeed JSON by "
            "--deepspeed_config, such as ds_configs/zero2.json"
        )
    checks = {
        "train_batch_size": require_positive,
        "learning_rate": require_positive_number,
        "muon_lr": require_positive_number,
    }
    for name, check in checks.items():  # otherwise the errors would be of the JSON, whose values they replace
        if (value := getattr(options, name)) is not None:
            check(f"--{name}", value)
    recipe = RECIPES[options.recipe] if options.deepspeed_config is None else None
    source = recipe.deepspeed_config if recipe else options.deepspeed_config
    deepspeed = DeepSpeedConfig.read(source, options.train_batch_size, options.learning_rate, options.muon_lr)
    corpus = Corpus.open(options.data_dir)
    initial_model = None
    if options.init_from is not None:
        from ds_roberta.training.initial_model import InitialModel  # other runs need no transformers until their end

        initial_model = InitialModel.open(options.init_from)
    if budget_of(options):
        options = Namespace(**{**vars(options), "max_steps": UNPLANNED_STEPS})
    config = run_config(options, corpus, deepspeed.train_batch_size, on_gpu(), initial_model)
    if recipe:
        params = recipe.params_for(config.model.hidden_size)
        deepspeed = deepspeed.with_optimizer_params(params, options.learning_rate, options.muon_lr)
    _check_output_dir(config)
    if config.no_decay_bias_and_norm and not deepspeed.content["optimizer"]["params"].get("weight_decay"):
        raise UserError(
            f"--no_decay_bias_and_norm does nothing: {deepspeed.source!r} has no optimizer.params.weight_decay "
            "above 0: set one there, or remove the option"
        )
    if deepspeed.recomputed_layers > config.model.num_hidden_layers:
        raise UserError(
            f"{deepspeed.source}: activation_checkpointing.number_checkpoints is {deepspeed.recomputed_layers}, but "
            f"the model has {config.model.num_hidden_layers} layers: give at most as many"
        )
    if config.guard.loss_plateau == "stop":
        if not find_objective(config.objective, config.packing).predicts_tokens:
            raise UserError(f"--loss_plateau stop does nothing with --objective {config.objective}: remove it")
        if not corpus.manifest.splits.get(VALIDATION_SPLIT):
            raise UserError(
                "--loss_plateau stop does nothing without held-out documents: remove it, or prepare the data with "
                "--validation_fraction"
            )
    if config.deterministic and not on_gpu():
        raise UserError("--deterministic does nothing on a CPU, which repeats every run bit for bit: remove it")
    return deepspeed, corpus, config, choose_precision(deepspeed), initial_model


def _check_output_dir(config: RunConfig) -> None:
    """Refuse a folder whose files the run would overwrite."""
    output = config.output_dir.resolve()
    if config.data_dir.resolve() == output:
        raise UserError(f"--output_dir {str(config.output_dir)!r} is --data_dir: choose a separate folder")
    if config.init_from is not None and config.init_from.resolve().is_relative_to(output):
        raise UserError(
            f"--output_dir {str(config.output_dir)!r} is or holds --init_from {str(config.init_from)!r}, which the run "
            "may replace: choose a separate folder"
        )
    record = output / CONFIG_NAME
    if not record.is_file():
        return
    try:
        is_runs = "run" in load_json(record.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        is_runs = (output / METRICS_NAME).is_file()  # a run's damaged record, which will be rewritten
    if not is_runs:
        raise UserError(
            f"--output_dir {str(config.output_dir)!r} has a {CONFIG_NAME} that is not a run's, perhaps a model's: "
            "choose another folder"
        )


def _check_export(folder: Path, is_fresh: bool) -> None:
    """Raise `UserError` if the run's last act would be refused, or would replace another run's model."""
    if not folder.exists():
        return
    if is_fresh:
        raise UserError(
            f"{str(folder)!r} is the model of a run whose checkpoints are gone; this run would replace the model and "
            "the metrics: choose another --output_dir, or move it away"
        )
    from ds_roberta.model.export import KIND, is_model_folder  # it imports transformers

    check_replaceable(folder, is_model_folder, KIND)


@contextmanager
def _held_output_dir(folder: Path) -> Iterator[Lease]:
    """Hold the lease on the run's folder; raises `UserError` if another job writes there, or it cannot be written."""
    leases = leases_within(folder.resolve())
    with created_parents(leases), ExitStack() as held:
        try:
            lease = held.enter_context(sole_writer(folder, leases))
        except OSError as error:
            raise UserError(f"cannot write --output_dir {str(folder)!r} ({error.strerror}): choose another") from error
        yield lease


def _open_output_dir(run: Run, state: TrainState) -> None:
    """Make the run's folder, or clean it up after a kill, and open the monitors."""
    output_dir = run.config.output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
        remove_leftovers(output_dir)
        clean_up(output_dir / checkpoint.CHECKPOINTS_FOLDER, state.best_step, state.global_step)
        clean_up(output_dir / deepspeed_checkpoint.FOLDER, None)
    except OSError as error:
        raise UserError(f"cannot write --output_dir {str(output_dir)!r} ({error.strerror}): choose another") from error
    run.monitors.open(run.ranks.log)


def _make_engine(run: Run, start: Start) -> tuple[Engine, dict[int, int], Peak]:
    """The DeepSpeed engine with initial weights, the largest micro-batch of each length, and the device's peak."""
    config, ranks = run.config, run.ranks
    torch.manual_seed(config.seed)
    model = ranks.together(lambda: _allocate_model(run))
    initial_model = run.initial_model
    if initial_model is not None and start.is_fresh:
        for line in ranks.together(lambda: initial_model.initialize(model, config, run.corpus)):
            ranks.log(line)
    if config.initial_bias == FREQUENCIES and start.is_fresh:
        frequencies = ranks.on_main(lambda: token_frequencies(run.corpus, config.model.vocab_size))
        predict_frequencies(model.get_parameter(HEAD_BIAS), frequencies)
    resolved = run.deepspeed.resolved(run.precision, on_gpu())
    if (notice := compilation_notice(resolved)) is not None:
        ranks.log(notice)
    fixed = {model.get_parameter(POSITION_EMBEDDINGS)} if _has_fixed_positions(run) else set()
    groups = parameter_groups(model, config.no_decay_bias_and_norm, fixed)
    exact = run.precision != "fp32" and start.is_fresh
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if exact}
    engine = Engine(model, resolved, ranks, config.seed, groups)
    for name, weight in weights.items():  # DeepSpeed makes its fp32 weights of those in 16 bits
        engine.set_tensors(model.get_parameter(name), {"weight": weight})
    micro_batch_sizes = _micro_batch_sizes(run, start, engine)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats(engine.device)  # memory_gb is that of the training
    peak = device_peak(engine.device, fastest_precision(), ranks)
    if peak.source == MEASURED:
        ranks.log(f"peak of a process: {peak.flops_per_second / 1e9:,.0f} GFLOP/s, measured ({fastest_precision()})")
    if run.compiled:  # only now: the rehearsal and the micro-batch trials have sizes that do not occur again
        if config.torch_compile == "on":
            compile_model(model)
        else:
            compile_layers(model.roberta.encoder)
        ranks.log("the model is compiled (--torch_compile): the first steps of each length take longer")
    return engine, micro_batch_sizes, peak


def _has_fixed_positions(run: Run) -> bool:
    if (initial_model := run.initial_model) is None:
        return run.config.initial_attention == NEIGHBOURS
    found = run.ranks.on_main(lambda: initial_model.has_fixed_positions(run.config))
    if found:
        run.ranks.log("its position embeddings are sinusoids (--initial_attention neighbours): they stay as they are")
    return found


def _make_model(run: Run) -> Objective:
    config = run.config
    model = find_objective(config.objective, config.packing)(config.model)
    model.roberta.encoder.recomputed_layers = run.deepspeed.recomputed_layers
    if config.initial_attention == NEIGHBOURS:
        look_at_neighbours(model.roberta, config.model.initializer_range)
    return model


def _allocate_model(run: Run) -> Objective:
    try:
        return _make_model(run)
    except RuntimeError as error:  # torch's, for memory and for sizes that it cannot express
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot allocate the model {run.config.model_name} ({reason}): choose smaller sizes"
        ) from error


def _micro_batch_sizes(run: Run, start: Start, engine: Engine) -> dict[int, int]:
    """The largest micro-batch of each length.

    The JSON's micro-batch applies to every length, and fits if it fits the longest; for "auto", one is found for each.
    """
    config = run.config
    folders = [config.output_dir]
    if start.checkpoint is not None:  # the checkpoint may be another run's
        folders.append(start.checkpoint.resolve().parent.parent)
    sizes = {}
    for length in {stage.max_seq_length: None for stage in config.stages}:
        largest = max(stage.train_batch_size for stage in config.stages if stage.max_seq_length == length)
        share = -(-largest // engine.ranks.world_size)
        sizes[length] = run.deepspeed.micro_batch_size or find_micro_batch_size(
            engine,
            Trial(engine, lambda: _make_model(run), length, config.masking),
            finding_conditions(engine, config.model, length, config.masking, run.precision, share, config.objective),
            share,
            folders,
        )
    return sizes


def _divide_batches(run: Run, data: RunData, micro_batch_sizes: dict[int, int]) -> list[BatchPlan]:
    """How each stage's batch is divided; it and the data are logged."""
    log_sources(run, data)
    plans = batch_plans(run.config.stages, micro_batch_sizes, run.ranks.world_size)
    for stage, plan in zip(run.config.stages, plans, strict=True):
        begin = f"from step {stage.first_step}: " if stage.first_step else ""
        sequences = len(data.train[stage.max_seq_length])
        run.ranks.log(f"{begin}{stage.max_seq_length} tokens a sequence, {sequences:,} sequences in the data; {plan}")
    return plans


def _make_trainer(
    run: Run,
    start: Start,
    data: RunData,
    engine: Engine,
    plans: list[BatchPlan],
    peak: Peak,
    lease: Lease | None,
) -> Trainer:
    loader, held_out = make_loaders(run, data, plans, engine.module.masker, on_gpu())
    find_lines(run, start.state, held_out, engine.module)
    return Trainer(
        run.config,
        engine,
        loader,
        held_out,
        start.state,
        start.checkpoint,
        peak_learning_rate=run.deepspeed.learning_rate,
        peak_muon_lr=run.deepspeed.muon_lr,
        peak_flops=peak.flops_per_second,
        monitors=run.monitors,
        lease=lease,
    )


def _export(run: Run, trainer: Trainer) -> None:
    last = trainer.last_checkpoint
    assert last is not None
    from ds_roberta.training.export import export_checkpoint  # training needs no transformers

    run.ranks.on_main(lambda: export_checkpoint(last, run.config.output_dir / EXPORT_FOLDER))
