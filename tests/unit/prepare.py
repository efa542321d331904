"""Prepared data for tests, made as `preprocess shard` makes it."""

from preprocessing.jobs.workers import local_workers
from preprocessing.sharding import run_job
from preprocessing.tokens.encoders import AUTO


def prepare_corpus(files, tokenizer, output, options, workers=1, sources=None, backend=AUTO):
    """The manifest and the totals of `run_job` on processes of this machine."""
    with local_workers(workers) as local:
        return run_job(files, tokenizer, output, options, local, sources, backend)
