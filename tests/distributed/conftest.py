"""A prepared corpus for the distributed tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from groups import SEQUENCE_LENGTH

from benchmarks.environment import REPOSITORY, python_path
from ds_roberta.config import PackingConfig
from ds_roberta.data.packing import build_index
from ds_roberta.data.shards import Corpus


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/corpus with a vocabulary of 1,000, prepared by the real commands, with its packing index."""
    folder = tmp_path_factory.mktemp("corpus")
    source = str(REPOSITORY / "examples/corpus/ethan-frome.txt")
    for command in (
        ["train-tokenizer", "--input", source, "--vocab_size", "1000", "--output", str(folder / "tokenizer")],
        ["shard", "--input", source, "--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "data")],
    ):
        command = [sys.executable, "-m", "preprocessing.cli", *command]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path()}, check=True, capture_output=True)
    corpus = Corpus.open(folder / "data")
    build_index(corpus, "train", PackingConfig(SEQUENCE_LENGTH))
    return folder / "data"
