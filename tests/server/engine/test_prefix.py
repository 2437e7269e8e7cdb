"""What the prefix cache reuses, forgets and keeps apart."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.engine.prefix import PrefixCache, blocks_of
from tests.server.engine.prefixes import (
    IMAGE_TOKEN,
    PLENTY,
    SHAPE,
    TOKEN_BYTES,
    filled,
    loaded,
    prompt,
    text,
    true_kv,
)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (34, 32), (49, 48)]
)
def test_whole_blocks_before_the_last_token_are_reused(length: int, expected: int) -> None:
    """The last token is steered and its logits are needed: it is never loaded."""
    cache = filled(prompt(text(length)))
    assert cache.num_bytes == expected * TOKEN_BYTES
    assert loaded(cache, prompt(text(length))) == expected


def test_a_prompt_reuses_as_much_as_it_has_in_common() -> None:
    cache = filled(prompt(text(100)))
    for common in range(100):
        other = prompt(text(common), text(40, first=500))
        assert loaded(cache, other) == common // 16 * 16


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 36])
@pytest.mark.parametrize("before", [0, 3, 16, 20])
def test_a_prefix_that_ends_with_a_picture_is_reused_whole(before: int, length: int) -> None:
    picture = ("white", length)
    cache = filled(prompt(text(before), picture, text(2, first=300)))
    assert cache.num_bytes == (before + length) * TOKEN_BYTES
    assert loaded(cache, prompt(text(before), picture, text(50, first=600))) == before + length


def test_blocks_go_on_after_a_picture() -> None:
    first = prompt(text(3), ("cat", 10), text(40), ("dog", 4), text(9))
    cache = filled(first)
    assert cache.num_bytes == (13 + 40 + 4) * TOKEN_BYTES
    assert loaded(cache, first) == 57
    assert loaded(cache, prompt(text(3), ("cat", 10), text(33), text(9, first=400))) == 13 + 32


def test_a_prompt_that_ends_with_a_picture_keeps_its_last_token_out() -> None:
    ends_with_picture = prompt(text(4), ("cat", 20))
    cache = filled(ends_with_picture)
    assert loaded(cache, ends_with_picture) == 16


def test_another_picture_behind_the_same_token_ids_misses() -> None:
    """Placeholders are equal for all pictures: the digest must tell them apart."""
    cat = prompt(text(20), ("cat", 40), text(20))
    dog = prompt(text(20), ("dog", 40), text(20))
    assert cat.token_ids == dog.token_ids
    cache = filled(cat)
    assert loaded(cache, dog) == 16  # the text before the picture's first token
    cache.store(list(blocks_of(dog, "")), true_kv(dog), len(dog))
    assert loaded(cache, dog) == loaded(cache, cat) == 76


def test_swapped_pictures_of_one_block_miss() -> None:
    cache = filled(prompt(text(2), ("cat", 3), ("dog", 3), text(20)))
    assert loaded(cache, prompt(text(2), ("dog", 3), ("cat", 3), text(20))) == 0


def test_a_picture_that_extends_further_misses() -> None:
    """Both first blocks hold the same tokens and the same picture's beginning."""
    cache = filled(prompt(("cat", 40), text(20)))
    assert loaded(cache, prompt(("cat", 50), text(20))) == 0


def test_a_picture_that_begins_earlier_misses() -> None:
    """Both blocks hold the same tokens and end with the same picture."""
    cache = filled(prompt([IMAGE_TOKEN] * 2, ("cat", 4), text(20)))
    assert loaded(cache, prompt(("cat", 6), text(20))) == 0


def test_placeholders_without_a_picture_miss() -> None:
    """The same token ids, but nothing behind them."""
    cache = filled(prompt(text(3), ("cat", 20), text(20)))
    assert loaded(cache, prompt(text(3), [IMAGE_TOKEN] * 20, text(20))) == 0


def test_the_same_tokens_at_other_positions_miss() -> None:
    """M-RoPE: a picture of 2 x 8 patches and one of 4 x 4 have equally many tokens."""
    flat = prompt(text(16), text(30, first=200))
    moved = flat.position_ids.expand(3, -1).clone()
    moved[1, 20:] += 1
    cache = filled(flat)
    assert loaded(cache, replace(flat, position_ids=moved)) == 16


def test_one_position_and_three_equal_ones_are_the_same() -> None:
    """So that the text-only prompt shares the system prompt of the one with pictures."""
    plain = prompt(text(40))
    cache = filled(plain)
    assert loaded(cache, replace(plain, position_ids=plain.position_ids.repeat(3, 1))) == 32


def test_namespaces_do_not_see_each_other() -> None:
    cache = filled(prompt(text(50)), namespace="tenant")
    assert loaded(cache, prompt(text(50)), "other") == 0
    assert loaded(cache, prompt(text(50)), "") == 0
    assert loaded(cache, prompt(text(50)), "tenant") == 48


@pytest.mark.parametrize(
    ("shared_len", "expected"), [(0, 0), (15, 0), (16, 16), (35, 32), (36, 36), (51, 36), (52, 52)]
)
def test_the_shared_part_serves_every_namespace_and_nothing_beyond_it(
    shared_len: int, expected: int
) -> None:
    """Blocks end at 16, 32, 36 (the picture) and 52; the one that a client's text begins in is the
    client's own, and so is all that follows."""
    asked = prompt(text(16), ("white", 20), text(30, first=300), shared_len=shared_len)
    cache = filled(asked, namespace="tenant")
    assert cache.num_bytes == 52 * TOKEN_BYTES
    assert loaded(cache, asked, "other") == expected
    assert loaded(cache, asked, "tenant") == 52


def test_another_tenants_text_after_the_shared_part_stays_unseen() -> None:
    """Every tenant stores its own copy, also when the tokens are the same."""
    asked = prompt(text(16), ("white", 16), text(33, first=300), shared_len=32)
    cache = filled(asked, namespace="tenant")
    alone = cache.num_bytes
    cache.store(list(blocks_of(asked, "other")), true_kv(asked), len(asked))
    assert cache.num_bytes - alone == 32 * TOKEN_BYTES
    assert loaded(cache, asked, "third") == 32


def test_what_a_client_wrote_does_not_become_shared_by_an_equal_shared_prompt() -> None:
    """The same tokens, once a client's and once the template's: two different chains."""
    mine = prompt(text(50))
    cache = filled(mine, namespace="tenant")
    assert loaded(cache, replace(mine, shared_len=50), "other") == 0


def test_a_kept_block_is_a_copy() -> None:
    asked = prompt(text(17))
    kv = true_kv(asked)
    cache = PrefixCache(PLENTY)
    cache.store(list(blocks_of(asked, "")), kv, len(asked))
    kv.zero_()
    assert loaded(cache, asked) == 16


def test_what_was_loaded_may_be_written_to() -> None:
    asked = prompt(text(17))
    cache = filled(asked)
    kv = torch.zeros(*SHAPE[:3], 17, SHAPE[3])
    cache.load(list(blocks_of(asked, "")), kv)
    kv.zero_()
    assert loaded(cache, asked) == 16


def test_the_least_recently_used_prompt_goes_first() -> None:
    budget = 2 * 32 * TOKEN_BYTES
    a, b, c = (prompt(text(33, first=first)) for first in (100, 200, 300))
    cache = filled(a, b, budget=budget)
    assert loaded(cache, a) == 32
    cache.store(list(blocks_of(c, "")), true_kv(c), len(c))
    assert [loaded(cache, each) for each in (a, b, c)] == [32, 0, 32]
    assert cache.num_bytes == budget


def test_storing_what_is_kept_refreshes_it() -> None:
    a, b, c = (prompt(text(33, first=first)) for first in (100, 200, 300))
    cache = filled(a, b, a, c, budget=2 * 32 * TOKEN_BYTES)
    assert [loaded(cache, each) for each in (a, b, c)] == [32, 0, 32]


def test_descendants_go_before_their_ancestors() -> None:
    """A prompt loses its end first: what is left of it can still be loaded."""
    long, short = prompt(text(65)), prompt(text(17, first=300))
    cache = filled(long, short, budget=4 * 16 * TOKEN_BYTES)
    assert loaded(cache, short) == 16
    assert loaded(cache, long) == 48
    assert cache.num_bytes == 64 * TOKEN_BYTES


def test_a_turn_that_follows_never_displaces_its_own_beginning() -> None:
    """The first turn is the oldest entry when the second comes, and the budget is exactly full."""
    first, other = prompt(text(33)), prompt(text(33, first=500))
    second = prompt(text(65))
    cache = filled(first, other, second, budget=64 * TOKEN_BYTES)
    assert loaded(cache, second) == 64
    assert cache.num_bytes == 64 * TOKEN_BYTES


def test_a_prompt_larger_than_the_budget_keeps_what_fits_from_its_start() -> None:
    large = prompt(text(100))
    cache = filled(large, large, budget=50 * TOKEN_BYTES)
    assert loaded(cache, large) == 48
    small = prompt(text(17, first=500))
    cache.store(list(blocks_of(small, "")), true_kv(small), len(small))
    assert loaded(cache, small) == 16
    assert loaded(cache, large) == 32
    cache.store(list(blocks_of(large, "")), true_kv(large), len(large))
    assert loaded(cache, large) == 48


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("at", "expected"), [(0, 0), (15, 0), (16, 16), (47, 32), (60, 48)])
def test_nothing_is_kept_from_the_first_bad_block_on(bad: float, at: int, expected: int) -> None:
    """NaN in a kept block would end every later request that begins alike."""
    asked = prompt(text(65))
    kv = true_kv(asked)
    kv[1, 1, 0, at, 2] = bad
    cache = PrefixCache(PLENTY)
    cache.store(list(blocks_of(asked, "")), kv, len(asked))
    assert cache.num_bytes == expected * TOKEN_BYTES
    assert loaded(cache, asked) == expected
    cache.store(list(blocks_of(asked, "")), true_kv(asked), len(asked))
    assert loaded(cache, asked) == 64


def test_memory_that_runs_out_leaves_a_cache_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks stored so far must not outlive their ancestors."""
    first, second = prompt(text(17)), prompt(text(65))
    cache = filled(first, budget=64 * TOKEN_BYTES)
    put, calls = cache._blocks.put, iter([True, False])

    def put_once(key: bytes, tensor: Tensor) -> bool:
        if next(calls):
            return put(key, tensor)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache._blocks, "put", put_once)
        with pytest.raises(MemoryError):
            cache.store(list(blocks_of(second, "")), true_kv(second), len(second))
    other = prompt(text(49, first=500))
    cache.store(list(blocks_of(other, "")), true_kv(other), len(other))
    assert loaded(cache, second) == 16
    cache.store(list(blocks_of(second, "")), true_kv(second), len(second))
    assert loaded(cache, second) == 64


def test_without_a_budget_nothing_is_kept() -> None:
    asked = prompt(text(50))
    cache = filled(asked, budget=0)
    assert loaded(cache, asked) == 0
    assert (cache.num_bytes, cache.hit_tokens["own"], cache.missed_tokens["own"]) == (0, 0, 50)


def test_clear_forgets_all_and_keeps_counting() -> None:
    asked = prompt(text(50))
    cache = filled(asked)
    assert loaded(cache, asked) == 48
    cache.clear()
    assert cache.num_bytes == 0
    assert loaded(cache, asked) == 0
    assert (cache.hit_tokens["own"], cache.missed_tokens["own"]) == (48, 2 + 50)


def test_a_prompt_is_kept_as_far_as_it_is_computed() -> None:
    cache = PrefixCache(PLENTY)
    asked = prompt(text(100))
    for num_computed in (10, 40, 70, 100):
        cache.store(list(blocks_of(asked, "")), true_kv(asked), num_computed)
        assert loaded(cache, asked) == min(num_computed, 99) // 16 * 16
