"""The start-up canary: steering moves each layer by exactly the planned amount, or no service.

A given shift: one batch with a prompt, then a row, a layer: number l is steered at layer l alone,
the last one not at all. So it also shows that they do not leak into each other. What counts is what
the layers' readers (the next layer, the final norm) are given, not what steering returned. The same
again for the states' own part in a subspace (method project), one that holds much of them.

A shift that the pass measures: three different prompts, of which the first two show it and the
third subtracts it. It must be what the method makes of the two's states, and must do to the third
what the same shift does when it is given.
"""

from typing import Any

import torch
from torch import Tensor

from server.engine.batch import Batch, Chunk, Decoder, Output, Rows, Shift
from server.engine.cache import PromptCache
from server.engine.families import Family
from server.engine.runner import SteeringFaultError
from server.engine.slab import KVShape, Slab
from steering.layers import text_config
from steering.methods import sample_delta
from steering.plan import SteeringPlan

DOSE = 0.5
RANK = 2
TOLERANCE = 0.02  # of the planned amount; bfloat16 rounds a sum by some 0.3 % of |h|
NUM_TOKENS = 4
SAMPLE_PLAN = SteeringPlan(mode="sample", alpha=0.5, reason=None)
CORRUPTED, TEXT_ONLY, OWN = range(3)  # the places of the prompts that measure a shift


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
        plain = _trace(decoder, make(family, model, decoder))  # (L, L + 1, D)
        deltas = torch.zeros_like(plain)
        bases = plain.new_zeros(num_layers, num_layers + 1, RANK, hidden_size)
        parts = torch.zeros_like(plain)
        for layer in range(num_layers):
            state, towards = plain[layer, layer], direction[layer]
            deltas[layer, layer] = DOSE * state.norm() * towards
            basis = bases[layer, layer] = _basis(state, towards)
            parts[layer, layer] = sum(torch.dot(vector, state) * vector for vector in basis)
        deltas = deltas.to(decoder.steering_dtype)
        zero = _trace(decoder, make(family, model, decoder, torch.zeros_like(deltas)))
        if not torch.equal(plain, zero):
            raise SteeringFaultError("canary: a pass with alpha 0 differs from an unsteered one")
        _compare(plain, _trace(decoder, make(family, model, decoder, deltas)), deltas.float())
        projected = make(family, model, decoder, bases=bases)
        _compare(plain, _trace(decoder, projected), parts)
    _check_shift(family, model, decoder)


def _basis(state: Tensor, towards: Tensor) -> Tensor:
    """Orthonormal (RANK, D), whose first row is at about 45 degrees from the state: a state has so
    little in a subspace by chance that bfloat16 would round it away."""
    first = state / state.norm() + towards
    return torch.linalg.qr(torch.stack([first, towards.roll(1)], dim=1).float().cpu()).Q.T.to(
        state.device
    )


def _prompts(
    family: Family,
    model: Any,
    decoder: Decoder,
    deltas: Tensor | None = None,
    bases: Tensor | None = None,
) -> Batch:
    """L + 1 equal prompts, whole."""
    shape = KVShape.of(model)
    token_ids = torch.arange(1, NUM_TOKENS + 1)
    embeds, positions = _tokens(family, model, token_ids)
    chunks = [
        Chunk(
            embeds=embeds,
            positions=positions,
            cache=PromptCache(shape, NUM_TOKENS),
            start=0,
            end=NUM_TOKENS,
            delta=None if deltas is None else deltas[:, number],
            basis=None if bases is None else bases[:, number],
        )
        for number in range(decoder.num_layers + 1)
    ]
    return Batch(chunks=tuple(chunks))


def _rows(
    family: Family,
    model: Any,
    decoder: Decoder,
    deltas: Tensor | None = None,
    bases: Tensor | None = None,
) -> Batch:
    """L + 1 equal rows at their first token."""
    num_rows = decoder.num_layers + 1
    slab = Slab(KVShape.of(model), length=1, capacity=num_rows)
    embeds, positions = _tokens(family, model, torch.tensor([1]))
    rows = Rows(
        embeds=embeds.expand(num_rows, -1),
        positions=positions.expand(-1, num_rows),
        slab=slab,
        lengths=torch.zeros(num_rows, dtype=torch.long, device=model.device),
        longest=0,
    )
    return Batch(slabs=(rows,), deltas=deltas, bases=bases)


def _tokens(family: Family, model: Any, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(len(token_ids), device=model.device)
    embeds: Tensor = model.get_input_embeddings()(token_ids.to(model.device))
    return embeds, positions.expand(3 if family.has_mrope else 1, -1)


def _trace(decoder: Decoder, batch: Batch) -> Tensor:
    _run(decoder, batch)  # first: what is traced are passes that steer at every layer
    hidden, _ = decoder.trace(batch)
    return hidden


def _run(decoder: Decoder, batch: Batch) -> Output:
    output = decoder.run(batch)
    if output.fired != decoder.num_layers * output.forwards:
        raise SteeringFaultError(
            f"canary: steering had its turn {output.fired} times in {output.forwards} passes over "
            f"{decoder.num_layers} layers"
        )
    return output


def _compare(plain: Tensor, steered: Tensor, parts: Tensor) -> None:
    """All (L, L + 1, D) float32, by layer and by prompt or row: states, and what was planned to be
    subtracted from them."""
    for layer in range(len(parts)):
        moved = plain[layer, layer] - steered[layer, layer]
        planned = parts[layer, layer]
        error = _error(moved, planned)
        if not error <= TOLERANCE:
            raise SteeringFaultError(
                f"canary: at layer {layer} the hidden state moved by {float(moved.norm()):.4g}, "
                f"planned {float(planned.norm()):.4g}; the error is {error:.1%} of it"
            )
        untouched = torch.equal(plain[:layer, layer], steered[:layer, layer])
        if not untouched or not torch.equal(plain[:, -1], steered[:, -1]):
            raise SteeringFaultError(f"canary: steering layer {layer} moved something else too")


def _check_shift(family: Family, model: Any, decoder: Decoder) -> None:
    """Raise SteeringFaultError unless the shift that a pass measures and applies is the right one.

    All passes are of the same sizes, so that they round alike: a difference of states is smaller
    than the states.
    """
    measuring = _pair_and_own(family, model, shift=Shift(SAMPLE_PLAN, CORRUPTED, TEXT_ONLY))
    output = _run(decoder, measuring)
    if OWN not in output.shifts:
        raise SteeringFaultError("canary: a pass that was to measure a shift has measured none")
    measured = output.shifts[OWN][0].float()
    plain, unsteered = decoder.trace(_pair_and_own(family, model))  # (L, 3, D)
    expected = sample_delta(SAMPLE_PLAN, plain[:, CORRUPTED], plain[:, TEXT_ONLY])
    for layer in range(decoder.num_layers):
        if not _error(measured[layer], expected[layer]) <= TOLERANCE:
            raise SteeringFaultError(
                f"canary: at layer {layer} a measured shift has length "
                f"{float(measured[layer].norm()):.4g} and is off by "
                f"{float((measured - expected)[layer].norm()):.4g}: it is not what its two prompts "
                f"show, of length {float(expected[layer].norm()):.4g}"
            )
    # A trace measures no shift: the same one is given, and must end where the measured one did.
    traced, steered = decoder.trace(_pair_and_own(family, model, delta=measured))
    moved = (plain - traced)[0, OWN]
    if not _error(moved, measured[0]) <= TOLERANCE:
        raise SteeringFaultError(
            f"canary: a measured shift moved layer 0 by {float(moved.norm()):.4g}, planned "
            f"{float(measured[0].norm()):.4g}"
        )
    applied = (unsteered.hidden - output.hidden).float()
    planned = (unsteered.hidden - steered.hidden).float()
    if not _error(applied[OWN], planned[OWN]) <= TOLERANCE:
        raise SteeringFaultError("canary: a measured shift is not what its pass subtracted")
    if applied[:OWN].any() or not torch.equal(plain[:, :OWN], traced[:, :OWN]):
        raise SteeringFaultError("canary: a shift moved the prompts that it was measured with")


def _pair_and_own(
    family: Family, model: Any, delta: Tensor | None = None, shift: Shift | None = None
) -> Batch:
    """Three prompts without a token in common, of which the last is steered; the text-only one is
    shorter, as it is in service."""
    # Spread over the vocabulary, whose first tokens may be unused and all but equal.
    token_ids = torch.linspace(0, text_config(model).vocab_size - 1, 3 * NUM_TOKENS + 2).long()
    prompts = list(token_ids[1:-1].split(NUM_TOKENS))
    prompts[TEXT_ONLY] = prompts[TEXT_ONLY][1:]
    chunks = []
    for place, prompt in enumerate(prompts):
        embeds, positions = _tokens(family, model, prompt)
        chunks.append(
            Chunk(
                embeds=embeds,
                positions=positions,
                cache=PromptCache(KVShape.of(model), len(prompt)),
                start=0,
                end=len(prompt),
                delta=delta if place == OWN else None,
                shift=shift if place == OWN else None,
            )
        )
    return Batch(chunks=tuple(chunks))


def _error(actual: Tensor, planned: Tensor) -> float:
    """The distance of two (D,), of the planned one's length."""
    return float((actual - planned).norm() / planned.norm())
