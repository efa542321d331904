"""Flip bytes of checkpoints and bits of shards, and ask the library's own checks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.storage_commands import Ground
from ds_roberta.errors import UserError

_SEED = 0


def checkpoint_bytes(ground: Ground) -> dict[str, Any]:
    """Invert every byte of a checkpoint in turn, and flip every bit of its manifest; `verify` must find each."""
    from ds_roberta.training.checkpoint import MANIFEST_NAME, verify

    checkpoint = ground.base / "common/run/checkpoints/global_step4"
    verify(checkpoint)
    tried, missed, files = 0, [], sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        masks = [1 << bit for bit in range(8)] if path.name == MANIFEST_NAME else [0xFF]
        for offset in range(path.stat().st_size):
            for mask in masks:
                tried += 1
                with flipped(path, offset, mask):
                    try:
                        verify(checkpoint)
                        missed.append(f"byte {offset} of {path.relative_to(checkpoint)}, mask {mask:#x}")
                    except UserError:
                        pass
    size = sum(path.stat().st_size for path in files)
    note = f"{size:,} bytes in {len(files)} files; of the manifest every bit"
    return _found(tried, missed, note)


def pointer_bytes(ground: Ground) -> dict[str, Any]:
    """Replace every byte of `best` by every other one: it must be refused, or not matter."""
    from ds_roberta.training.checkpoint import BEST_NAME, best

    run = ground.base / "common/run"
    pointer, right = run / "checkpoints" / BEST_NAME, best(run)
    tried, missed = 0, []
    for offset in range(pointer.stat().st_size):
        for mask in range(1, 256):
            tried += 1
            with flipped(pointer, offset, mask):
                try:
                    if best(run).resolve() != right.resolve():
                        missed.append(f"byte {offset}, mask {mask:#x}: {pointer.read_bytes()!r}")
                except UserError:
                    pass
    return _found(tried, missed, "each with every other value")


def shard_bits(ground: Ground, bits: int) -> dict[str, Any]:
    """Flip random bits of the files of prepared data, the larger the file the more; `verify` must name the file."""
    from preprocessing.prepared.verify import verify

    data = ground.base / "common/data"
    assert verify(data) == []
    chosen, missed = random.Random(_SEED), []
    files = sorted(path for path in data.rglob("*.arrow"))
    sizes = [path.stat().st_size for path in files]
    for _ in range(bits):
        path = chosen.choices(files, sizes)[0]
        name = path.relative_to(data).as_posix()
        offset, mask = chosen.randrange(path.stat().st_size), 1 << chosen.randrange(8)
        with flipped(path, offset, mask):
            problems = verify(data)
        if not any(problem.startswith(f"{name}:") for problem in problems):
            missed.append(f"byte {offset} of {name}, mask {mask:#x}")
    return _found(bits, missed, f"{sum(sizes):,} bytes in {len(files)} shards")


@contextmanager
def flipped(path: Path, offset: int, mask: int) -> Iterator[None]:
    """Flip the bits of `mask` in one byte of a file, for the length of the context."""

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            value = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([value ^ mask]))

    flip()
    try:
        yield
    finally:
        flip()


def _found(tried: int, missed: list[str], note: str) -> dict[str, Any]:
    return {"tried": tried, "survived": tried - len(missed), "lost": len(missed), "problems": missed[:20], "note": note}
