"""Writing while training goes on: what is copied, when it is complete, and what is left where it cannot be."""

import errno
import itertools
import os
import resource
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
from fake_engine import IDENTITY, FakeEngine, equal

from ds_roberta.errors import UserError
from ds_roberta.training import checkpoint, checkpoint_writer
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention, clean_up

KEEP_ALL = Retention(10)


@pytest.fixture
def writer_of(tokenizer_folder, tmp_path):
    """A function that makes a process's writer into `tmp_path/run`."""
    return lambda engine, retention=KEEP_ALL: CheckpointWriter(engine, tokenizer_folder, tmp_path / "run", retention)


@pytest.fixture
def run(tmp_path, writer_of, on_ranks):
    """The folder of a run, and a function that saves steps one after the other on two processes."""

    def save_steps(*states, retention=KEEP_ALL):
        def body(ranks):
            with writer_of(FakeEngine(ranks), retention) as writer:
                for state in states:
                    writer.save(state if isinstance(state, TrainState) else TrainState(IDENTITY, state))

        assert on_ranks(2, body) == [None, None]

    return tmp_path / "run", save_steps


@pytest.fixture
def gate(monkeypatch):
    """Holds the threads of the named ranks before they write, until it is opened."""

    class Gate:
        ranks, opened, passed = (), threading.Event(), threading.Event()

    write = checkpoint_writer.safetensors.torch.save_file

    def held(tensors, path):
        if int(path.name[6:11]) in Gate.ranks:
            Gate.opened.wait(timeout=20)
            Gate.passed.set()
        write(tensors, path)

    monkeypatch.setattr(checkpoint_writer.safetensors.torch, "save_file", held)
    return Gate


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def raise_on(results, words):
    for result in results:
        assert isinstance(result, UserError), result
        assert words in str(result)
        assert "earlier checkpoints are intact" in str(result)


def test_what_is_written_are_copies_that_training_cannot_change(writer_of, solo_ranks, gate):
    gate.ranks = (0,)
    engine, state = FakeEngine(solo_ranks), TrainState(IDENTITY, 5)
    before = engine.content()
    with writer_of(engine) as writer:
        path = writer.save(state)
        for parameter in engine.module.parameters():
            parameter.data += 1
            for moment in engine.moments[parameter].values():
                moment += 1
        state.global_step, state.identity["seed"] = 6, 3
        writer.poll()
        assert not path.exists()
        gate.opened.set()
    checkpoint.verify(path)
    again = FakeEngine(solo_ranks, seed=9)
    assert checkpoint.load(again, path).global_step == 5
    assert equal(again.content(), before)


def test_a_checkpoint_is_complete_only_when_every_process_has_written(writer_of, on_ranks, gate):
    gate.ranks = (1,)

    def body(ranks):
        with writer_of(FakeEngine(ranks)) as writer:
            path = writer.save(TrainState(IDENTITY, 5))
            ranks.barrier()
            writer.poll()
            assert not path.exists()
            ranks.barrier()
            gate.opened.set()
            writer.finish()
            checkpoint.verify(path)
            return names(path.parent)

    assert on_ranks(2, body) == [["global_step5", "latest"]] * 2


def test_it_is_complete_at_the_first_poll_after_that(writer_of, solo_ranks):
    with writer_of(FakeEngine(solo_ranks)) as writer:
        path = writer.save(TrainState(IDENTITY, 5))
        wait([writer._in_flight.share])
        assert not path.exists()
        writer.poll()
        checkpoint.verify(path)
    assert solo_ranks.messages[-1] == f"saved {path}"


def test_the_next_save_waits_for_the_one_in_flight(writer_of, solo_ranks, gate, monkeypatch):
    gate.ranks, happened = (0,), []
    for name in ("begin", "put_in_place"):
        function = getattr(checkpoint_writer, name)
        monkeypatch.setattr(
            checkpoint_writer,
            name,
            lambda target, name=name, function=function: (happened.append((name, target.name)), function(target)),
        )
    threading.Timer(0.3, gate.opened.set).start()
    with writer_of(FakeEngine(solo_ranks)) as writer:
        first = writer.save(TrainState(IDENTITY, 1))
        second = writer.save(TrainState(IDENTITY, 2))
        checkpoint.verify(first)
    assert happened == [(name, f"global_step{step}") for step in (1, 2) for name in ("begin", "put_in_place")]
    assert (second.parent / "latest").read_text() == "global_step2\n"


def test_an_error_of_the_block_waits_too(writer_of, on_ranks, tmp_path):
    def interrupted_run(ranks):
        with writer_of(FakeEngine(ranks)) as writer:
            writer.save(TrainState(IDENTITY, 1))
            raise ArithmeticError("of training")

    assert [type(result) for result in on_ranks(1, interrupted_run)] == [ArithmeticError]
    checkpoint.verify(tmp_path / "run/global_step1")

    def body(ranks):
        with writer_of(FakeEngine(ranks)) as writer:
            writer.save(TrainState(IDENTITY, 2))
            if ranks.rank == 1:  # alone: the other is elsewhere, and nothing may wait for it
                ranks.abort()
                raise ArithmeticError("of training")
            ranks.barrier()

    assert [type(result) for result in on_ranks(2, body)] == [threading.BrokenBarrierError, ArithmeticError]
    clean_up(tmp_path / "run", None)
    assert names(tmp_path / "run") == ["global_step1", "latest"]


def test_an_interrupt_waits_for_nothing(tmp_path, writer_of, solo_ranks, gate):
    gate.ranks = (0,)
    writer = writer_of(FakeEngine(solo_ranks))

    def interrupted_run():
        with writer:
            writer.save(TrainState(IDENTITY, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert not gate.passed.is_set()
    gate.opened.set()
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint"):
            thread.join()
    assert not (tmp_path / "run/global_step1").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("noticed_by", ["poll", "finish", "save", "the end"])
def test_no_checkpoint_appears_where_a_process_could_not_write(
    run, writer_of, on_ranks, monkeypatch, failing_rank, noticed_by
):
    folder, save = run
    save(1)
    write = checkpoint_writer.safetensors.torch.save_file
    monkeypatch.setattr(
        checkpoint_writer.safetensors.torch,
        "save_file",
        lambda tensors, path: full() if int(path.name[6:11]) == failing_rank else write(tensors, path),
    )

    def body(ranks):
        writer = writer_of(FakeEngine(ranks))
        calls = {"poll": writer.poll, "finish": writer.finish, "the end": lambda: writer.__exit__(None, None, None)}
        calls["save"] = lambda: writer.save(TrainState(IDENTITY, 3))
        writer.save(TrainState(IDENTITY, 2))
        if noticed_by == "poll":
            wait([writer._in_flight.share])
            ranks.barrier()
        with pytest.raises(UserError) as caught:
            calls[noticed_by]()
        with writer:  # nothing is left that could be noticed
            return caught.value

    raise_on(on_ranks(2, body), "global_step2': [Errno 28] No space left on device")
    assert names(folder) == ["global_step1", "latest"]
    checkpoint.verify(folder / "global_step1")


@pytest.mark.parametrize(
    ("function", "call", "newest"),
    [
        ("write_json", 0, 1),  # the state
        ("write_json", 1, 1),  # the manifest
        ("sync_file", 0, 1),
        ("sync_file", 2, 1),
        ("sync_directory", 0, 1),
        ("write_pointer", 0, 2),  # it has its name by then
    ],
)
def test_a_disk_that_is_full_at_any_point_is_one_error_on_all_processes(
    run, writer_of, on_ranks, monkeypatch, function, call, newest
):
    folder, save = run
    save(1)
    calls, original = itertools.count(), getattr(checkpoint_writer, function)
    monkeypatch.setattr(
        checkpoint_writer, function, lambda *arguments: full() if next(calls) >= call else original(*arguments)
    )

    def body(ranks):
        with writer_of(FakeEngine(ranks)) as writer:
            writer.save(TrainState(IDENTITY, 2))

    raise_on(on_ranks(2, body), "No space left")
    assert checkpoint.choose("auto", folder).name == f"global_step{newest}"
    assert names(folder) == [*(f"global_step{step}" for step in range(1, newest + 1)), "latest"]
    assert (folder / "latest").read_text() == "global_step1\n"
    checkpoint.verify(folder / "global_step1")


def test_files_that_may_not_grow_are_an_error_of_the_user(run, writer_of, solo_ranks):
    """The operating system's own refusal, as on a full disk or over a quota."""
    folder, save = run
    save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = writer_of(FakeEngine(solo_ranks))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        writer.save(TrainState(IDENTITY, 2))
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*global_step2'.*File too large"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(folder) == ["global_step1", "latest"]
    checkpoint.verify(folder / "global_step1")


def test_a_kill_while_a_step_is_saved_again_leaves_the_checkpoint_that_was_there(run):
    folder, save = run
    save(1)
    (folder / "global_step1").rename(folder / ".global_step1.old")  # the new one was about to take its place
    (folder / ".global_step1.tmp").mkdir()
    clean_up(folder, None)
    assert names(folder) == ["global_step1", "latest"]
    checkpoint.verify(folder / "global_step1")


def test_a_folder_that_cannot_be_made_is_a_user_error_on_all_processes(tmp_path, writer_of, on_ranks):
    (tmp_path / "run").write_text("a file")
    raise_on(on_ranks(2, lambda ranks: writer_of(FakeEngine(ranks)).save(TrainState(IDENTITY, 2))), "global_step2")


def test_an_error_in_the_program_is_not_dressed_as_the_users(writer_of, solo_ranks, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint_writer, "file_entry", broken)
    writer = writer_of(FakeEngine(solo_ranks))
    writer.save(TrainState(IDENTITY, 2))
    with pytest.raises(ZeroDivisionError):
        writer.finish()


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "a step again"])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(run, tmp_path, monkeypatch, step):
    """What is on the disk before each change of a name is put aside, and resumed from."""
    folder, save = run
    save(0, 1, retention=Retention(1))
    moments = []
    removing, lock = shutil.rmtree, threading.RLock()

    def put_aside():
        moment = tmp_path / f"moment{len(moments)}"
        while True:
            try:
                moments.append(shutil.copytree(folder, moment))
                return
            except shutil.Error:  # another thread's writing gave a file its name meanwhile
                removing(moment)

    def observe(owner, name):
        change = getattr(owner, name)

        def changed(*arguments, **keywords):
            with lock:
                put_aside()
                return change(*arguments, **keywords)

        monkeypatch.setattr(owner, name, changed)

    for owner, name in ((Path, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        observe(owner, name)
    save(TrainState(IDENTITY, step, best_step=step, best_eval_loss=2.0), retention=Retention(1))
    monkeypatch.undo()
    assert len(moments) > 15
    for moment in moments:
        chosen = checkpoint.choose("auto", moment)
        if chosen is None:  # between the two renames of a step saved again: as if the run began anew
            assert step == 1
            assert ".global_step1.old" in names(moment)
            continue
        state = checkpoint.read_state(chosen)
        clean_up(moment, state.best_step, state.global_step)
        assert (moment / "latest").read_text() == f"{chosen.name}\n"
        assert (moment / "best").exists() == (state.best_step is not None)
        assert not [name for name in names(moment) if name.startswith(".global_step")]
        checkpoint.verify(chosen)
    removing(tmp_path / "moment0")


def test_latest_names_the_newest_and_nothing_temporary_stays(run):
    folder, save = run
    save(1, 2)
    assert (folder / "latest").read_text() == "global_step2\n"
    assert names(folder) == ["global_step1", "global_step2", "latest"]


def test_saving_a_step_again_replaces_it(run):
    folder, save = run
    save(1)
    (folder / "global_step1/train_state.json").write_text("")
    save(TrainState(IDENTITY, 1, consumed_tokens=7))
    assert checkpoint.read_state(checkpoint.choose("auto", folder)).consumed_tokens == 7
    assert names(folder) == ["global_step1", "latest"]


def test_the_newest_are_kept(run):
    folder, save = run
    save(5, 10, 100, 200, retention=Retention(2))
    assert names(folder) == ["global_step100", "global_step200", "latest"]


def test_multiples_of_keep_every_are_never_removed(run):
    folder, save = run
    save(5, 10, 15, 20, 25, 30, 35, retention=Retention(1, keep_every=10))
    assert names(folder) == ["global_step10", "global_step20", "global_step30", "global_step35", "latest"]


def test_the_best_is_kept_and_named_until_a_better_one_comes(run):
    folder, save = run
    states = [TrainState(IDENTITY, step, best_step=best) for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5))]
    save(*states[:4], retention=Retention(1))
    assert names(folder) == ["best", "global_step2", "global_step4", "latest"]
    assert (folder / "best").read_text() == "global_step2\n"
    save(states[4], retention=Retention(1))
    assert names(folder) == ["best", "global_step5", "latest"]
    assert (folder / "best").read_text() == "global_step5\n"


def test_the_checkpoint_just_written_is_never_removed(run):
    folder, save = run
    save(100, 200, 300)
    # A run that goes on from step 100 by its explicit path comes by 150 while 200 and 300 are still there.
    save(150, retention=Retention(2))
    checkpoint.verify(folder / "global_step150")
    assert names(folder) == ["global_step150", "global_step200", "global_step300", "latest"]
    assert (folder / "latest").read_text() == "global_step150\n"


def test_a_start_removes_what_kills_left_and_names_the_checkpoints_of_its_state(run):
    folder, save = run
    save(1, 2)
    (folder / ".global_step3.tmp").mkdir()
    (folder / ".latest.0123abcd.tmp").touch()
    (folder / "latest").write_text("global_step1\n")  # the run was ended between two renames
    clean_up(folder, 2, latest_step=2)
    assert (folder / "latest").read_text() == "global_step2\n"
    assert (folder / "best").read_text() == "global_step2\n"
    assert names(folder) == ["best", "global_step1", "global_step2", "latest"]
    clean_up(folder, 3)  # its checkpoint is gone
    assert not (folder / "best").exists()
    clean_up(folder / "none", None)
