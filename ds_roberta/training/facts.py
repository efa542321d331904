"""Facts about a run: what a resumed run must share, what all its processes must share, and the record `config.json`."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Collection
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

import ds_roberta
from ds_roberta.config import MaskingConfig, ModelConfig, PackingConfig
from ds_roberta.data.shards import Corpus
from ds_roberta.data.stages import schedule_text
from ds_roberta.data.words import WORDS_VERSION
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.errors import UserError, unknown_key_message
from ds_roberta.files import json_fingerprint
from ds_roberta.model.initialization import RANDOM, ZERO
from ds_roberta.model.objectives import find_objective
from ds_roberta.training.micro_batch import BatchPlan
from ds_roberta.training.peak import Peak
from ds_roberta.training.settings import WITHIN_DOCUMENTS, Run

if TYPE_CHECKING:
    from ds_roberta.training.engine import Engine


_COUNTED = "the sequences of a step are found by counting batches: some would be repeated or skipped"
_FIXED = {
    "model": "the weights have that architecture; --init_from can start another run from them",
    "next_sentence_prediction": "the weights have a head for it, or have none",
    "objective": "the weights have only its head; --init_from can start another run from the encoder",
    "optimizer": "the checkpoint has its moments; --init_from can start another run from the weights",
    "train_batch_size": _COUNTED,
    "train_batch_size_schedule": _COUNTED,
}
"""Parts of the identity that no resumed run may change, and why; `_CHANGEABLE` ones are exceptions."""
_CHANGEABLE = ("model.hidden_dropout_prob", "model.attention_probs_dropout_prob")


def run_identity(run: Run) -> dict[str, Any]:
    """What a resumed run must share with the run of its checkpoint."""
    config, initial_model = run.config, run.initial_model
    version = run.corpus.manifest.packing_version
    return {
        "data": run.corpus.manifest.fingerprint,
        "tokenizer": run.corpus.manifest.tokenizer.fingerprint,
        "model": asdict(config.model),
        "init_from": run.ranks.on_main(lambda: initial_model.fingerprint) if initial_model else None,
        "packing": {**asdict(config.packing), **({"version": version} if version > 2 else {})},
        **find_objective(config.objective, config.packing).identity(),
        "source_weights": config.source_weights,
        "masking": {**asdict(config.masking), **({"words": WORDS_VERSION} if config.masking.unit != "token" else {})},
        "seed": config.seed,
        "train_batch_size": run.deepspeed.train_batch_size,
        "max_seq_length_schedule": schedule_text(config.stages, "max_seq_length"),
        "train_batch_size_schedule": schedule_text(config.stages, "train_batch_size"),
        # Numbers of steps are left out: a run may be given more, or end in a decay from its current step.
        **{name: getattr(config.schedule, name) for name in ("lr_scheduler_type", "lr_power", "min_lr_ratio")},
        "no_decay_bias_and_norm": config.no_decay_bias_and_norm or None,  # None: as before the option existed
        "attention": config.attention if config.attention == WITHIN_DOCUMENTS else None,
        "initial_attention": None if config.initial_attention == RANDOM else config.initial_attention,
        "initial_bias": None if config.initial_bias == ZERO else config.initial_bias,
        "decay_type": config.schedule.decay_type,
        "optimizer": "Adam" if run.deepspeed.muon_lr is None else "Muon",
    }


def completed_identity(saved: dict[str, Any]) -> dict[str, Any]:
    """An identity from an earlier version, with the settings that it did not have at their defaults."""
    completed = {"optimizer": "Adam", **saved}
    for name, group in (("model", ModelConfig), ("masking", MaskingConfig), ("packing", PackingConfig)):
        own = {field.name for field in fields(group)}
        values = saved.get(name, {})
        completed[name] = {**asdict(group(**{key: values[key] for key in own & values.keys()})), **values}
    return completed


def check_identity(
    checkpoint: Path, saved: dict[str, Any], current: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Compare the identities of the checkpoint's run and of this one.

    Args:
        allowed: names that may differ, dotted ("masking.unit") or of a whole group ("masking").

    Returns:
        A description of each difference, all of them allowed.

    Raises:
        UserError: they differ in something else, which is named; or a name in `allowed` is unknown, or names
            something that can never change.
    """
    before, now = _leaves(saved), _leaves(current)
    names = {**now, **before}
    groups = {name.split(".")[0] for name in names}
    for name in allowed:
        # A run whose checkpoints have lost such a name with an allowed change is started by the same command.
        if name not in names and name not in groups and not name.startswith(_NOT_IN_EVERY_RUN):
            raise UserError(unknown_key_message("name in --allow_change", name, [*groups, *names]))
        if (reason := _why_fixed(name)) is not None:
            raise UserError(f"--allow_change {name}: it can never change in a run: {reason}")
    allowed = {*allowed, *(["masking.words"] if "masking.unit" in allowed else [])}  # only units of words have these
    changes = []
    for name in names:
        if before.get(name) == now.get(name):
            continue
        change = f"its {name} is {before.get(name)!r}, this run's is {now.get(name)!r}"
        reason = _why_fixed(name)
        if reason is None and (name in allowed or name.split(".")[0] in allowed):
            changes.append(change)
            continue
        remedy = f"({reason})" if reason else f"or allow it by --allow_change {name},"
        raise UserError(
            f"cannot resume from {str(checkpoint)!r}: {change}; use the same, {remedy} or another --output_dir to "
            "start again"
        )
    return changes


_NOT_IN_EVERY_RUN = ("masking.words", "packing.version", "source_weights.")


def _why_fixed(name: str) -> str | None:
    return None if name in _CHANGEABLE else _FIXED.get(name.split(".")[0])


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested objects by their dotted names."""
    leaves = {}
    for name, value in tree.items():
        leaves.update(_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return leaves


_PATHS = ("data_dir", "deepspeed_config")  # compared by content: a host may have them elsewhere


def shared_facts(
    options: dict[str, Any], deepspeed_config: DeepSpeedConfig, corpus: Corpus, model: ModelConfig, precision: str
) -> dict[str, str]:
    """This process's program, options, data, model and precision, in the words of an error about different hosts."""
    return {
        "ds_roberta": f"{ds_roberta.__version__} of source {source_fingerprint()}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **{f"--{name}": str(value) for name, value in options.items() if name not in _PATHS},
        "--deepspeed_config": f"of content {json_fingerprint(deepspeed_config.content)}",
        "--data_dir": f"of data {corpus.manifest.fingerprint}",
        "model": f"of architecture {json_fingerprint(asdict(model))}",
        "precision": precision,
    }


def source_fingerprint() -> str:
    """A hash of this package's Python files: it shows uncommitted changes, too."""
    package = Path(ds_roberta.__file__).parent
    digest = xxhash.xxh3_128()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_record(run: Run, engine: Engine, plans: list[BatchPlan], peak: Peak) -> dict[str, Any]:
    """What it takes to reproduce the run: settings, the resolved DeepSpeed configuration, versions, commit, machine."""
    return {
        "run": run.config.as_json(),
        "deepspeed": engine.config,
        "monitors": run.deepspeed.monitors,
        "batches": [asdict(plan) for plan in plans],
        "precision": run.precision,
        "compiled": run.compiled,
        "padding_free": run.padding_free,
        "device": str(engine.device),
        "peak": asdict(peak),
        "versions": {
            "ds_roberta": ds_roberta.__version__,
            "deepspeed": engine.deepspeed_version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this program, if it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
