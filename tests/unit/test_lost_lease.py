"""A job that was suspended while another took over its output must not write there any more."""

import pytest
from fake_engine import IDENTITY, FakeEngine

from ds_roberta.errors import UserError
from ds_roberta.lease import Lease
from ds_roberta.training.checkpoint import TrainState
from ds_roberta.training.checkpoint_writer import CheckpointWriter, Retention


@pytest.mark.parametrize(("is_lost_before_the_save", "left"), [(True, []), (False, [".global_step2.tmp"])])
def test_neither_begins_nor_completes_a_checkpoint(tokenizer_folder, tmp_path, on_ranks, is_lost_before_the_save, left):
    run, lease = tmp_path / "run", Lease(tmp_path / "lease")
    lease.path.touch()

    def body(ranks):
        held = lease if ranks.is_main else None
        with CheckpointWriter(FakeEngine(ranks), tokenizer_folder, run, Retention(9), lease=held) as writer:
            writer.save(TrainState(IDENTITY, 1))
            writer.finish()
            if is_lost_before_the_save:
                lease.path.unlink(missing_ok=True)
            writer.save(TrainState(IDENTITY, 2))
            lease.path.unlink(missing_ok=True)

    for error in on_ranks(2, body):
        assert isinstance(error, UserError), error
        assert "lost its lease" in str(error)
    assert sorted(path.name for path in run.iterdir()) == [*left, "global_step1", "latest"]
    assert (run / "latest").read_text() == "global_step1\n"
