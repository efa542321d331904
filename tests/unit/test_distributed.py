import atexit
import errno
import logging
import multiprocessing
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ds_roberta.distributed import PATIENCE, Ranks
from ds_roberta.errors import UserError
from ds_roberta.process import leave, set_up_logging


def test_one_process_agrees_with_itself(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ranks = Ranks.current(timedelta(seconds=9))
        assert dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout == PATIENCE
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        assert ranks.sum(1, 2.5) == [1.0, 2.5]
        assert ranks.min(2**53 - 1) == 2**53 - 1
        assert (ranks.any(False), ranks.any(True)) == (False, True)
        assert ranks.broadcast({"a": 1}) == {"a": 1}
        assert ranks.gather("mine") == ["mine"]
        ranks.barrier()
    finally:
        dist.destroy_process_group()


def test_what_the_first_process_does_alone_all_hear_of(on_ranks):
    def refuse():
        raise UserError("not this")

    done = []
    assert (
        on_ranks(3, lambda ranks: Ranks.on_main(ranks, lambda: done.append(ranks.rank) or "result")) == ["result"] * 3
    )
    assert done == [0]
    results = on_ranks(3, lambda ranks: Ranks.on_main(ranks, refuse))
    assert [(type(result), str(result)) for result in results] == [(UserError, "not this")] * 3


def test_an_error_of_some_ranks_ends_all_and_names_their_hosts(on_ranks, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node7")

    def some(ranks):
        def read():
            if ranks.rank > 0:
                raise UserError("no data")
            return "data"

        return Ranks.together(ranks, read)

    assert [str(error) for error in on_ranks(3, some)] == ["on node7: no data"] * 3
    assert on_ranks(3, lambda ranks: Ranks.together(ranks, lambda: ranks.rank)) == [0, 1, 2]


@pytest.mark.parametrize("collectively", [Ranks.on_main, Ranks.together])
def test_what_the_disk_refuses_one_process_all_hear_of(on_ranks, collectively):
    def body(ranks):
        def write():
            if ranks.is_main:
                raise OSError(errno.ENOSPC, "", "/full/file")

        collectively(ranks, write)

    for error in on_ranks(3, body):
        assert type(error) is UserError
        assert "a file or standard output was refused (No space left on device: /full/file)" in str(error)


def test_ranks_that_differ_are_named(on_ranks, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    assert on_ranks(2, lambda ranks: Ranks.check_same(ranks, {"torch": "2.13"})) == [None, None]
    (message, other) = map(str, on_ranks(2, lambda ranks: Ranks.check_same(ranks, {"--seed": ranks.rank})))
    assert message == other
    assert message.startswith("rank 1 on node7 has --seed 1, rank 0 on node7 has 0: give all hosts the same")


def test_the_first_process_alone_speaks(caplog):
    caplog.set_level(logging.INFO, logger="ds_roberta")
    Ranks(1, 2, 1, None).log("from the second")
    Ranks(0, 2, 0, None).log("from the first")
    assert [record.message for record in caplog.records] == ["from the first"]


def test_others_are_heard_from_warnings_on():
    root, ours = logging.getLogger(), logging.getLogger("ds_roberta")
    before = root.handlers[:], root.level, ours.level
    try:
        set_up_logging()
        assert ours.isEnabledFor(logging.INFO)
        assert not logging.getLogger("some.library").isEnabledFor(logging.INFO)
        assert logging.getLogger("some.library").isEnabledFor(logging.WARNING)
    finally:
        root.handlers[:], _, _ = before
        root.setLevel(before[1])
        ours.setLevel(before[2])


def test_leaving_runs_exit_handlers_flushes_and_keeps_the_code(tmp_path):
    def body():
        with open(tmp_path / "output", "w") as sys.stdout:
            atexit._clear()  # pytest's own
            atexit.register(print, "handler")
            print("last words")
            leave(85)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join()
    assert (child.exitcode, (tmp_path / "output").read_text()) == (85, "last words\nhandler\n")
