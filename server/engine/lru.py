"""Tensors under a byte budget; what was not used for longest goes first.

What the keys mean, and what may be shared with whom, is the caller's: prefix.py and vision.py.
No locks: used on the engine thread only; `num_bytes` may be read from any thread.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from server.engine.memory import paged_zeros

Key = TypeVar("Key", bound=Hashable)
PAGED_BYTES = (
    256 * 1024
)  # a process may have some 65,000 mappings: enough for 16 GiB of such tensors


class TensorLRU(Generic[Key]):
    """Copies of tensors, never more than `budget_bytes` of them; 0 keeps nothing.

    `num_bytes`: the memory that they take now, keys not counted.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"a cache's budget is {budget_bytes} bytes; it must be 0 or more")
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self._tensors: OrderedDict[Key, Tensor] = OrderedDict()  # the next to go first

    def __contains__(self, key: Key) -> bool:
        return key in self._tensors

    def use(self, key: Key) -> Tensor:
        """A kept tensor, which becomes the last to go. Not to be written to."""
        self._tensors.move_to_end(key)
        return self._tensors[key]

    def put(self, key: Key, tensor: Tensor) -> bool:
        """Keep a contiguous copy as the last to go, in place of as many as it takes.

        False, and nothing changes: the tensor exceeds the budget, or holds NaN or infinity, which
        would otherwise reach every later request that asks for it.
        """
        assert key not in self._tensors
        if tensor.nbytes > self.budget_bytes or not _is_finite(tensor):
            return False
        while self.num_bytes + tensor.nbytes > self.budget_bytes:
            _, oldest = self._tensors.popitem(last=False)
            self.num_bytes -= oldest.nbytes
        self._tensors[key] = _copied(tensor.detach())
        self.num_bytes += tensor.nbytes
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._tensors.clear()
        self.num_bytes = 0


def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy. A large one in pages of its own, which go back to the system with it: on
    the heap, thousands of them that come and go between short-lived tensors leave it full of holes.
    """
    if tensor.nbytes < PAGED_BYTES:
        return tensor.clone(memory_format=torch.contiguous_format)
    return paged_zeros(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)


def _is_finite(tensor: Tensor) -> bool:
    """One sum tells, many times faster than a look at each element: no number cancels a NaN, and
    opposite infinities make one. Finite values whose sum overflows count as not finite."""
    return bool(tensor.sum(dtype=torch.float32).isfinite())
