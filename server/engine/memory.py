"""Memory for large tensors that live long, straight from the system."""

import math
import mmap

import torch
from torch import Tensor


def paged_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take no memory before they are written, and give it back when freed.

    The system hands out small pages at their first use: room for a long prompt or row costs nothing
    before it is used, no single step pays for all of it, and none of it stays behind in the heap.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(size)
