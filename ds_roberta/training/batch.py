"""How one step's `train_batch_size` sequences are divided among processes and micro-steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """A step of exactly `train_batch_size` sequences on `world_size` processes."""

    train_batch_size: int
    micro_batch_size: int
    world_size: int

    @classmethod
    def fit(cls, train_batch_size: int, largest_micro_batch_size: int, world_size: int) -> BatchPlan:
        """The fewest micro-steps with micro-batches up to the given size, and of those the fewest empty places."""
        share = -(-train_batch_size // world_size)
        micro_steps = -(-share // largest_micro_batch_size)
        return cls(train_batch_size, -(-share // micro_steps), world_size)

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
