"""Matrix products with weights laid out once for the processor that runs them.

On a CPU oneDNN streams such weights at two to four times the speed of plain ones (bf16, 16 rows
or fewer), which is most of a decode step. Elsewhere this is an ordinary product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# On a CPU a product of fewer rows takes longer than one of so many, which oneDNN shares out in
# another way: 13.1 ms with 1, 14.8 with 2, 12.1 with 3, 11.3 with 6, 13.5 with 8 (version 3.12, two
# cores, all products of a decode step of the demonstration model; others are alike).
FEWEST_ROWS = 6


class Linear:
    """y = x W^T + b for one or several `nn.Linear` of the same input, side by side.

    It takes their weights over: theirs are empty afterwards, so that nothing is held twice.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        weights = [module.weight.detach() for module in modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [module.bias for module in modules if module.bias is not None]
        assert len(biases) in (0, len(modules)), "either all have a bias or none"
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        for module in modules:
            module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self._is_packed = _can_pack(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        if not self._is_packed:
            return nn.functional.linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
