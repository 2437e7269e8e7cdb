"""What a pass has measured goes to the requests that asked: shifts, gates' openings, projections.

Runs on the engine thread right after the pass and waits for no device: whether the numbers are
numbers is looked at by stepper.py. Does not decide what is measured (runner.py).
"""

from collections.abc import Sequence as Seq

from torch import Tensor

from server.engine.batch import Batch, Output
from server.engine.scheduler import PrefillChunk
from server.engine.sequences import ActiveRequest
from steering.methods import sample_delta
from steering.projection import Reference, shift_projection


def take_measured(
    batch: Batch, output: Output, chunks: Seq[PrefillChunk], probes: Seq[ActiveRequest]
) -> None:
    """The batch holds the chunks in their order, then the probes' last tokens."""
    for index, (delta, doses) in output.shifts.items():
        active, shift = chunks[index].active, batch.chunks[index].shift
        active.delta, active.doses = delta, doses
        if shift is not None:
            pair = output.states.get(shift.corrupted), output.states.get(shift.text_only)
            _take_reference(active, *pair)
    at = {id(chunk.state): number for number, chunk in enumerate(chunks)}
    for number, chunk in enumerate(chunks):
        active = chunk.active
        if not chunk.reads_gate or active.gate is None:  # given up: the pair failed before the pass
            continue
        if active.measures_shift:
            corrupted = output.states[at[id(active.prompts[0])]]
            _take_own_shift(active, corrupted, output.states[number])
        else:
            _take_opening(active, output.states[number])
    for number, active in enumerate(probes, start=len(chunks)):
        assert active.reference is not None
        active.projection = shift_projection(output.states[number], active.reference)


def _take_own_shift(active: ActiveRequest, corrupted: Tensor, text_only: Tensor) -> None:
    """Mode sample with a gate, which reads the text-only prompt: what its last token, and all after
    it, will subtract once the gate has scaled it."""
    gate, request = active.gate, active.request
    assert gate is not None
    delta = sample_delta(request.plan, corrupted, text_only, request.steering.directions)
    active.delta, active.doses = delta, delta.norm(dim=-1) / corrupted.norm(dim=-1)
    active.opening = gate.opening(text_only[gate.gate.layer])
    _take_reference(active, corrupted, text_only)


def _take_opening(active: ActiveRequest, states: Tensor) -> None:
    """Mode dataset: the own prompt's states, unsteered, which is all that a probe asks for."""
    assert active.gate is not None
    active.opening = active.gate.opening(states[active.gate.gate.layer])
    if active.is_probed:
        assert active.reference is not None
        active.projection = shift_projection(states, active.reference)


def _take_reference(
    active: ActiveRequest, corrupted: Tensor | None, text_only: Tensor | None
) -> None:
    """In mode sample the projection is measured against the request's own pair."""
    if active.request.probe and corrupted is not None and text_only is not None:
        active.reference = Reference(text_only, corrupted - text_only)
