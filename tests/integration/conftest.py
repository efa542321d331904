"""A prepared corpus for runs of the real commands, in a folder of its own."""

from pathlib import Path

import pytest
from commands import REPOSITORY, run


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which data/corpus was prepared by the commands, from two works of the example corpus."""
    folder = tmp_path_factory.mktemp("workspace")
    names = ("ethan-frome.txt", "the-railway-children.txt")
    works = [f"books={REPOSITORY / 'examples/corpus' / name}" for name in names]
    run(
        "preprocess",
        "train-tokenizer",
        "--input",
        *works,
        "--vocab_size",
        "2000",
        "--output",
        "data/tokenizer",
        cwd=folder,
    )
    run(
        *("preprocess", "shard", "--input", *works, "--tokenizer", "data/tokenizer", "--output", "data/corpus"),
        *("--validation_fraction", "0.05", "--workers", "2"),
        cwd=folder,
    )
    return folder
