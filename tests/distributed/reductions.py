"""How much the processes of a run tell each other."""

import deepspeed
import torch
from deepspeed.runtime.comm import coalesced_collectives


class Reductions:
    """Counts the elements that gradient reductions carry within a block, by wrapping DeepSpeed's communication."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter_fn", "reduce_scatter_tensor", "all_reduce_coalesced")

    def __enter__(self):
        self.elements, self._inside = 0, False
        self._originals = {name: getattr(deepspeed.comm.comm, name) for name in self.NAMES}
        for name, function in self._originals.items():
            self._set(name, self._counting(function))
        return self

    def __exit__(self, *_):
        for name, function in self._originals.items():
            self._set(name, function)

    @staticmethod
    def _set(name, function):
        for module in (deepspeed.comm, deepspeed.comm.comm, coalesced_collectives.dist):
            setattr(module, name, function)

    def _counting(self, function):
        def count(*args, **kwargs):
            if not self._inside:  # one of these may call another
                self.elements += max(value.numel() for value in (*args, *kwargs.values()) if torch.is_tensor(value))
            outer, self._inside = self._inside, True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = outer

        return count
