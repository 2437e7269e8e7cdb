"""The prompts' and the rows' keys and values, without a model."""

import random

import pytest
import torch
from torch import Tensor

from server.engine.cache import PromptCache, RowCache
from server.engine.slab import KVShape

SHAPE = KVShape(2, 1, 2, torch.float32, torch.device("cpu"))  # 2 layers, 1 head of 2


def filled(length: int, value: float) -> PromptCache:
    """Keys are `value`, values its negative."""
    prompt = PromptCache(SHAPE, length)
    prompt.kv[:, 0], prompt.kv[:, 1] = value, -value
    return prompt


def test_a_prompts_keys_are_all_there_after_each_chunk() -> None:
    kv = torch.randn(2, 2, 1, 9, 2)
    prompt = PromptCache(SHAPE, 9)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        prompt.begin(start)
        for layer in range(2):
            keys, values = prompt.append(layer, kv[layer, :, :, start:end])
            assert torch.equal(keys[:, :end], kv[layer, 0, :, :end])
            assert torch.equal(values[:, :end], kv[layer, 1, :, :end])
            assert keys.shape[1] == PromptCache.room_for(9) and not keys[:, end:].any()
    assert torch.equal(prompt.kv, kv)
    prompt.clear(4)
    assert torch.equal(prompt.kv[..., :4, :], kv[..., :4, :]) and not prompt.kv[..., 4:, :].any()
    other = PromptCache(SHAPE, 9)
    other.begin(0)
    keys, values = other.update(kv[1, :1], kv[1, 1:], 1)  # as transformers' attention calls it
    assert torch.equal(keys[0], kv[1, 0]) and torch.equal(values[0], kv[1, 1])
    assert torch.equal(other.kv[1], kv[1])


@pytest.mark.parametrize(
    ("length", "max_len", "expected"),
    [(1, 2048, 256), (256, 2048, 256), (257, 2048, 512), (1025, 2048, 2048), (1025, 1500, 1500)],
)
def test_a_row_takes_the_shortest_class_that_holds_it(
    length: int, max_len: int, expected: int
) -> None:
    assert RowCache.footprint(length, max_len) == expected


@pytest.mark.parametrize("max_len", [128, 256, 1000, 2048])
def test_the_longest_rows_that_fit_do_and_one_token_more_does_not(max_len: int) -> None:
    for num_rows in (1, 2, 3, 7):
        for num_tokens in (128, 255, 256, 700, 1024, 3000, 10**5):
            longest = RowCache.longest(num_rows, num_tokens, max_len)
            if longest:
                assert num_rows * RowCache.footprint(longest, max_len) <= num_tokens
            if longest < max_len:
                assert num_rows * RowCache.footprint(longest + 1, max_len) > num_tokens


def test_a_row_that_outgrows_its_class_takes_its_keys_along() -> None:
    cache: RowCache[str] = RowCache(SHAPE, 2048, 4, 4 * 2048)
    cache.join("long", filled(255, 1.0))
    cache.join("short", filled(10, 2.0))
    ((slab, rows),) = cache.arrange({"long": 255, "short": 10})
    assert (rows, slab.length) == (["long", "short"], 256)
    (short, short_rows), (long, long_rows) = cache.arrange({"long": 256, "short": 11})
    assert (short_rows, long_rows, long.length) == (["short"], ["long"], 512)
    assert long.get(0, 255)[:, 0].eq(1.0).all() and long.get(0, 255)[:, 1].eq(-1.0).all()
    assert short.get(0, 10)[:, 0].eq(2.0).all()
    assert cache.size == 256 + 512


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_what_an_unclean_row_held_reaches_nobody(leaving: int) -> None:
    """A masked NaN still makes the score's product one."""
    cache: RowCache[int] = RowCache(SHAPE, 256, 4, 4 * 256)
    for row in range(3):
        cache.join(row, filled(40, float("nan")) if row == leaving else filled(20, 1.0))
    lengths = {row: 40 if row == leaving else 20 for row in range(3)}
    cache.arrange(lengths)
    cache.leave(leaving, is_clean=False)
    del lengths[leaving]
    ((slab, _),) = cache.arrange(lengths)
    assert slab.keys.isfinite().all() and slab.values.isfinite().all()


def test_what_several_unclean_rows_held_reaches_nobody() -> None:
    """The choices of one prompt leave together; the first moved the second's NaN about."""
    cache: RowCache[int] = RowCache(SHAPE, 256, 4, 4 * 256)
    for row in range(3):
        cache.join(row, filled(20, float("nan") if row else 1.0))
    ((slab, _),) = cache.arrange({row: 20 for row in range(3)})
    cache.leave(1, is_clean=False)
    cache.leave(2, is_clean=False)
    assert slab.keys.isfinite().all() and slab.values.isfinite().all(), "the free places, too"


def test_random_rows_keep_their_keys() -> None:
    """Joining, growing and leaving in any order, against a dictionary of what was written."""
    chance = random.Random(3)
    cache: RowCache[int] = RowCache(SHAPE, 600, 4, 4 * 600)
    expected: dict[int, Tensor] = {}
    for step in range(400):
        if len(expected) < 6 and chance.random() < 0.2:
            prompt = PromptCache(SHAPE, chance.choice([3, 250, 255, 400, 505]))
            prompt.kv.normal_()
            cache.join(step, prompt)
            expected[step] = prompt.kv
        full = [row for row, kv in expected.items() if kv.shape[3] == 600]
        if expected and chance.random() < 0.1:
            full.append(chance.choice(list(expected)))
        for row in set(full):
            cache.leave(row)
            del expected[row]
        slabs = cache.arrange({row: kv.shape[3] for row, kv in expected.items()})
        assert sorted(row for _, rows in slabs for row in rows) == sorted(expected)
        for slab, rows in slabs:
            lengths = torch.tensor([expected[row].shape[3] for row in rows])
            slab.begin(lengths, int(lengths.max()))
            new = torch.randn(2, len(rows), 2, 1, 2)
            for layer in range(2):
                slab.append(layer, *new[layer].unbind(1))
            for at, row in enumerate(rows):
                expected[row] = torch.cat([expected[row], new[:, at, :, :, None]], dim=3)
                length = expected[row].shape[3]
                assert torch.equal(slab.get(at, length), expected[row])
    assert cache.size == sum(RowCache.footprint(kv.shape[3], 600) for kv in expected.values())


def test_empty_slabs_stay_within_the_budget() -> None:
    cache: RowCache[int] = RowCache(SHAPE, 1024, 4, max_tokens=1024 + 256)
    cache.join(0, filled(5, 1.0))
    cache.join(1, filled(600, 1.0))
    cache.leave(0)
    cache.leave(1)
    assert (cache.size, cache.num_used) == (0, 1280), "both stay for those to come"
    cache.join(2, filled(300, 1.0))
    cache.leave(2)
    assert cache.num_used == 256 + 512, "the longest goes"
    assert cache.arrange({}) == []
