"""The only forward hooks of the project: some record hidden states, one steers them.

They sit on the decoder layers, so they see h_l, the residual stream after layer l; transformers'
`output_hidden_states` is off by one and ends after the final norm. Does not decide what is
subtracted (methods.py) nor from which row (the engine's runner).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.ops import within
from steering.stopwatch import ClockStopwatch, Reading, Stopwatch

Edit = Callable[[int, Tensor], Tensor | None]


@contextmanager
def _on_each_layer(layers: Sequence[nn.Module], edit: Edit) -> Iterator[None]:
    """Call `edit(layer, hidden)` after each layer; a Tensor that it returns replaces the hidden.

    Layers return a Tensor since transformers 4.54 and a tuple before; both are handled.
    """

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited = edit(layer, hidden)
            if edited is None:
                return None
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    with ExitStack() as handles:
        for layer, module in enumerate(layers):
            handles.callback(module.register_forward_hook(hook_of(layer)).remove)
        yield


class Recorder:
    """The last token's hidden state at each layer, of the most recent forward pass."""

    def __init__(self, num_layers: int) -> None:
        self._last: list[Tensor | None] = [None] * num_layers

    def last_hidden(self) -> Tensor:
        """(L, B, D) float32, on the model's device."""
        states = [state for state in self._last if state is not None]
        assert len(states) == len(self._last), "a layer has not run under this recorder"
        return torch.stack(states)

    def _record(self, layer: int, hidden: Tensor) -> None:
        # A copy: a view would keep the whole (B, T, D) alive, and later code may write into it.
        self._last[layer] = hidden[:, -1].to(torch.float32, copy=True)


@contextmanager
def record(layers: Sequence[nn.Module]) -> Iterator[Recorder]:
    """Record every forward pass made inside. Entered within `steer`, it sees steered states."""
    recorder = Recorder(len(layers))
    with _on_each_layer(layers, recorder._record):
        yield recorder


@contextmanager
def record_inputs(modules: Sequence[nn.Module]) -> Iterator[Recorder]:
    """Record the hidden state that each module is given; on the layers' readers (the next layer,
    the final norm) this shows what a steered layer's output became for them."""
    recorder = Recorder(len(modules))

    def hook_of(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder._record(index, args[0] if args else kwargs["hidden_states"])

        return hook

    with ExitStack() as handles:
        for index, module in enumerate(modules):
            handle = module.register_forward_pre_hook(hook_of(index), with_kwargs=True)
            handles.callback(handle.remove)
        yield recorder


@dataclass(frozen=True)
class Injection:
    """What the next forward pass subtracts from one token of each row.

    deltas (L, B, D), the model's dtype and device, alpha already multiplied in, zero for rows
    that are not steered so; token: the index in T of the one steered token, counted in this pass.
    bases (L, B, k, D), float32: of rows whose own part in a subspace is taken away, sqrt(alpha)
    already multiplied in (`steering.methods.RowSteering`), zero for the others. Either may be None.
    """

    deltas: Tensor | None
    token: int
    bases: Tensor | None = None


class Injector:
    """Subtracts the pass's injection from one token of every row; an exact no-op without one.

    Counts hook calls and times the subtractions.
    """

    def __init__(self, num_layers: int, stopwatch: Stopwatch) -> None:
        self.num_layers = num_layers
        self.injection: Injection | None = None
        self._fired = 0
        self._stopwatch = stopwatch

    def take(self) -> tuple[int, Reading]:
        """Return how often a hook was called since the last time, and what subtracting took."""
        fired, self._fired = self._fired, 0
        return fired, self._stopwatch.take()

    def _inject(self, layer: int, hidden: Tensor) -> Tensor | None:
        self._fired += 1
        injection = self.injection
        if injection is None:
            return None
        self._stopwatch.start()
        if injection.deltas is not None:
            hidden = subtract_at(hidden, injection.deltas[layer], injection.token)
        if injection.bases is not None:
            hidden = project_at(hidden, injection.bases[layer], injection.token)
        self._stopwatch.stop()
        return hidden


@contextmanager
def steer(layers: Sequence[nn.Module], stopwatch: Stopwatch | None = None) -> Iterator[Injector]:
    """Install the steering hooks; the engine enters this once, for its lifetime.

    What is subtracted belongs to the batch and is set on the yielded Injector before each
    forward pass; nothing is baked into a hook. `stopwatch`: one that fits the model's device
    (`stopwatch_of`), else the clock.
    """
    injector = Injector(len(layers), stopwatch or ClockStopwatch())
    with _on_each_layer(layers, injector._inject):
        yield injector


def subtract_at(hidden: Tensor, delta: Tensor, token: int) -> Tensor:
    """Subtract delta (B, D) from hidden (B, T, D) at one token; both of one dtype and device.

    Computed in float32 inside the kernel and rounded once to the hidden state's dtype. Returns a
    new tensor. Source: CMRM (arXiv 2410.09047), eq. 5.

    In bfloat16 that rounding is the limit, whatever dtype delta has. Measured on Gaussian states:
    the step's length is right within 2 % for doses |delta| / |h| from 1 % (D = 4096) or 2 %
    (D = 576), its component along delta from 0.5 % or 1 %. Below 0.3 % half of the coordinates
    do not move, and at 0.1 % half of the step is lost: such doses need float32.
    """
    if hidden.shape[1] == 1:
        return hidden - delta[:, None]
    steered = hidden.clone()
    steered[:, token] -= delta
    return steered


def project_at(hidden: Tensor, basis: Tensor, token: int) -> Tensor:
    """h - B^T B h at one token of hidden (B, T, D); basis (B, k, D) float32, of one device.

    Computed in float32 and rounded once to the hidden state's dtype: rows whose basis is zero come
    back equal. Returns a new tensor. Source: TBOP (arXiv 2603.14825).
    """
    state = hidden[:, token].float()
    steered = hidden.clone()
    steered[:, token] = (state - within(state, basis)).to(hidden.dtype)
    return steered
