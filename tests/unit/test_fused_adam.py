"""The messages before DeepSpeed compiles."""

import os
import time

from ds_roberta.training.compilation import compilation_notice


def test_a_compilation_is_announced_and_so_is_a_stale_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert compilation_notice({"optimizer": {"params": {"torch_adam": True}}}) is None
    deepspeeds = {"optimizer": {"params": {"torch_adam": False}}}
    notice = compilation_notice(deepspeeds)
    assert notice.endswith("this takes minutes")
    lock = tmp_path / "fused_adam/lock"
    lock.touch()
    os.utime(lock, (time.time() - 3 * 3600,) * 2)
    assert compilation_notice(deepspeeds).startswith(f"{notice}; the lock {str(lock)!r} is 3.0 hours old: ")
