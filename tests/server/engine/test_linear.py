"""Products with packed weights against torch's own."""

import pytest
import torch
from torch import Tensor, nn

from server.engine.linear import Linear

WIDTHS = {"one": [24], "several of different widths": [24, 8, 40]}


def modules(widths: list[int], bias: bool, dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(32, width, bias=bias).to(dtype) for width in widths]


def product(x: Tensor, parts: list[nn.Linear]) -> Tensor:
    with torch.no_grad():
        return torch.cat([part(x) for part in parts], dim=-1)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 65])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)],
)
def test_the_product_is_torchs_own(
    dtype: torch.dtype, tolerance: float, widths: list[int], bias: bool, num_rows: int
) -> None:
    """float16 and float64 are among those that are not packed."""
    parts = modules(widths, bias, dtype)
    x = torch.randn(num_rows, 32).to(dtype)
    expected = product(x, parts)
    y = Linear(parts)(x)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert float((y - expected).norm() / expected.norm()) < tolerance


def test_the_modules_weights_are_taken_over() -> None:
    """Nothing is held twice."""
    parts = modules([24, 8], bias=True, dtype=torch.float32)
    x = torch.randn(2, 32)
    expected = product(x, parts)
    linear = Linear(parts)
    assert all(part.weight.numel() == 0 for part in parts)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x), expected)


def test_modules_of_which_only_some_have_a_bias_do_not_go_together() -> None:
    with pytest.raises(AssertionError, match="either all have a bias or none"):
        Linear([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
