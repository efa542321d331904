"""How one step's `train_batch_size` sequences are divided among processes and micro-steps."""

from __future__ import annotations

from dataclasses import dataclass

_MORE_MICRO_STEPS = 1 / 8
"""Share by which micro-steps may be more than the fewest, to compute fewer empty places: they are as much smaller."""


@dataclass(frozen=True)
class BatchPlan:
    """A step of exactly `train_batch_size` sequences on `world_size` processes."""

    train_batch_size: int
    micro_batch_size: int
    world_size: int

    @classmethod
    def fit(cls, train_batch_size: int, largest_micro_batch_size: int, world_size: int) -> BatchPlan:
        """The plan that computes the fewest rows, empty places included, and of those the one of fewest micro-steps.

        Micro-batches are up to the given size, and micro-steps at most an eighth more than with that size: without
        that bound a prime share would be computed one row at a time, at a fraction of the speed.
        """
        share = -(-train_batch_size // world_size)
        fewest = -(-share // largest_micro_batch_size)
        most = int(fewest * (1 + _MORE_MICRO_STEPS))
        sizes = range(-(-share // most), min(largest_micro_batch_size, share) + 1)
        plans = [cls(train_batch_size, size, world_size) for size in sizes]
        return min(plans, key=lambda plan: (plan.empty_places, plan.accumulation_steps, plan.micro_batch_size))

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps of a step, the same on every process."""
        share = -(-self.train_batch_size // self.world_size)
        return -(-share // self.micro_batch_size)

    @property
    def empty_places(self) -> int:
        """Places of the last micro-batches that hold no sequence, over all processes."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size - self.train_batch_size

    def __str__(self) -> str:
        empty = f" - {self.empty_places} empty places" if self.empty_places else ""
        return (
            f"{self.train_batch_size} sequences a step = {self.micro_batch_size} (micro-batch) x "
            f"{self.accumulation_steps} (accumulation) x {self.world_size} (processes){empty}"
        )
