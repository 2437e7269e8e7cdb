"""The fused pass with its decode steps by kernels of this project's own (kernels.cpp).

Passes of rows alone run each layer as four products and five kernels; passes with prompts run as
fused.py's. Steering stays between the layers, on the same float32 stream, and the slabs are the
same, so a row may go from one kind of pass to the other at any step.

Why not `torch.compile`: called layer by layer, as steering wants it, each call costs 110
microseconds before anything is computed, Dynamo's and AOTAutograd's. One layer of the demonstration
model (bf16, one core, weights in the processor's caches, microseconds at 1 / 16 rows of 90 tokens):
its products 186 / 589, fused.py 454 / 1,011, by torch.compile 398 / 976, and here 260 / 760. The
kernels have no graph, so no number of rows and no width ever makes one anew.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from server.engine.batch import Batch
from server.engine.fused import FusedDecoder, Layer, Packing
from server.engine.kernels import Kernels
from server.engine.slab import Slab
from server.engine.types import EngineError
from steering.layers import decoder_layers

SILU = ("SiLU", "SiLUActivation")


class CompiledDecoder(FusedDecoder):
    """Takes the model's weights over, like its base; raises EngineError before it does so."""

    def __init__(self, model: Any) -> None:
        _check(model)
        self._kernels = Kernels(model.dtype)
        super().__init__(model)

    def _pass(self, batch: Batch, packing: Packing, hidden: Tensor) -> Callable[[int], None]:
        if batch.chunks:
            return super()._pass(batch, packing, hidden)
        step = _Step(self._kernels, batch, hidden, self._rotary_tables(batch, 0))
        return lambda number: step.run(self._layers[number])


def _check(model: Any) -> None:
    """Raise EngineError where the kernels would compute something else than the model."""
    if model.device.type != "cpu":
        raise EngineError("decoder compiled runs on a CPU only; choose decoder auto")
    layers: list[Any] = [*decoder_layers(model)]
    for layer in layers:
        name = type(layer.mlp.act_fn).__name__
        if name not in SILU:
            raise EngineError(f"decoder compiled knows SiLU, not {name}; choose decoder auto")


class _Step:
    """One pass of rows alone, whose stream `hidden` (N, D) float32 it changes in place."""

    def __init__(
        self, kernels: Kernels, batch: Batch, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> None:
        self._kernels = kernels
        self._hidden = hidden
        cos, sin = rotary
        self._slabs: list[tuple[Slab, slice, tuple[Tensor, Tensor], Tensor]] = []
        end = 0
        for rows in batch.slabs:
            place, end = slice(end, end + len(rows.embeds)), end + len(rows.embeds)
            tables = cos[place].contiguous(), sin[place].contiguous()
            self._slabs.append((rows.slab, place, tables, rows.lengths.contiguous()))

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
        """qkv (N, (Hq + 2 H) * Dh) -> (N, Hq * Dh)."""
        out = qkv.new_empty(len(qkv), layer.num_heads * layer.head_dim)
        for slab, place, tables, lengths in self._slabs:
            keys, values = slab.of_layer(layer.number)
            self._kernels.attend(
                qkv[place], tables, lengths, keys, values, layer.scaling, out[place]
            )
        return out
