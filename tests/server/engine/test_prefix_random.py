"""The prefix cache in random use, against a plain model of it."""

import random
from dataclasses import dataclass, field

import pytest

from server.engine.prefix import PrefixCache, blocks_of
from server.engine.types import Prompt
from tests.server.engine.prefixes import TOKEN_BYTES, past, prompt, true_kv


@dataclass
class Model:
    """The cache by its definition: when each block was last used, and by which prefix it is known.

    The oldest block goes first and, of those used together, the one furthest from the start.
    """

    budget: int
    blocks: dict[tuple[object, ...], tuple[int, int, int]] = field(default_factory=dict)
    clock: int = 0

    def cut(self, prompt: Prompt, namespace: str) -> list[tuple[tuple[object, ...], int, int]]:
        """Each block's identity, its end and its bytes."""
        ends, start = {image.end for image in prompt.images}, 0
        blocks, owner = [], None
        for end in range(1, len(prompt)):
            if end - start == 16 or end in ends:
                if owner is None and end > prompt.shared_len:
                    owner = (namespace, start)  # whose, and from where on
                blocks.append(((owner, *past(prompt, end)), end, (end - start) * TOKEN_BYTES))
                start = end
        return blocks

    def load(self, prompt: Prompt, namespace: str) -> int:
        self.clock += 1
        num_tokens = 0
        for key, end, size in self.cut(prompt, namespace):
            if key not in self.blocks:
                break
            num_tokens, self.blocks[key] = end, (self.clock, -end, size)
        return num_tokens

    def store(self, prompt: Prompt, namespace: str) -> None:
        self.clock += 1
        for key, end, size in self.cut(prompt, namespace):
            if end * TOKEN_BYTES <= self.budget:
                self.blocks[key] = (self.clock, -end, size)
        while self.num_bytes > self.budget:
            del self.blocks[min(self.blocks, key=lambda key: self.blocks[key])]

    @property
    def num_bytes(self) -> int:
        return sum(size for *_, size in self.blocks.values())


def random_prompts(rng: random.Random) -> list[Prompt]:
    """Prompts that begin alike in many ways, of few tokens and few pictures."""
    pool: list[list[list[int] | tuple[str, int]]] = [[]]
    for _ in range(40):
        parts = list(rng.choice(pool))
        parts = parts[: rng.randint(0, len(parts))]
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.4:
                parts.append((rng.choice("abc"), rng.choice([1, 6, 16, 21])))
            else:
                parts.append([rng.randint(1, 2)] * rng.choice([1, 3, 16, 30]))
        pool.append(parts)
    return [prompt(*parts, shared_len=rng.choice([0, 0, 16, 30])) for parts in pool[1:]]


@pytest.mark.parametrize("seed", range(6))
def test_random_use_agrees_with_a_plain_model_of_the_cache(seed: int) -> None:
    """Every number loaded, how many, bytes, counters and order of eviction; and no orphans, since
    the model's bytes are all loadable."""
    rng = random.Random(seed)
    prompts = random_prompts(rng)
    known = {id(each): true_kv(each) for each in prompts}
    budget = rng.choice([40, 150, 400]) * TOKEN_BYTES
    cache, model = PrefixCache(budget), Model(budget)
    hits = asked = 0
    for _ in range(150):
        each, namespace = rng.choice(prompts), rng.choice(["", "tenant"])
        kv = known[id(each)].clone()
        if rng.random() < 0.5:
            kv.fill_(-1.0)
            n = cache.load(list(blocks_of(each, namespace)), kv)
            assert n == model.load(each, namespace) < len(each)
            assert kv[..., :n, :].equal(known[id(each)][..., :n, :])
            assert kv[..., n:, :].eq(-1.0).all()
            hits, asked = hits + n, asked + len(each)
        else:
            cache.store(list(blocks_of(each, namespace)), kv, len(each))
            kv.fill_(float("nan"))
            model.store(each, namespace)
        assert cache.num_bytes == model.num_bytes <= budget
        assert (cache.hit_tokens["own"], cache.missed_tokens["own"]) == (hits, asked - hits)
    assert 0 < hits < asked
    loadable = {
        key: size
        for each in prompts
        for namespace in ("", "tenant")
        for key, end, size in model.cut(each, namespace)
        if end <= cache.load(list(blocks_of(each, namespace)), known[id(each)].clone())
    }
    assert sum(loadable.values()) == cache.num_bytes
