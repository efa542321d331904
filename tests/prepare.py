"""Prepared data for tests, made as `preprocess shard` makes it."""

import hashlib
import sys

from preprocessing.jobs.workers import local_workers
from preprocessing.reading import accounts
from preprocessing.sharding import run_job
from preprocessing.tokens.encoders import AUTO

DOCUMENTS = [
    f"Document number {i}.\nIt has {i * 37 % 101} words </s>, or so.\nGrüße {'x' * (i % 50)}!" for i in range(200)
]


def prepare_corpus(files, tokenizer, output, options, workers=1, sources=None, backend=AUTO):
    """The manifest and the totals of `run_job` on processes of this machine."""
    with local_workers(workers) as local:
        return run_job(files, tokenizer, output, options, local, sources, backend)


def folder_hash(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), path.read_bytes()) for path in paths]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def forget_filter(module):
    """Let the next job import the module of a `--filter` as a new process would."""
    del sys.modules[module]
    accounts.load_filter.cache_clear()
    accounts._checksum_when_imported.cache_clear()
