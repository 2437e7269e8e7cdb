"""The start-up canary: steering moves each layer by exactly the planned amount, or no service.

One mixed batch with a prompt, then a row, a layer: number l is steered at layer l alone, the last
one not at all. So it also shows that they do not leak into each other. What counts is what the
layers' readers (the next layer, the final norm) are given, not what steering returned.
"""

from typing import Any

import torch
from torch import Tensor

from server.engine.batch import Batch, Chunk, Decoder, Rows
from server.engine.cache import KVShape, PromptCache, Slab
from server.engine.families import Family
from server.engine.runner import SteeringFaultError
from steering.layers import text_config

DOSE = 0.5
TOLERANCE = 0.02  # of the planned amount; bfloat16 rounds a sum by some 0.3 % of |h|
NUM_TOKENS = 4


def run_canary(family: Family, model: Any, decoder: Decoder) -> None:
    """Raise SteeringFaultError unless alpha 0 changes nothing and alpha 1 what was planned.

    Runs inside `torch.inference_mode()`.
    """
    num_layers = decoder.num_layers
    hidden_size = text_config(model).hidden_size
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(num_layers, hidden_size, generator=generator)
    direction = torch.nn.functional.normalize(direction, dim=-1).to(model.device)

    for make in (_prompts, _rows):
        plain = _trace(decoder, make(family, model, decoder, None))  # (L, L + 1, D)
        deltas = torch.zeros_like(plain)
        for layer in range(num_layers):
            deltas[layer, layer] = DOSE * plain[layer, layer].norm() * direction[layer]
        deltas = deltas.to(decoder.steering_dtype)
        steered = _trace(decoder, make(family, model, decoder, deltas))
        zero = _trace(decoder, make(family, model, decoder, torch.zeros_like(deltas)))
        _compare(plain, steered, zero, deltas.float())


def _prompts(family: Family, model: Any, decoder: Decoder, deltas: Tensor | None) -> Batch:
    """L + 1 equal prompts, whole."""
    shape = KVShape.of(model)
    embeds, positions = _tokens(family, model, NUM_TOKENS)
    chunks = [
        Chunk(
            embeds=embeds,
            positions=positions,
            cache=PromptCache(shape, NUM_TOKENS),
            start=0,
            end=NUM_TOKENS,
            delta=None if deltas is None else deltas[:, number],
        )
        for number in range(decoder.num_layers + 1)
    ]
    return Batch(chunks=tuple(chunks))


def _rows(family: Family, model: Any, decoder: Decoder, deltas: Tensor | None) -> Batch:
    """L + 1 equal rows at their first token."""
    num_rows = decoder.num_layers + 1
    slab = Slab(KVShape.of(model), length=1, capacity=num_rows)
    embeds, positions = _tokens(family, model, 1)
    rows = Rows(
        embeds=embeds.expand(num_rows, -1),
        positions=positions.expand(-1, num_rows),
        slab=slab,
        lengths=torch.zeros(num_rows, dtype=torch.long, device=model.device),
        longest=0,
    )
    return Batch(slabs=(rows,), deltas=deltas)


def _tokens(family: Family, model: Any, num_tokens: int) -> tuple[Tensor, Tensor]:
    token_ids = torch.arange(1, num_tokens + 1, device=model.device)
    positions = torch.arange(num_tokens, device=model.device)
    embeds: Tensor = model.get_input_embeddings()(token_ids)
    return embeds, positions.expand(3 if family.has_mrope else 1, -1)


def _trace(decoder: Decoder, batch: Batch) -> Tensor:
    output = decoder.run(batch)  # first: what is traced are passes that steer at every layer
    if output.fired != decoder.num_layers * output.forwards:
        raise SteeringFaultError(
            f"canary: steering had its turn {output.fired} times in {output.forwards} passes over "
            f"{decoder.num_layers} layers"
        )
    hidden, _ = decoder.trace(batch)
    return hidden


def _compare(plain: Tensor, steered: Tensor, zero: Tensor, deltas: Tensor) -> None:
    """All (L, L + 1, D) float32: states by layer and by prompt or row."""
    if not torch.equal(plain, zero):
        raise SteeringFaultError("canary: a pass with alpha 0 differs from an unsteered one")
    for layer in range(len(deltas)):
        moved = plain[layer, layer] - steered[layer, layer]
        planned = deltas[layer, layer]
        error = float((moved - planned).norm() / planned.norm())
        if not error <= TOLERANCE:
            raise SteeringFaultError(
                f"canary: at layer {layer} the hidden state moved by {float(moved.norm()):.4g}, "
                f"planned {float(planned.norm()):.4g}; the error is {error:.1%} of it"
            )
        untouched = torch.equal(plain[:layer, layer], steered[:layer, layer])
        if not untouched or not torch.equal(plain[:, -1], steered[:, -1]):
            raise SteeringFaultError(f"canary: steering layer {layer} moved something else too")
