"""The byte budget that both caches share."""

import pytest
import torch

from server.engine.lru import TensorLRU

KIB = torch.arange(256, dtype=torch.float32)  # 1024 bytes


def test_what_was_not_used_for_longest_goes_first() -> None:
    lru: TensorLRU[str] = TensorLRU(3 * KIB.nbytes)
    for key in "abc":
        assert lru.put(key, KIB)
    lru.use("a")
    assert lru.put("d", KIB)
    assert [key for key in "abcd" if key in lru] == ["a", "c", "d"]
    assert lru.num_bytes == 3 * KIB.nbytes


def test_a_large_tensor_takes_the_place_of_as_many_as_it_needs() -> None:
    lru: TensorLRU[str] = TensorLRU(3 * KIB.nbytes)
    for key in "abc":
        lru.put(key, KIB)
    assert lru.put("big", KIB.repeat(2))
    assert [key for key in ("a", "b", "c", "big") if key in lru] == ["c", "big"]
    assert lru.num_bytes == 3 * KIB.nbytes
    torch.testing.assert_close(lru.use("big"), KIB.repeat(2), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_that_is_not_finite_or_too_large_changes_nothing(
    bad: float, dtype: torch.dtype
) -> None:
    lru: TensorLRU[str] = TensorLRU(KIB.nbytes)
    lru.put("kept", KIB)
    broken = torch.zeros(64, dtype=dtype)
    broken[17] = bad
    assert not lru.put("broken", broken)
    assert not lru.put("large", KIB.repeat(2))
    assert "kept" in lru and "broken" not in lru and "large" not in lru
    assert lru.num_bytes == KIB.nbytes


def test_opposite_infinities_do_not_cancel() -> None:
    infinity = torch.tensor([float("inf"), -float("inf")])
    assert not TensorLRU[str](100).put("a", infinity)


def test_the_sum_of_half_precision_values_does_not_overflow() -> None:
    """64 x 2,000 exceeds float16's 65,504: the values are finite and must be kept."""
    assert TensorLRU[str](1000).put("a", torch.full((64,), 2000.0, dtype=torch.float16))


def test_a_kept_tensor_holds_its_own_memory_and_no_more() -> None:
    """A view would keep the whole prompt's KV alive, and change with it."""
    lru: TensorLRU[str] = TensorLRU(10_000)
    whole = torch.randn(4, 100, 2, requires_grad=True)
    part = whole[:, 10:20]
    expected = part.detach().clone()
    lru.put("part", part)
    with torch.no_grad():
        whole.zero_()
    kept = lru.use("part")
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    assert kept.is_contiguous() and not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.nbytes == lru.num_bytes


def test_a_whole_contiguous_tensor_is_copied_too() -> None:
    lru: TensorLRU[str] = TensorLRU(10_000)
    tensor = torch.ones(4)
    lru.put("a", tensor)
    tensor.zero_()
    assert lru.use("a").tolist() == [1.0] * 4


def test_clear_frees_all_and_the_budget_is_there_again() -> None:
    lru: TensorLRU[str] = TensorLRU(KIB.nbytes)
    lru.put("a", KIB)
    lru.clear()
    assert lru.num_bytes == 0 and "a" not in lru
    assert lru.put("a", KIB)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        TensorLRU[str](-1)
