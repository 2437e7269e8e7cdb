"""Attention of the fused pass: a prompt's chunk, or one token of every row, over cached keys.

Pure functions. On a CPU rows take two batched products, and so does a chunk over many keys: the
flash kernel spends its time on calls where queries are few, and takes some 1.7 times as long as the
products where keys are many. Does not rotate or store keys (fused.py, cache.py, slab.py).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from server.engine.batch import Chunk
from server.engine.cache import PromptCache

# Below so many keys a CPU's flash kernel is as fast.
MANY_KEYS = 384
# Tokens that attend together by products, so that their scores stay in the processor's caches; a
# part comes in few sizes, as a cache's room does, since for each a kernel of 1 MB is compiled.
MAX_QUERIES, FEWEST_QUERIES, QUERIES_STEP = 64, 8, 16


class Queries(NamedTuple):
    """Tokens [first, end) of a chunk, which attend together to its prompt's first `num_keys` keys.

    mask (G * T, num_keys), added to their scores: each token sees those up to itself. By products T
    and `num_keys` are padded; the mask of what is too much lets no token see it.
    """

    first: int
    end: int
    num_keys: int
    mask: Tensor
    by_products: bool

    @property
    def padding(self) -> int:
        """Queries that are no tokens."""
        num = self.end - self.first
        step = FEWEST_QUERIES if num <= FEWEST_QUERIES else QUERIES_STEP
        return -num % step if self.by_products else 0


def queries_of(chunk: Chunk, group: int, dtype: torch.dtype, device: torch.device) -> list[Queries]:
    """How a chunk attends: `group` (G) query heads of a key head stand below each other."""
    is_cpu = device.type == "cpu"
    few = min(max(MANY_KEYS - chunk.start, 0), len(chunk)) if is_cpu else len(chunk)
    bounds = [0, *([few] if few else []), *range(few + MAX_QUERIES, len(chunk), MAX_QUERIES)]
    parts = []
    for first, end in zip(bounds, [*bounds[1:], len(chunk)], strict=True):
        if end > first:
            parts.append(_part(chunk, first, end, group, dtype, device, by_products=first >= few))
    return parts


def _part(
    chunk: Chunk,
    first: int,
    end: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    by_products: bool,
) -> Queries:
    part = Queries(first, end, chunk.start + end, torch.empty(0), by_products)
    num_keys = PromptCache.room_for(part.num_keys) if by_products else part.num_keys
    places = torch.arange(first, end + part.padding, device=device)[:, None] + chunk.start
    hidden = torch.arange(num_keys, device=device) > places
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
    return part._replace(num_keys=num_keys, mask=mask.repeat(group, 1))


def row_mask(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, width): a row sees its own tokens and the new one."""
    hidden = torch.arange(width, device=lengths.device) > lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(hidden, -math.inf)[:, None]


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor, part: Queries, scaling: float) -> Tensor:
    """q (T, Hq, Dh) of the chunk, keys and values (H, room, Dh) -> (part's T, Hq * Dh).

    The G query heads of a key head stand below each other, so that keys are not expanded.
    """
    num_kv_heads, _, head_dim = keys.shape
    q = q[part.first : part.end]
    if part.padding:
        q = nn.functional.pad(q, (0, 0, 0, 0, 0, part.padding))
    q = q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    num_groups = q.shape[1]
    q = q.reshape(num_kv_heads, -1, head_dim)
    keys, values = keys[:, : part.num_keys], values[:, : part.num_keys]
    if part.by_products:
        mask = part.mask.expand(num_kv_heads, -1, -1)
        # Scaled before the product, so that float16 does not overflow.
        scores = torch.baddbmm(mask, q * scaling, keys.transpose(1, 2))
        out = torch.bmm(scores.softmax(dim=-1), values)
    else:
        out = nn.functional.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=part.mask, scale=scaling
        )
    out = out.view(num_kv_heads, num_groups, -1, head_dim)[:, :, : part.end - part.first]
    return out.permute(2, 0, 1, 3).reshape(part.end - part.first, -1)


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """q (B, Hq, Dh), keys (B * H, Dh, width), values (B * H, width, Dh) -> (B, Hq * Dh)."""
    num_rows, num_heads, head_dim = q.shape
    q = q.reshape(len(keys), -1, head_dim)  # (B * H, G, Dh)
    # Scaled first, as above.
    scores = torch.bmm(q * scaling, keys).view(num_rows, num_heads, -1)
    weights = scores.add_(mask).softmax(dim=-1)
    out = torch.bmm(weights.view(*q.shape[:2], -1), values)
    return out.view(num_rows, -1)
