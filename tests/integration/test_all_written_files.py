"""All commands that write: a disk that refuses loses nothing, and the umask decides who may read."""

import argparse
import errno
import itertools
import multiprocessing
import os
import shutil
import stat
import sys
import traceback

import numpy as np
import pytest
from fake_engine import IDENTITY, FakeEngine

from ds_roberta.config import PackingConfig, model_config
from ds_roberta.data.packing import build_index
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.evaluation.minimal_pairs import Pair, write_pairs
from ds_roberta.files import write_figures
from ds_roberta.finetuning.prediction_files import write_predictions
from ds_roberta.model.export import CARD_SIGNATURE, export
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.report.page import write_report
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention
from ds_roberta.training.metrics import MetricsLog
from preprocessing.commands import shard, train_tokenizer
from preprocessing.prepared.megatron import export_split
from preprocessing.prepared.stats import corpus_stats, plot

FORK = multiprocessing.get_context("fork")  # a hook of the interpreter stays for ever


def save_checkpoint(ranks, tokenizer_folder, out):
    with CheckpointWriter(FakeEngine(ranks), tokenizer_folder, out, Retention(2)) as writer:
        writer.save(TrainState(IDENTITY, 5, best_step=5))


def add_row(out):
    out.mkdir(exist_ok=True)
    MetricsLog(out, 2).write({"global_step": 1})


@pytest.fixture(scope="module")
def stats(corpus):
    return corpus_stats(corpus, [])


@pytest.fixture
def products(tmp_path, corpus, stats, tokenizer_folder, solo_ranks):
    """Functions that write what a command does to the path that they get, replacing what is there."""
    text = tmp_path / "text.txt"
    text.write_text("kato miren sulpa\n\n" * 20)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"global_step": 1, "loss": 2.0}\n{"global_step": 2, "loss": 1.0}\n')
    config = model_config("nano", 400, 48)
    weights = {name: parameter.detach() for name, parameter in MaskedLM(config).named_parameters()}

    return {
        "tokenizer": lambda out: train_tokenizer([str(text)], out, 270),
        "data": lambda out: shard([str(text)], tokenizer_folder, out, workers=1),
        "megatron": lambda out: export_split(corpus, "train", out),
        "plot": lambda out: plot(stats, out.with_suffix(".png")),
        "checkpoint": lambda out: save_checkpoint(solo_ranks, tokenizer_folder, out),
        "metrics": add_row,
        "model": lambda out: export(config, weights, tokenizer_folder, 48, out, CARD_SIGNATURE),
        "report": lambda out: write_report([run], out.with_suffix(".html")),
        "figures": lambda out: write_figures(out, {"loss": 1.0}),
        "pairs": lambda out: write_pairs(out, [Pair("a", "b", "p", "", "line 1")] * 3, np.zeros((3, 2))),
        "predictions": lambda out: write_predictions(out, [{"label": "a"}] * 3),
    }


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def refuse_each_change(produce, replaces, folder, connection):
    """Write to `folder` again and again, with each change refused in turn; sends their number and what went wrong."""
    state = argparse.Namespace(refused=0, count=0)

    def refuse(name, arguments):
        changes = name in ("os.mkdir", "os.rename", "os.chmod", "os.link") or (
            name == "open"
            and (arguments[2] & (os.O_WRONLY | os.O_RDWR) or any(letter in (arguments[1] or "") for letter in "wax+"))
        )
        if state.refused and changes and str(folder) in f"{arguments[0]} {arguments[1]}":
            state.count += 1
            if state.count == state.refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "refused")

    wrong = []
    try:
        sys.addaudithook(refuse)
        produce(folder / "out")
        whole = content(folder)
        for change in itertools.count(1):
            if not replaces:
                shutil.rmtree(folder)
                folder.mkdir()
            before, problem = content(folder), None
            state.refused, state.count = change, 0
            try:
                produce(folder / "out")
            except UserError as error:
                problem = str(error)
            state.refused = 0
            if state.count < change:
                break
            shutil.rmtree(folder / ".out.partial", ignore_errors=True)  # what the same command would go on from
            left = content(folder)
            right = left == before and "No space left" in problem if problem else replaces or left == whole
            if not right:
                wrong.append((change, problem, sorted(map(str, left.keys() ^ before.keys()))))
        connection.send((change, wrong))
    except BaseException:
        connection.send((0, [*wrong, traceback.format_exc()]))


FRESH = {"tokenizer", "data", "megatron", "model", "pairs", "predictions"}
REPLACED = {"data", "checkpoint", "metrics", "figures"}


@pytest.mark.parametrize(
    ("product", "replaces"), [*((name, False) for name in sorted(FRESH)), *((name, True) for name in sorted(REPLACED))]
)
def test_a_disk_that_refuses_any_change_is_one_error_and_leaves_what_was_there(products, tmp_path, product, replaces):
    folder = tmp_path / "folder"
    folder.mkdir()
    receiving, sending = FORK.Pipe()
    child = FORK.Process(target=refuse_each_change, args=(products[product], replaces, folder, sending))
    child.start()
    sending.close()  # so that a child that is gone is no longer waited for
    changes, wrong = receiving.recv()
    child.join()
    assert wrong == []
    assert changes > 2


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_and_folder_of_a_product_has_the_permissions_that_the_umask_leaves(products, tmp_path, mask):
    folder = tmp_path / "folder"
    before = os.umask(mask)
    try:
        folder.mkdir()
        for name, produce in products.items():
            produce(folder / name)
        build_index(Corpus.open(folder / "data"), "train", PackingConfig(32))
    finally:
        os.umask(before)
    paths = list(folder.rglob("*"))
    assert len(paths) > 30
    wrong = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode))
        for path in paths
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}
