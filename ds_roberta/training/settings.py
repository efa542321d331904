"""The options of `launch/pretrain.py`, and a run's settings, which follow from them, the model and the data."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_roberta.config import (
    EVAL_SEQUENCES,
    PACKED_ACROSS_DOCUMENTS,
    PRESETS,
    GuardConfig,
    IntervalConfig,
    MaskingConfig,
    ModelConfig,
    PackingConfig,
    ScheduleConfig,
    Stage,
    model_config,
    step_number,
)
from ds_roberta.data.mixture import parse_source_weights
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import make_stages
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.model.architecture import CONFIG_NAME, config_path, model_choice, read_architecture, unused_fields
from ds_roberta.model.initialization import INITIAL_ATTENTION, INITIAL_BIAS, RANDOM, ZERO
from ds_roberta.model.objectives import SUMMARIES, find_objective
from ds_roberta.options import Settings, must_be, option, options_of, require_positive
from ds_roberta.rendezvous import RENDEZVOUS_TIMEOUT
from ds_roberta.training.monitors import Monitors
from ds_roberta.training.recipes import OPTIONS_OF_RECIPES, RECIPES

if TYPE_CHECKING:  # it needs transformers, which a run that starts from random weights does not
    from ds_roberta.training.initial_model import InitialModel

TORCH_COMPILE = ("auto", "on", "off")
PADDING_FREE = ("auto", "on", "off")
WITHIN_DOCUMENTS = "within-documents"
ATTENTION = ("within-sequences", WITHIN_DOCUMENTS)
WARMUP_SHARE = 0.06
"""Share of the steps, without a preset: as for large, and in domain-adaptive pretraining (Gururangan et al. 2020)."""
LONGEST_BY_DEFAULT = 512
"""Tokens per sequence, as in the paper; a config with more positions needs --max_seq_length to use them."""


@dataclass(frozen=True)
class StartOptions(Settings):
    """How a run starts; config.json has the settings that follow from these options."""

    deepspeed_config: Path | None = option("DeepSpeed JSON; see ds_configs/ (default: that of --recipe)", None)
    train_batch_size: int | None = option("sequences per optimizer step, instead of the JSON's", None)
    learning_rate: float | None = option("peak learning rate (with Muon: Adam's), instead of the JSON's", None)
    muon_lr: float | None = option("peak learning rate of Muon's matrices, instead of the JSON's", None)
    model: str | None = option(
        f"{', '.join(PRESETS)} (default: base with a GPU, tiny without), or, for another architecture, a "
        "transformers RobertaConfig: a config.json or its folder; its weights are not read (see --init_from)",
        None,
        type=model_choice,
    )
    hidden_dropout_prob: float | None = option(
        "dropout of hidden states (default: 0.1, or that of the config or of the model of --init_from)", None
    )
    attention_probs_dropout_prob: float | None = option(
        "dropout of attention weights (default: as for --hidden_dropout_prob)", None
    )
    extend_positions: bool = option(
        "allow longer sequences than --init_from's model was trained on, by repeating its learned positions", False
    )
    remap_token_embeddings: bool = option(
        "allow data made with another tokenizer than --init_from's; embeddings are copied by the tokens' texts", False
    )
    max_seq_length_schedule: str | None = option(
        "STEP:LENGTH pairs that end with --max_seq_length, such as 0:128,9000:512 or 0:128,90%%:512", None
    )
    train_batch_size_schedule: str | None = option(
        "STEP:SIZE pairs that end with the batch size, such as 0:1024,5000:8192 or 0:1024,10%%:8192", None
    )
    max_tokens: int | None = option("end after about this many tokens, padding not counted: fixes max_steps", None)
    max_minutes: float | None = option(
        "end after about this many minutes, start and evaluations included: fixes max_steps by the speed measured at "
        "the start",
        None,
    )
    allow_change: str | None = option("what may differ from the checkpoint's run, such as seed,masking.unit", None)
    rendezvous_timeout: float = option("seconds that processes wait for each other at the start", RENDEZVOUS_TIMEOUT)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Data, objective and files; all settings of a run, as config.json keeps them.

    Attributes:
        model_name: the preset's name, or that of the config or folder that the run starts from.
        source_weights: the weight of each source; if None, every sequence is trained on equally often.
    """

    data_dir: Path = option("folder made by 'preprocess shard'", Path("data/corpus"))
    output_dir: Path = option("the run's folder (default: runs/MODEL)")
    model_name: str
    model: ModelConfig
    packing: PackingConfig
    schedule: ScheduleConfig
    stages: tuple[Stage, ...]
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    source_weights: dict[str, int] | None = option(
        "each source's share of the sequences: NAME=WEIGHT,… (default: all sequences equally often)", None, type=str
    )
    seed: int = option(
        "seed of weights, order, masks and dropout",
        0,
        check=must_be("from 0 to 2**63 - 1", lambda seed: 0 <= seed < 2**63),  # what torch's generators accept
    )
    eval_sequences: int = option(
        "maximum number of held-out sequences to evaluate on", EVAL_SEQUENCES, check=require_positive
    )
    resume: str = option(
        "'auto': the newest good checkpoint of output_dir, if any; or a checkpoint's folder; one in DeepSpeed's own "
        "layout contains pickles, which can run code: name only one that you trust",
        "auto",
    )
    save_deepspeed_checkpoint: bool = option(
        "at each save, also write a checkpoint in DeepSpeed's layout (deepspeed_checkpoints/); training waits for it",
        False,
    )
    torch_compile: str = option(
        "compile the model; auto: its layers, on a GPU at ZeRO stages 0 to 2", "auto", choices=TORCH_COMPILE
    )
    deterministic: bool = option(
        "on a GPU, repeat backward passes bit for bit, too, so that a resumed run ends with the same bits; slower",
        False,
    )
    padding_free: str = option(
        "compute no padding; auto: on a CPU, without --torch_compile. On a GPU it is flash attention, in 16 bits",
        "auto",
        choices=PADDING_FREE,
    )
    attention: str = option(
        "what a token attends to: its sequence, or only its own document in it, which needs --padding_free",
        ATTENTION[0],
        choices=ATTENTION,
    )
    initial_attention: str = option(
        "random: as BERT's; neighbours: the first layer's first heads begin by attending to the adjacent tokens, by "
        "position embeddings that are sinusoids and stay so",
        RANDOM,
        choices=INITIAL_ATTENTION,
    )
    initial_bias: str = option(
        "zero: as BERT's; frequencies: the head begins by predicting tokens as often as the training split has them",
        ZERO,
        choices=INITIAL_BIAS,
    )
    no_decay_bias_and_norm: bool = option(
        "exempt biases and LayerNorms from the JSON's weight decay (the paper does not)", False
    )
    objective: str = option(
        "; ".join(f"{name}: {summary}" for name, summary in SUMMARIES.items()), "mlm", choices=SUMMARIES
    )
    recipe: str | None = option(
        "the JSON and the defaults of other options; fast: for small budgets; paper: those of Liu et al. 2019, which "
        "also apply with --deepspeed_config alone",
        None,
        choices=RECIPES,
    )
    init_from: Path | None = option(
        "start from this trained model instead of random weights: a transformers folder or one of our checkpoints", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        objective = find_objective(self.objective, self.packing)
        for name, usual in (("initial_attention", RANDOM), ("initial_bias", ZERO)):
            if self.init_from is not None and getattr(self, name) != usual:
                raise UserError(
                    f"--{name} {getattr(self, name)} does nothing with --init_from, whose trained weights take its "
                    "place: remove one of them"
                )
        if self.initial_bias != ZERO and not objective.predicts_tokens:
            raise UserError(
                f"--initial_bias {self.initial_bias} does nothing with --objective {self.objective}: remove it"
            )
        for name in ("mask_replace_prob", "random_replace_prob"):
            value = getattr(self.masking, name)
            if value != getattr(MaskingConfig, name) and not objective.predicts_tokens:
                raise UserError(f"--{name} {value:g} does nothing with --objective {self.objective}: remove it")
        if self.attention == WITHIN_DOCUMENTS and self.packing.format not in PACKED_ACROSS_DOCUMENTS:
            raise UserError(
                f"--attention {self.attention} does nothing with --packing {self.packing.format}, whose sequences do "
                "not run on into another document: remove it"
            )
        if self.attention == WITHIN_DOCUMENTS and objective.reads_first_token:
            raise UserError(
                f"--objective {self.objective} predicts a whole sequence from its first token, which with --attention "
                f"{self.attention} sees only the first document: remove one of them"
            )
        if self.stages[-1].first_step >= self.schedule.max_steps:
            raise UserError(
                f"a schedule changes at step {self.stages[-1].first_step}, which --max_steps {self.schedule.max_steps} "
                "does not reach: shorten the schedule or raise --max_steps"
            )

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in tree.items()}


@dataclass(frozen=True)
class Run:
    """A run's inputs, read and checked; the same on every rank.

    Attributes:
        deepspeed: the checked DeepSpeed JSON.
        compiled: whether the encoder is compiled.
        padding_free: whether no padding is computed.
        options: those of `launch/pretrain.py`.
        budget: what `max_steps` is still to be fixed by, by the option's name; see `training.budget`.
        began: `time.perf_counter()` when its settings were read.
        initial_model: the model that a fresh run starts from, instead of random weights.
    """

    ranks: Ranks
    config: RunConfig
    corpus: Corpus
    deepspeed: DeepSpeedConfig
    precision: str
    compiled: bool
    padding_free: bool
    options: Namespace
    budget: dict[str, float]
    initial_model: InitialModel | None
    monitors: Monitors
    began: float = field(default_factory=time.perf_counter)


def pretrain_options(deepspeed_config: Path | None = None, **given: Any) -> Namespace:
    """The options of `launch/pretrain.py` by their names, completed by their defaults, if no recipe may set them.

    Raises:
        TypeError: there is no such option.
    """
    defaults = {each.name: each.default for group in (StartOptions, RunConfig) for each in options_of(group)}
    defaults |= dict.fromkeys(OPTIONS_OF_RECIPES)
    for name in given:
        if name not in defaults:
            raise TypeError(unknown_key_message("option", name, defaults))
    return Namespace(**{**defaults, **given, "deepspeed_config": deepspeed_config})


def run_config(
    options: Namespace, corpus: Corpus, train_batch_size: int, has_gpu: bool, initial: InitialModel | None
) -> RunConfig:
    """The run's settings, completed from the recipe, the preset or the model of `--init_from`, and the batch size.

    Raises:
        UserError: a value is out of range, missing, or has no effect.
    """
    if initial is not None:
        name, model, defaults = _of_initial(options, corpus, initial)
    else:
        for name in ("extend_positions", "remap_token_embeddings"):
            if getattr(options, name):
                raise UserError(f"--{name} needs --init_from: give both, or remove it")
        chosen = options.model or ("base" if has_gpu else "tiny")
        name, model, defaults = (_of_preset if chosen in PRESETS else _of_config)(chosen, options, corpus)
    if options.recipe is not None:
        defaults |= RECIPES[options.recipe].options_beside(vars(options))
    values = {**vars(options), **{name: value for name, value in defaults.items() if getattr(options, name) is None}}
    dropout = {name: values[name] for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    for each in ("warmup_steps", "decay_steps"):
        if values[each] is not None:
            values[each] = step_number(f"--{each}", values[each], values["max_steps"])
    stages = make_stages(
        values["max_seq_length"],
        train_batch_size,
        values["max_seq_length_schedule"],
        values["train_batch_size_schedule"],
        values["max_steps"],
    )
    return RunConfig.from_options(
        values,
        model_name=name,
        model=replace(model, **{name: value for name, value in dropout.items() if value is not None}),
        stages=stages,
        source_weights=parse_source_weights(options.source_weights, corpus.manifest),
    )


def _of_preset(name: str, options: Namespace, corpus: Corpus) -> tuple[str, ModelConfig, dict[str, Any]]:
    """Name and architecture of the model, and the defaults of the options that depend on it."""
    preset, tokenizer = PRESETS[name], corpus.manifest.tokenizer
    max_seq_length = preset.max_seq_length if options.max_seq_length is None else options.max_seq_length
    max_steps = preset.max_steps if options.max_steps is None else options.max_steps
    return (
        name,
        model_config(name, tokenizer.vocab_size, max_seq_length, **tokenizer.config_ids),
        {
            "output_dir": Path("runs") / name,
            "max_seq_length": max_seq_length,
            "max_steps": max_steps,
            "warmup_steps": max_steps * preset.warmup_steps // preset.max_steps,
        },
    )


def _of_config(chosen: str, options: Namespace, corpus: Corpus) -> tuple[str, ModelConfig, dict[str, Any]]:
    """As `_of_preset`, for a transformers config."""
    path = config_path(chosen)
    model = read_architecture(path, corpus.manifest.tokenizer)
    if options.output_dir is None or options.max_steps is None:
        raise UserError(
            f"--model {chosen!r} comes without a training recipe: give --output_dir and --max_steps (or --max_tokens, "
            "--max_minutes)"
        )
    longest = min(LONGEST_BY_DEFAULT, model.max_length)
    max_seq_length = longest if options.max_seq_length is None else options.max_seq_length
    if max_seq_length > model.max_length:
        raise UserError(
            f"--max_seq_length {max_seq_length} is more than the {model.max_length} tokens that {str(path)!r} allows: "
            f"give less, or raise its max_position_embeddings, {model.max_position_embeddings}"
        )
    name = path.resolve().parent.name if path.name == CONFIG_NAME else path.stem
    return name, model, {"max_seq_length": max_seq_length, "warmup_steps": int(WARMUP_SHARE * options.max_steps)}


def model_origin(chosen: str | None, model: ModelConfig, has_gpu: bool) -> str:
    """How the model of a run without --init_from was chosen, unless that is obvious; starts with a space."""
    if chosen is None:
        return f" (the default {'with' if has_gpu else 'without'} a GPU; --model chooses)"
    if chosen in PRESETS:
        return ""
    path = config_path(chosen)
    unused = ", ".join(unused_fields(path))
    return (
        f" (the architecture of {path}: {model.num_hidden_layers} layers of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads, MLP of {model.intermediate_size} with {model.hidden_act}, "
        f"{model.vocab_size:,} ids, {model.max_length} tokens at most; the weights are random: --init_from starts from "
        f"trained ones{f'; not used: {unused}' if unused else ''})"
    )


def _of_initial(options: Namespace, corpus: Corpus, initial: InitialModel) -> tuple[str, ModelConfig, dict[str, Any]]:
    """As `_of_preset`, for the model of `--init_from`."""
    if options.model is not None:
        raise UserError(
            f"--model {options.model} does nothing with --init_from, which sets the model: remove one of them"
        )
    if options.output_dir is None or options.max_steps is None:
        raise UserError(
            "--init_from comes without a training recipe: give --output_dir and --max_steps (12500 steps of 2,048 "
            "sequences in domain-adaptive pretraining, Gururangan et al. 2020)"
        )
    max_seq_length = initial.learned_positions if options.max_seq_length is None else options.max_seq_length
    model = initial.resized(corpus, max_seq_length, options.extend_positions, options.remap_token_embeddings)
    warmup_steps = int(WARMUP_SHARE * options.max_steps)
    return initial.folder.resolve().name, model, {"max_seq_length": max_seq_length, "warmup_steps": warmup_steps}
