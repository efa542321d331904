"""The prepared bytes do not depend on how many processes prepare them, and a killed one ends the others."""

import gzip
import json
import multiprocessing
from multiprocessing.connection import wait

import pytest
from prepare import DOCUMENTS, folder_hash, prepare_corpus

from ds_roberta.lease import JobStopped
from preprocessing.jobs.workers import local_workers
from preprocessing.reading.documents import ReadOptions
from preprocessing.units import ShardOptions

NEAR_COPIES = [f"{text[:200]} changed {text[200:]}" for text in (" ".join(DOCUMENTS[i::20]) for i in range(20))]


@pytest.fixture
def files(tmp_path):
    """Texts of several sources in 9 units, with copies, near copies and a text that is not UTF-8."""
    texts = [*(" ".join(DOCUMENTS[i::20]) for i in range(20)), *NEAR_COPIES, *DOCUMENTS, *DOCUMENTS[::3]]
    rows = [json.dumps({"text": text, "from": f"site {i % 3}"}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(rows[:120]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[120:]).encode()))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n{"text": "bad \xff"}\n{"text": "last"}\n')
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")]


@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
def test_two_workers_write_the_bytes_of_one(files, tokenizer_folder, tmp_path, dedup):
    if dedup == "near":
        pytest.importorskip("rensa", reason="near copies are found with the library rensa")
    options = ShardOptions(
        read=ReadOptions(source_column="from"), validation_fraction=0.2, unit_bytes=4000, dedup=dedup
    )
    for workers in (1, 2):
        manifest, _ = prepare_corpus(files, tokenizer_folder, tmp_path / f"{workers}", options, workers)
    rejected = {reason for entry in manifest.inputs for reason in entry.rejected}
    assert rejected == {"not_utf8"} | {"none": set(), "exact": {"duplicate"}}.get(
        dedup, {"duplicate", "near_duplicate"}
    )
    assert folder_hash(tmp_path / "1") == folder_hash(tmp_path / "2")


def test_a_killed_worker_stops_the_job_and_the_other_workers():
    dies, sleeps = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(3)"
    # If it dies before the executor watches it, that is noticed as soon as the other has a result.
    with (
        pytest.raises(JobStopped, match=r"a worker process was killed, .* with fewer than --workers 2"),
        local_workers(2) as workers,
        workers,
    ):
        list(workers.run(exec, [dies, sleeps]))
    # The executor's thread may not have noticed yet that they are gone, so a list of children can still name them.
    assert all(wait([worker.sentinel], timeout=0) for worker in multiprocessing.active_children())
