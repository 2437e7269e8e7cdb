"""The fused pass with kernels of this project's own (cpp/) between its products.

Each layer is four products and four kernels for prompts' tokens and rows together, and attention's
for each. Steering stays between the layers, on the same float32 stream. With the products of
linear.py, what a token comes to is the same to the bit whatever else is in its pass.

Why not `torch.compile`: called layer by layer, as steering wants it, each call costs 110
microseconds before anything is computed, Dynamo's and AOTAutograd's. One layer of the demonstration
model (bf16, one core, weights in the processor's caches, microseconds at 1 / 16 rows of 90 tokens):
its products 186 / 589, fused.py 454 / 1,011, by torch.compile 398 / 976, and here 260 / 760. The
kernels have no graph, so no number of rows and no width ever makes one anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from server.engine.batch import Batch
from server.engine.fused import FusedDecoder, Layer, Packing
from server.engine.kernels import Kernels
from server.engine.linear import FEWEST_ROWS
from server.engine.types import EngineError
from steering.layers import decoder_layers

SILU = ("SiLU", "SiLUActivation")


class CompiledDecoder(FusedDecoder):
    """Takes the model's weights over, like its base; raises EngineError before it does so."""

    _fewest = FEWEST_ROWS

    def __init__(self, model: Any) -> None:
        _check(model)
        self._kernels = Kernels(model.dtype)
        super().__init__(model)

    def _pass(self, batch: Batch, packing: Packing, hidden: Tensor) -> Callable[[int], None]:
        rotary = self._rotary_tables(batch, packing.padding)
        layers = _Pass(self._kernels, packing, hidden, rotary)
        return lambda number: layers.run(self._layers[number])


def _check(model: Any) -> None:
    """Raise EngineError where the kernels would compute something else than the model."""
    if model.device.type != "cpu":
        raise EngineError("decoder compiled runs on a CPU only; choose decoder auto")
    layers: list[Any] = [*decoder_layers(model)]
    for layer in layers:
        name = type(layer.mlp.act_fn).__name__
        if name not in SILU:
            raise EngineError(f"decoder compiled knows SiLU, not {name}; choose decoder auto")


class _Pass:
    """The layers of one pass, whose stream `hidden` (N, D) float32 they change in place."""

    def __init__(
        self, kernels: Kernels, packing: Packing, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> None:
        self._kernels = kernels
        self._hidden = hidden
        self._packing = packing  # keeps alive what the addresses below are of
        self._rotary = rotary[0].contiguous(), rotary[1].contiguous()
        chunks = [
            (place.start, len(chunk), chunk.start, chunk.cache.room, chunk.cache.memory.data_ptr())
            for chunk, place in packing.chunks
        ]
        self._chunks = torch.tensor(chunks, dtype=torch.long)
        self._slabs = [
            (slab, place, (self._rotary[0][place], self._rotary[1][place]), lengths.contiguous())
            for slab, place, lengths in packing.slabs
        ]

    def run(self, layer: Layer) -> None:
        """Add a layer's attention and MLP to the stream."""
        kernels, hidden = self._kernels, self._hidden
        norm = layer.attention_norm
        x = kernels.add_and_norm(hidden, None, norm.weight, norm.eps)
        attended = layer.o(self._attend(layer, layer.qkv(x)))
        norm = layer.mlp_norm
        x = kernels.add_and_norm(hidden, attended, norm.weight, norm.eps)
        kernels.add(hidden, layer.down(kernels.silu_and_multiply(layer.gate_up(x))))

    def _attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """qkv (N, (Hq + 2 H) * Dh) -> (N, Hq * Dh); of no meaning where tokens are padding."""
        out = qkv.new_zeros(len(qkv), layer.num_heads * layer.head_dim)
        if len(self._chunks):
            heads = layer.num_kv_heads, layer.group, layer.head_dim
            self._kernels.attend_chunks(
                qkv, self._rotary, self._chunks, layer.number, heads, layer.scaling, out
            )
        for slab, place, tables, lengths in self._slabs:
            keys, values = slab.of_layer(layer.number)
            self._kernels.attend(
                qkv[place], tables, lengths, keys, values, layer.scaling, out[place]
            )
        return out
