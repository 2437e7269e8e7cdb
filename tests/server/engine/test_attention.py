"""Chunks' attention by either way, against every score by itself in float64."""

import pytest
import torch

from server.engine.attention import MANY_KEYS, MAX_QUERIES, attend_chunk, queries_of
from server.engine.batch import Chunk
from server.engine.cache import PromptCache
from server.engine.slab import KVShape

NUM_KV_HEADS, GROUP, DIM = 2, 3, 8
SHAPE = KVShape(1, NUM_KV_HEADS, DIM, torch.float32, torch.device("cpu"))
CPU = torch.device("cpu")


def chunk_of(start: int, end: int, length: int) -> tuple[Chunk, torch.Tensor, torch.Tensor]:
    """A chunk whose prompt's cache is filled up to its end, with those keys and values."""
    cache = PromptCache(SHAPE, length)
    kv = torch.randn(2, NUM_KV_HEADS, end, DIM)
    cache.begin(0)
    cache.append(0, kv)
    num = end - start
    chunk = Chunk(torch.zeros(num, 1), torch.arange(start, end)[None], cache, start, end)
    return chunk, kv[0], kv[1]


def expected(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """(T, Hq * Dh): token by token and head by head."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for token in range(len(q)):
        seen = start + token + 1
        for head in range(q.shape[1]):
            own = head // GROUP
            scores = keys[own, :seen].double() @ q[token, head].double() * 0.3
            out[token, head] = scores.softmax(0) @ values[own, :seen].double()
    return out.flatten(1)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 1),
        (0, 40),
        (MANY_KEYS - 5, MANY_KEYS + 3),
        (MANY_KEYS, MANY_KEYS + 1),
        (MANY_KEYS - 30, MANY_KEYS + 2 * MAX_QUERIES + 7),
        (600, 600 + MAX_QUERIES),
        (511, 513),
    ],
)
@pytest.mark.parametrize("behind", [0, 300])
def test_each_token_sees_all_up_to_itself(start: int, end: int, behind: int) -> None:
    torch.manual_seed(start + end)
    chunk, keys, values = chunk_of(start, end, end + behind)
    q = torch.randn(end - start, NUM_KV_HEADS * GROUP, DIM)
    parts = queries_of(chunk, GROUP, torch.float32, CPU)
    assert [part.first for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert parts[0].first == 0 and parts[-1].end == end - start
    room_keys, room_values = chunk.cache.memory[0]
    out = torch.cat([attend_chunk(q, room_keys, room_values, part, 0.3) for part in parts])
    torch.testing.assert_close(out.double(), expected(q, keys, values, start), atol=1e-5, rtol=0)


def test_long_prompts_have_few_shapes() -> None:
    """For each shape of a product a kernel is compiled and kept."""
    shapes = set()
    for start in range(MANY_KEYS, 2000, 37):
        for num in (1, 7, 16, 33, 130):
            chunk, _, _ = chunk_of(start, start + num, start + num)
            for part in queries_of(chunk, GROUP, torch.float32, CPU):
                assert part.by_products
                shapes.add(tuple(part.mask.shape))
    assert len(shapes) <= 5 * 8


def test_few_keys_and_other_devices_take_the_flash_kernel() -> None:
    chunk, _, _ = chunk_of(0, 100, 100)
    assert [part.by_products for part in queries_of(chunk, GROUP, torch.float32, CPU)] == [False]
    meta = torch.device("meta")
    chunk, _, _ = chunk_of(0, 1000, 1000)
    parts = queries_of(chunk, GROUP, torch.float32, meta)
    assert [(part.end, part.num_keys, part.by_products) for part in parts] == [(1000, 1000, False)]
