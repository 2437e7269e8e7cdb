"""The steering of one fused pass: what it subtracts after each layer, and what it measures there.

Works on the packed float32 stream of fused.py; the eager decoder's is `steering.hooks`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.batch import Batch, stacked_bases
from steering.methods import SampleShift
from steering.ops import within
from steering.stopwatch import Stopwatch


class SteeringPass:
    """Made for one pass over packed tokens, (N, D) float32.

    lasts: where the last token of each chunk lies among them; rows: where the rows do. `fired`
    counts the layers at which it had its turn. What no request asks for costs nothing.
    """

    def __init__(
        self,
        batch: Batch,
        lasts: Sequence[int],
        rows: slice,
        num_layers: int,
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        self.fired = 0
        self._stopwatch = stopwatch
        chunks = batch.chunks
        given = [i for i, chunk in enumerate(chunks) if chunk.delta is not None]
        self._given = _places(lasts, given, device)
        deltas = [chunk.delta for chunk in chunks if chunk.delta is not None]
        self._deltas = torch.stack(deltas, dim=1).to(device) if deltas else None  # (L, S, D)
        projected = [i for i, chunk in enumerate(chunks) if chunk.basis is not None]
        self._projected = _places(lasts, projected, device)
        self._bases = stacked_bases([chunks[i].basis for i in projected], device)  # (L, S, k, D)
        shifts = [(i, chunk.shift) for i, chunk in enumerate(chunks) if chunk.shift]
        self._measuring = [i for i, _ in shifts]
        self._measured = _places(lasts, self._measuring, device)
        self._corrupted = _places(lasts, [shift.corrupted for _, shift in shifts], device)
        self._text_only = _places(lasts, [shift.text_only for _, shift in shifts], device)
        plans = [shift.plan for _, shift in shifts]
        directions = [shift.directions for _, shift in shifts]
        self._shift = SampleShift(plans, num_layers, device, directions) if plans else None
        self._row_deltas, self._row_bases = batch.deltas, batch.bases
        self._row_states: Tensor | None = None
        self._rows = rows
        of_chunks = (self._deltas, self._bases, self._shift)
        self._steers_chunks = any(part is not None for part in of_chunks)
        self._steers_rows = batch.deltas is not None or batch.bases is not None
        self._watching = [i for i, chunk in enumerate(chunks) if chunk.wants_states]
        self._watched = _places(lasts, self._watching, device)
        self._states: list[Tensor] = []

    def at(self, layer: int, hidden: Tensor) -> None:
        """hidden (N, D) float32 after `layer`, changed in place."""
        self.fired += 1
        if self._watching:
            self._states.append(hidden[self._watched])
        if not (self._steers_chunks or self._steers_rows):
            return
        self._stopwatch.start()
        if self._steers_chunks:
            self._steer_chunks(layer, hidden)
        if self._steers_rows:
            self._steer_rows(layer, hidden)
        self._stopwatch.stop()

    def _steer_chunks(self, layer: int, hidden: Tensor) -> None:
        if self._deltas is not None:
            hidden.index_add_(0, self._given, self._deltas[layer], alpha=-1)
        if self._bases is not None:
            part = within(hidden[self._projected], self._bases[layer])
            hidden.index_add_(0, self._projected, part, alpha=-1)
        if self._shift is not None:
            delta = self._shift.at(layer, hidden[self._corrupted], hidden[self._text_only])
            hidden.index_add_(0, self._measured, delta, alpha=-1)

    def _steer_rows(self, layer: int, hidden: Tensor) -> None:
        if self._row_states is None:  # the stream is one tensor, changed in place throughout
            self._row_states = hidden[self._rows]
        if self._row_deltas is not None:
            self._row_states.sub_(self._row_deltas[layer])
        if self._row_bases is not None:
            self._row_states.sub_(within(self._row_states, self._row_bases[layer]))

    def shifts(self) -> dict[int, tuple[Tensor, Tensor]]:
        """See `Output.shifts`."""
        if self._shift is None:
            return {}
        deltas, doses = self._shift.deltas, self._shift.doses
        return {i: (deltas[:, k], doses[:, k]) for k, i in enumerate(self._measuring)}

    def states(self) -> dict[int, Tensor]:
        """See `Output.states`."""
        return {i: torch.stack([s[k] for s in self._states]) for k, i in enumerate(self._watching)}


_NOWHERE = torch.empty(0, dtype=torch.long)  # not made anew for every decode step


def _places(lasts: Sequence[int], chunks: Sequence[int], device: torch.device) -> Tensor:
    """Where the last tokens of these chunks lie."""
    return torch.tensor([lasts[i] for i in chunks], device=device) if chunks else _NOWHERE
