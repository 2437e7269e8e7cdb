"""Memory of large tensors that live long: where it comes from, and what else it would hold."""

import itertools
import math
import mmap
from typing import Any

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


def leave_file(model: Any) -> None:
    """Give what is left of the model's weights memory of its own.

    They are read through a mapping of the checkpoint's file, all of which would stay in memory as
    long as one tensor looks into it: the packed weights would be held twice.
    """
    if model.device.type == "cpu":
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
