"""The language model's pass, written for serving: packed tokens, few large operations.

For decoders of Llama's shape. All tokens of a pass, whatever request they belong to, go through
the matrices together; only attention looks at each prompt and at the rows apart. The residual
stream is kept in float32, so that a steering step of any size keeps its length. Equal to the
model's own modules within rounding: eager.py is the reference that tests compare with. Where a
compiler is, kernels take the place of the operations between the products (compiled.py).

Where a decode step's time goes (SmolLM2-135M, bf16, two AVX512 cores, ms at 1 / 16 rows): the
model's own modules took 42 / 72, most of it in matrix products at half the speed of memory and in
some 1,500 small operations. Here it is 22 / 31: the layers' products 12 / 16 (packed, linear.py;
QKV and gate-up are one each), the head 1.5 / 3.3, attention with rotation and writes 4 / 7 (grouped
heads are not expanded, and it looks no further than the longest row), norms 2 / 2, the subtraction
0.2 / 0.3, and the calls from Python.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import Queries, attend_chunk, attend_rows, queries_of, row_mask
from server.engine.batch import Batch, Chunk, Output
from server.engine.linear import Linear
from server.engine.memory import leave_file
from server.engine.slab import Slab
from server.engine.steering_pass import SteeringPass
from steering.layers import decoder_layers, text_config
from steering.stopwatch import stopwatch_of

# Their layers are norm, attention with rotary positions, norm, gated MLP: checked by the
# conformance suite. A class that only looks alike is run by its own modules.
FUSED_DECODERS = (
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
)

# Tokens of a pass with prefill come in multiples. On a CPU products take such steps anyway.
FINE_STEP, FINE_BELOW, COARSE_STEP = 8, 128, 32


def can_fuse(model: Any) -> bool:
    """Whether the model's decoder is of a shape that `FusedDecoder` runs.

    Modules that stand in for a plain matrix (quantised, adapted) run as they are, by the eager
    decoder. Raises ModelError where the layers are not those of the configuration.
    """
    config = text_config(model)
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not layer_types else None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if (
        type(model.get_decoder()).__name__ not in FUSED_DECODERS
        or not layer_types <= {"full_attention"}
        or (window and getattr(config, "use_sliding_window", True))
        or rope in ("dynamic", "longrope")  # these turn with the batch's longest prompt
    ):
        return False
    linears, norms = [model.get_output_embeddings()], [model.get_decoder().norm]
    layers: list[Any] = [*decoder_layers(model)]
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    return all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in linears) and all(
        hasattr(m, "weight") and hasattr(m, "variance_epsilon") for m in norms
    )


class FusedDecoder:
    """Takes the model's weights over: its own decoder cannot run afterwards."""

    steering_dtype = torch.float32
    _fewest = 1  # tokens of a pass: fewer are filled up

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        head = model.get_output_embeddings()
        self._dtype, self._device = model.dtype, model.device
        self._stopwatch = stopwatch_of(model.device)
        self._rotary = decoder.rotary_emb
        self._layers = [Layer(module) for module in decoder_layers(model)]
        self._norm = Norm(decoder.norm)
        self._head = Linear([head])
        self.num_layers = len(self._layers)
        leave_file(model)

    def run(self, batch: Batch) -> Output:
        return self._run(batch, None)

    def logits(self, hidden: Tensor) -> Tensor:
        few = max(self._fewest - len(hidden), 0)
        return self._head(nn.functional.pad(hidden, (0, 0, 0, few)))[: len(hidden)].float()

    def trace(self, batch: Batch) -> tuple[Tensor, Output]:
        seen: list[Tensor] = []
        output = self._run(batch, seen)
        return torch.stack(seen), output

    def _run(self, batch: Batch, seen: list[Tensor] | None) -> Output:
        """`seen` collects what each reader is given at the last tokens."""
        packing = Packing(batch, self._device, self._layers[0].group, self._fewest)
        self._stopwatch.take()  # of a pass that broke midway
        rows = slice(packing.first_row, packing.end)
        steering = SteeringPass(
            batch, packing.chunk_lasts, rows, self.num_layers, self._device, self._stopwatch
        )
        hidden = nn.functional.pad(batch.embeds.float(), (0, 0, 0, packing.padding))
        run_layer = self._pass(batch, packing, hidden)
        for number in range(self.num_layers):
            if seen is not None and number:
                seen.append(hidden[packing.lasts])
            run_layer(number)
            steering.at(number, hidden)
        if seen is not None:
            seen.append(hidden[packing.lasts])
        return Output(
            hidden=self._norm(hidden[packing.wanted]).to(self._dtype),
            shifts=steering.shifts(),
            states=steering.states(),
            fired=steering.fired,
            injected=self._stopwatch.take(),
        )

    def _pass(self, batch: Batch, packing: "Packing", hidden: Tensor) -> Callable[[int], None]:
        """What adds the layer of a number to the stream `hidden`, (N, D) float32, in place."""
        rotary = self._rotary_tables(batch, packing.padding)
        return lambda number: self._layers[number].run(hidden, rotary, packing, self._dtype)

    def _rotary_tables(self, batch: Batch, padding: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every packed token, (N, 1, Dh); sin's first half negated, because
        rotate_half(x) * sin = roll(x) * (-sin, sin)."""
        positions = nn.functional.pad(batch.positions, (0, padding))
        positions = positions[:, None] if len(positions) > 1 else positions  # (3, 1, N) or (1, N)
        cos, sin = self._rotary(torch.empty(0, dtype=self._dtype, device=self._device), positions)
        cos, sin = cos[0][:, None], sin[0][:, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos, sin


class Packing:
    """Where each part of the batch lies among the packed tokens, and what it may see.

    lasts: the last token of every chunk, then every row; wanted: those whose states are asked
    for. `group`: query heads of a key head. Masks are added to the scores. padding: zeros behind
    the last token, so that passes with prefill have few different sizes: for each, oneDNN compiles
    its products anew, some 2 MB of code and 4 ms, and keeps a thousand of them. Those without have
    at least `fewest` tokens.
    """

    def __init__(self, batch: Batch, device: torch.device, group: int, fewest: int) -> None:
        dtype = (batch.chunks[0] if batch.chunks else batch.slabs[0]).embeds.dtype
        self.chunks: list[tuple[Chunk, slice]] = []
        self.slabs: list[tuple[Slab, slice, Tensor]] = []  # with the rows' lengths
        self._dtype, self._device, self._group = dtype, device, group
        lasts, wanted = [], []
        end = 0
        for chunk in batch.chunks:
            place, end = slice(end, end + len(chunk)), end + len(chunk)
            chunk.cache.begin(chunk.start)
            self.chunks.append((chunk, place))
            lasts.append(end - 1)
            if chunk.wants_hidden:
                wanted.append(end - 1)
        self.chunk_lasts = list(lasts)
        self.first_row = end
        for rows in batch.slabs:
            place, end = slice(end, end + len(rows.embeds)), end + len(rows.embeds)
            rows.slab.begin(rows.lengths, rows.longest)
            self.slabs.append((rows.slab, place, rows.lengths))
        self.end = end
        step = FINE_STEP if end <= FINE_BELOW else COARSE_STEP
        self.padding = -end % step if batch.chunks else max(fewest - end, 0)
        rows_range = range(self.first_row, end)
        self.lasts = torch.tensor([*lasts, *rows_range], dtype=torch.long, device=device)
        self.wanted = torch.tensor([*wanted, *rows_range], dtype=torch.long, device=device)

    # Made where operations ask for them: kernels need no masks.

    @cached_property
    def queries(self) -> list[list[Queries]]:
        """Of each chunk."""
        return [
            queries_of(chunk, self._group, self._dtype, self._device) for chunk, _ in self.chunks
        ]

    @cached_property
    def row_masks(self) -> list[Tensor]:
        """Of each slab's rows."""
        return [row_mask(lengths, slab.width, self._dtype) for slab, _, lengths in self.slabs]


class Norm:
    """RMS norm of a float32 stream, in half the operations of `nn.functional.rms_norm`, which has
    no kernel of its own on a CPU."""

    def __init__(self, module: Any) -> None:
        self.weight = module.weight.detach().float()
        self.eps = float(module.variance_epsilon)
        self._eps = torch.tensor(self.eps, device=self.weight.device)
        self._per_number = 1.0 / len(self.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=self._per_number).rsqrt_()
        return torch.mul(hidden, scale).mul_(self.weight)


class Layer:
    """One decoder layer."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.group = self.num_heads // self.num_kv_heads
        self.scaling = attention.scaling
        self.number = attention.layer_idx
        self.attention_norm = Norm(module.input_layernorm)
        self.mlp_norm = Norm(module.post_attention_layernorm)
        self.qkv = Linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Linear([attention.o_proj])
        self.gate_up = Linear([mlp.gate_proj, mlp.up_proj])
        self.down = Linear([mlp.down_proj])
        self.activation = mlp.act_fn

    def run(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        packing: Packing,
        dtype: torch.dtype,
    ) -> None:
        """Add this layer's attention and MLP to the stream, (N, D) float32, in place."""
        x = self.attention_norm(hidden).to(dtype)
        hidden += self.o(self._attention(self.qkv(x), rotary, packing))
        x = self.mlp_norm(hidden).to(dtype)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        hidden += self.down(self.activation(gate) * up)

    def _attention(self, qkv: Tensor, rotary: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        """qkv (N, (Hq + 2 H) * Dh) -> (N, Hq * Dh)."""
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = qkv.view(len(qkv), num_rotated + self.num_kv_heads, self.head_dim)
        rotated, (cos, sin) = qkv[:, :num_rotated], rotary
        rolled = rotated.roll(self.head_dim // 2, -1)
        torch.addcmul(rotated * cos, rolled, sin, out=rotated)
        q, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        parts = []
        for (chunk, place), queries in zip(packing.chunks, packing.queries, strict=True):
            kv = torch.stack([key[place], value[place]]).transpose(1, 2)  # (2, H, T, Dh)
            keys, values = chunk.cache.append(self.number, kv)
            for part in queries:
                parts.append(attend_chunk(q[place], keys, values, part, self.scaling))
        for (slab, place, _), mask in zip(packing.slabs, packing.row_masks, strict=True):
            keys, values = slab.append(self.number, key[place], value[place])
            parts.append(attend_rows(q[place], keys, values, mask, self.scaling))
        if packing.padding:
            parts.append(q.new_zeros(packing.padding, self.num_heads * self.head_dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
