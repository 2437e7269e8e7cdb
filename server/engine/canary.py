"""The start-up canary: the hooks steer each layer by exactly the planned amount, or no service.

One mixed batch with a row a layer: row l is steered at layer l alone, the last row not at all.
So it also shows that rows do not leak into each other. What counts is what the layers' readers
(the next layer, the final norm) are given, not what the hooks returned.
"""

from typing import Any

import torch
from torch import Tensor

from server.engine.runner import SteeringFaultError
from steering.hooks import Injection, Injector, record_inputs
from steering.layers import decoder_layers, text_config

DOSE = 0.5
TOLERANCE = 0.02  # of the planned amount; bfloat16 rounds a sum by some 0.3 % of |h|
NUM_TOKENS = 4


def run_canary(model: Any, injector: Injector) -> None:
    """Raise SteeringFaultError unless alpha 0 changes nothing and alpha 1 what was planned.

    Runs inside `torch.inference_mode()`, with the steering hooks installed.
    """
    layers = decoder_layers(model)
    readers = [*layers[1:], model.get_decoder().norm]
    num_layers = len(layers)
    hidden_size = text_config(model).hidden_size
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(num_layers, hidden_size, generator=generator)
    direction = torch.nn.functional.normalize(direction, dim=-1)

    for num_tokens in (1, NUM_TOKENS):
        with record_inputs(readers) as recorder:
            _forward(model, injector, None, num_layers + 1, num_tokens)
            plain = recorder.last_hidden()  # (L, L + 1, D)
            deltas = torch.zeros_like(plain)
            for layer in range(num_layers):
                norm = plain[layer, layer].norm()
                deltas[layer, layer] = DOSE * norm * direction[layer].to(norm.device)
            injection = Injection(deltas.to(model.dtype), token=num_tokens - 1)
            _forward(model, injector, injection, num_layers + 1, num_tokens)
            steered = recorder.last_hidden()
            injection = Injection(torch.zeros_like(deltas).to(model.dtype), token=num_tokens - 1)
            _forward(model, injector, injection, num_layers + 1, num_tokens)
            zero = recorder.last_hidden()
        _compare(plain, steered, zero, deltas.to(model.dtype).float())


def _forward(
    model: Any, injector: Injector, injection: Injection | None, num_rows: int, num_tokens: int
) -> None:
    device = model.device
    token_ids = torch.arange(1, num_tokens + 1, device=device).expand(num_rows, -1)
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    injector.injection = injection
    model.get_decoder()(
        inputs_embeds=model.get_input_embeddings()(token_ids),
        position_ids=torch.arange(num_tokens, device=device).expand(num_rows, -1),
        attention_mask=causal.expand(num_rows, 1, -1, -1),
        use_cache=False,
    )
    injector.injection = None
    fired, _ = injector.take()
    if fired != injector.num_layers:
        raise SteeringFaultError(
            f"canary: {fired} steering hooks fired in a pass over {injector.num_layers} layers"
        )


def _compare(plain: Tensor, steered: Tensor, zero: Tensor, deltas: Tensor) -> None:
    """All (L, L + 1, D) float32: states by layer and row."""
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
