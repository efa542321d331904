"""The sequences of a run on several hosts."""

import shutil
from types import SimpleNamespace

import pytest

from ds_roberta.config import PackingConfig, Stage
from ds_roberta.data.packing import INDEX_FOLDER
from ds_roberta.data.shards import Corpus
from ds_roberta.errors import UserError
from ds_roberta.training.run_data import open_data

LENGTH = 24


@pytest.fixture
def copies(corpus, tmp_path):
    """Two copies of the data without an index, as on the disks of two hosts."""
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        shutil.copytree(corpus.folder, folder, ignore=shutil.ignore_patterns(INDEX_FOLDER))
    return folders


def opened(on_ranks, folder_of, local_rank_of, processes):
    def body(ranks):
        ranks.local_rank = local_rank_of(ranks.rank)
        config = SimpleNamespace(
            packing=PackingConfig(LENGTH), stages=[Stage(0, LENGTH, 8)], source_weights=None, seed=0
        )
        return open_data(SimpleNamespace(config=config, ranks=ranks, corpus=Corpus.open(folder_of(ranks.rank))))

    return on_ranks(processes, body)


def test_each_host_with_its_own_copy_of_the_data_gets_an_index(copies, on_ranks):
    found = opened(on_ranks, lambda rank: copies[rank // 2], lambda rank: rank % 2, 4)
    assert len({len(data.train[LENGTH]) for data in found}) == 1
    files = [sorted((path.name, path.read_bytes()) for path in (folder / INDEX_FOLDER).iterdir()) for folder in copies]
    assert files[0] == files[1] != []


def test_a_host_that_cannot_open_its_data_ends_the_run_on_all(copies, on_ranks):
    for path in (copies[1] / "train").glob("*.arrow"):
        path.write_bytes(b"")
    for error in opened(on_ranks, lambda rank: copies[rank], lambda rank: 0, 2):
        assert isinstance(error, UserError)
        assert "was cut or replaced" in str(error)
