"""Readers of the folders and settings that commands take: tokenizers, models, data, checkpoints, runs."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
import xxhash
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks.environment import REPOSITORY
from benchmarks.fuzz_inputs import Case, Files, any_bytes, changed_bytes, changed_json, folder_with_errors, json_bytes
from benchmarks.fuzz_rows import Reader, attempt_all, only
from ds_roberta.data.manifest import TOKENIZER_FOLDER
from ds_roberta.data.stages import read_skipped
from ds_roberta.data.tokenizer import TokenizerInfo, ids_inside_characters
from ds_roberta.data.unigram import post_processor
from ds_roberta.data.words import word_flags
from ds_roberta.deepspeed_config import DeepSpeedConfig
from ds_roberta.finetuning.deepspeed_json import read_deepspeed_json
from ds_roberta.finetuning.predict import open_finetuned
from ds_roberta.model.architecture import read_architecture
from ds_roberta.report.page import page
from ds_roberta.report.plots import METRICS, draw
from ds_roberta.report.runs import read_runs
from ds_roberta.training import checkpoint
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.export import export_checkpoint
from ds_roberta.training.facts import check_identity, completed_identity
from ds_roberta.training.initial_model import InitialModel
from ds_roberta.training.metrics import MetricsLog
from ds_roberta.transformers_folder import open_folder, open_tokenizer, parameters_by_name, quiet, read_model
from preprocessing.tokens.bpe import train_bpe
from preprocessing.tokens.corpus_tokenizer import copy_tokenizer

VOCABULARY, LENGTH = 280, 30


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def values_of(files: Files) -> dict[str, Any]:
    """The values in those files that are JSON."""
    return {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}


def folders(make: Callable[[], Files], prefix: str = "") -> SearchStrategy[Case]:
    """Folders with errors in the files whose paths begin with `prefix`; the valid one is made when it is needed."""

    def strategy() -> SearchStrategy[Case]:
        files = make()
        chosen = {name: content for name, content in files.items() if name.startswith(prefix)}
        return folder_with_errors(chosen, values_of(chosen)).map(
            lambda case: Case({name: data for name, data in files.items() if name not in chosen} | case.files)
        )

    return st.deferred(strategy)


# Tokenizers


@cache
def tokenizer_files() -> Files:
    """A byte-level BPE."""
    with tempfile.TemporaryDirectory() as folder:
        train_bpe(iter([["the dog and the cat and the other one"] * 20]), VOCABULARY, Path(folder))
        return files_of(Path(folder))


def _vocabulary_files() -> Files:
    content = json.loads(tokenizer_files()["tokenizer.json"])["model"]
    vocabulary = {name: number for name, number in content["vocab"].items() if name != "<mask>"}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    return {
        "vocab.json": json_bytes(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "added_tokens.json": json_bytes({"<mask>": len(vocabulary)}),
        "tokenizer_config.json": b'{"model_max_length": 512}',
    }


def _unigram_files() -> Files:
    special = ("<s>", "<pad>", "</s>", "<unk>")
    pieces = [
        *((token, 0.0) for token in special),
        ("▁the", -1.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in "abcdet"),
    ]
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = [*special, "<mask>"]
    numbers = [*range(len(special)), len(pieces)]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": name, **flags} for number, name in zip(numbers, names, strict=True)],
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, mark]},
        "post_processor": post_processor(0, 2),
        "decoder": mark,
        "model": {"type": "Unigram", "unk_id": 3, "byte_fallback": False, "vocab": [*pieces, ("<mask>", 0.0)]},
    }
    return {"tokenizer.json": json_bytes(content), "tokenizer_config.json": b'{"model_max_length": 512}'}


def _read_tokenizer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(io.StringIO()):
        attempt_all(
            lambda: copy_tokenizer(folder, Path(temporary) / "copy"),
            lambda: open_tokenizer(folder),
            lambda: ids_inside_characters(folder),
            lambda: word_flags(folder, TokenizerInfo.read(folder).vocab_size),
        )


# Settings

_SETTINGS = [json.loads(path.read_bytes()) for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))]


def _read_settings(folder: Path) -> None:
    def pretraining() -> None:
        config = DeepSpeedConfig.read(only(folder))
        config.resolved(config.precision(("bf16",), ("bf16", "fp16", "fp32")), on_gpu=False)
        assert config.train_batch_size > 0
        assert config.learning_rate > 0
        assert config.micro_batch_size is None or config.micro_batch_size > 0
        assert config.recomputed_layers >= 0
        assert config.monitors is not None
        assert config.notes is not None

    attempt_all(pretraining, lambda: read_deepspeed_json(only(folder)))


# Models


@cache
def _model() -> transformers.RobertaForMaskedLM:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes, **tokens))


@cache
def model_files(kind: str = "masked") -> Files:
    """A masked-LM model, or one that was fine-tuned for classification, with safetensors or pickled weights."""
    model: Any = _model()
    if kind == "classes":
        labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
        model = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**model.config.to_diff_dict() | labels)
        )
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        if kind == "pickled":
            weights = Path(folder) / "model.safetensors"
            torch.save(safetensors.torch.load_file(weights), Path(folder) / "pytorch_model.bin")
            weights.unlink()
        files = files_of(Path(folder))
    if kind == "classes":
        files["results.json"] = json_bytes(
            {"task": "classification", "label_names": ["a", "b"], "text_columns": ["text", None], "best": {"f1": 1.0}}
        )
    return files | tokenizer_files()


def _with_header(change: Callable[[Any], SearchStrategy[bytes]]) -> SearchStrategy[Case]:
    """Models whose weights have a header with errors."""
    files = model_files()
    weights = files["model.safetensors"]
    size = 8 + int.from_bytes(weights[:8], "little")

    def put(header: bytes) -> Case:
        return Case(files | {"model.safetensors": len(header).to_bytes(8, "little") + header + weights[size:]})

    return change(json.loads(weights[8:size])).map(put)


def _read_model_folder(folder: Path) -> None:
    def weights() -> None:
        model = read_model(folder, transformers.RobertaForMaskedLM)
        assert parameters_by_name(model)

    attempt_all(
        lambda: open_folder(folder),
        weights,
        lambda: InitialModel.open(folder),
        lambda: read_architecture(folder / "config.json"),
    )


# Checkpoints


@cache
def checkpoint_files() -> Files:
    weights = {name: parameter.detach() for name, parameter in parameters_by_name(_model()).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(json_bytes(_model().config.to_dict()))
        architecture = asdict(read_architecture(path))
    identity = {
        "model": architecture,
        "data": "0" * 32,
        "seed": 1,
        "packing": {"max_seq_length": LENGTH, "format": "full-sentences"},
        "masking": {"unit": "token", "mlm_probability": 0.15},
        "max_seq_length_schedule": f"0:{LENGTH}",
        "train_batch_size_schedule": "0:8",
        "train_batch_size": 8,
    }
    state = TrainState(
        identity, global_step=3, consumed_samples=24, consumed_tokens=600, best_eval_loss=2.0, best_step=2
    )
    tensors = {f"{kind}.{name}": weight.clone() for name, weight in weights.items() for kind in ("weight", "exp_avg")}
    skipped = [{"global_step": 1, "max_seq_length": LENGTH, "first_place": 8, "end_place": 16}]
    return {
        "state-00000-of-00001.safetensors": safetensors.torch.save(tensors),
        "train_state.json": json_bytes(asdict(state) | {"skipped_places": skipped}),
        **{f"{TOKENIZER_FOLDER}/{name}": content for name, content in tokenizer_files().items()},
    }


def signed(files: Files) -> Files:
    """A checkpoint's files with the manifest that they need."""
    entries = {
        name: {"bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)} for name, content in files.items()
    }
    return {**files, "manifest.json": json_bytes({"format_version": checkpoint.FORMAT_VERSION, "files": entries})}


def _checkpoints() -> SearchStrategy[Case]:
    whole = signed(checkpoint_files())
    damaged = folder_with_errors(whole, values_of(whole))
    hostile = folder_with_errors(checkpoint_files(), values_of(checkpoint_files()))
    return damaged | hostile.map(lambda case: Case(signed(case.files)))


def _read_checkpoint(folder: Path) -> None:
    def resumed() -> None:
        checkpoint.verify(folder)
        identity = json.loads(checkpoint_files()["train_state.json"])["identity"]
        state = checkpoint.read_state(folder)
        with checkpoint.errors_of_the_state(folder):
            check_identity(folder, completed_identity(state.identity), completed_identity(identity))
            assert state.trained_length

    with tempfile.TemporaryDirectory() as temporary:
        attempt_all(
            resumed,
            lambda: InitialModel.open(folder),
            lambda: read_skipped(folder),
            lambda: export_checkpoint(folder, Path(temporary) / "model"),
        )


# Runs

_METRICS = [
    {"global_step": 1, "loss": 9.5, "learning_rate": 0.001, "grad_norm": 1.5, "tokens_per_second": 10.0, "mfu": 0.1},
    {"global_step": 2, "loss": 8.5, "learning_rate": 0.002, "grad_norm": None, "consumed_tokens": 100},
    {"global_step": 2, "eval_loss": 8.0, "unigram_loss": 9.0},
]
_RECORD = {
    "run": {"model": {"hidden_size": 8}, "schedule": {"max_steps": 2}, "seed": 1, "output_dir": "x"},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "precision": "bf16",
    "versions": {"torch": "2.0", "python": "3"},
    "device": "cpu",
}
_RESULTS = {
    "results.json": {
        "task": "classification",
        "best": {"setting": {"learning_rate": 1e-5}, "accuracy": 0.9},
        "settings": [{"learning_rate": 1e-5, "mean": 0.5, "runs": [{"seed": 1, "epochs": [{"loss": 1.0}]}]}],
    },
    "evaluation.json": {
        "perplexity": 3.0,
        "by_position": [{"first": 0, "last": 9, "loss": 2.0}, {"first": 10, "last": 19, "loss": None}],
    },
    "error_analysis.json": {
        "unit": "texts",
        "labels": ["a", "b"],
        "confusion": {"a": {"a": 3, "b": 1}, "b": {"b": 2}},
        "label_counts": {"a": {"true_positives": 1, "false_positives": 0, "false_negatives": 2}},
        "worst": [{"loss": 1.5, "gold": "a", "predicted": "b", "text": "t", "place": "row 1"}],
    },
}


def _run_files() -> Files:
    rows = b"".join(json_bytes(row) + b"\n" for row in _METRICS)
    return {
        "metrics.jsonl": rows,
        "config.json": json_bytes(_RECORD),
        "evaluation.json": json_bytes(_RESULTS["evaluation.json"]),
    }


def _changed_metrics() -> SearchStrategy[Case]:
    rows = changed_json(_METRICS[0]).map(lambda row: row.replace(b"\n", b" ") + b"\n" + json_bytes(_METRICS[2]) + b"\n")
    lines = rows | changed_bytes((_run_files()["metrics.jsonl"],)) | any_bytes()
    return lines.map(lambda data: Case(_run_files() | {"metrics.jsonl": data}))


def _read_run(folder: Path, resumed: bool = True) -> None:
    def reported() -> None:
        runs = read_runs([folder])
        metrics = [metric for metric in METRICS if any(map(metric.of, runs))]
        page(runs, dict.fromkeys(metrics, b""))
        for metric in metrics[:1]:
            draw(runs, metric)

    calls = [reported, *([lambda: MetricsLog(folder, 2)] if resumed else [])]
    attempt_all(*calls)


def folder_readers() -> dict[str, Reader]:
    """The readers of this module, by the names of what they read."""
    tokenizers = folders(tokenizer_files) | folders(_vocabulary_files) | folders(_unigram_files)
    kinds = [folders(partial(model_files, kind)) for kind in ("masked", "pickled")]
    results = {name: json_bytes(value) for name, value in _RESULTS.items()}
    settings = st.sampled_from(_SETTINGS).flatmap(changed_json) | any_bytes()
    return {
        "tokenizers": Reader(tokenizers, _read_tokenizer),
        "DeepSpeed JSON": Reader(settings.map(lambda data: Case({"settings.json": data})), _read_settings),
        "model folders": Reader(st.one_of(*kinds, st.deferred(lambda: _with_header(changed_json))), _read_model_folder),
        "fine-tuned models": Reader(
            folders(partial(model_files, "classes"), "results") | folders(partial(model_files, "classes"), "config"),
            lambda folder: open_finetuned(folder, None),
        ),
        "checkpoints": Reader(st.deferred(_checkpoints), _read_checkpoint),
        "metrics.jsonl": Reader(_changed_metrics() | folders(_run_files), _read_run),
        "results": Reader(folder_with_errors(results, _RESULTS), partial(_read_run, resumed=False)),
    }
