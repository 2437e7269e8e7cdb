"""Prompts for the prefix cache, and a KV that is a plain function of what a real one depends on."""

import hashlib

import torch
from torch import Tensor

from server.engine.prefix import PrefixCache, blocks_of
from server.engine.types import ImageInput, Prompt

SHAPE = (2, 2, 1, 3)  # layers, keys and values, heads, head_dim
TOKEN_BYTES = 2 * 2 * 1 * 3 * 4
IMAGE_TOKEN = 7
PLENTY = 10**6


def prompt(*parts: list[int] | tuple[str, int], shared_len: int = 0) -> Prompt:
    """Token ids, and pictures as (digest, number of tokens), one after the other."""
    token_ids: list[int] = []
    images = []
    for part in parts:
        start = len(token_ids)
        if isinstance(part, tuple):
            digest, length = part
            token_ids += [IMAGE_TOKEN] * length
            images.append(ImageInput(digest, {}, start, start + length, length))
        else:
            token_ids += part
    length = len(token_ids)
    return Prompt(tuple(token_ids), tuple(images), torch.arange(length)[None], length, shared_len)


def text(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def past(prompt: Prompt, end: int) -> tuple[object, ...]:
    """All that the KV of the tokens before `end` may depend on."""
    pictures = tuple((i.digest, i.start, i.end) for i in prompt.images if i.start < end)
    positions = prompt.position_ids.expand(3, -1)[:, :end].tolist()
    return prompt.token_ids[:end], pictures, str(positions)


def true_kv(prompt: Prompt) -> Tensor:
    """(L, 2, H, T, Dh): each token's is drawn from a seed made of its past."""
    tokens = []
    for end in range(1, len(prompt) + 1):
        seed = hashlib.md5(repr(past(prompt, end)).encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        tokens.append(torch.randn(SHAPE, generator=generator))
    return torch.stack(tokens, dim=3)


def loaded(cache: PrefixCache, prompt: Prompt, namespace: str = "") -> int:
    """Load, check every number that came and that no other was touched; returns how many tokens."""
    kv = torch.full((*SHAPE[:3], len(prompt), SHAPE[3]), -1.0)
    n = cache.load(list(blocks_of(prompt, namespace)), kv)
    torch.testing.assert_close(kv[..., :n, :], true_kv(prompt)[..., :n, :], rtol=0, atol=0)
    assert kv[..., n:, :].eq(-1.0).all()
    return n


def filled(*prompts: Prompt, namespace: str = "", budget: int = PLENTY) -> PrefixCache:
    cache = PrefixCache(budget)
    for each in prompts:
        cache.store(list(blocks_of(each, namespace)), true_kv(each), len(each))
    return cache
