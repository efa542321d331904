"""A run's folder when the run starts."""

from unittest.mock import Mock

import pytest

pytest.importorskip("deepspeed")

from ds_roberta.training.run import _open_output_dir


def test_a_start_removes_what_kills_left(tmp_path):
    (tmp_path / ".config.json.0123abcd.tmp").touch()
    (tmp_path / ".notes.tmp").touch()  # not ours
    _open_output_dir(Mock(config=Mock(output_dir=tmp_path)), Mock(best_step=None, global_step=0))
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]
