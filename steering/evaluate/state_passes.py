"""Measuring a run's hidden states with the bare model, steered as the server said that it did.

A sample of the run's own prompts that harm or do not, each with its picture: without it, with it,
with it blank, and with it in every steered condition. One prompt at a time, prefill only. Reads no
server; the plan of a condition is what the answers say of it.
"""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from steering.corruption import Corruption, corrupt
from steering.errors import EvaluationError, PlanError
from steering.evaluate.items import Item
from steering.evaluate.record import Answer, RunDir
from steering.evaluate.states import PLAIN, States, affordable, kept_layers
from steering.extract import last_hidden
from steering.hooks import Injection, Injector, steer
from steering.layers import decoder_layers
from steering.methods import RowSteering, row_steering, sample_delta
from steering.models import LoadedModel
from steering.ops import dose, pairwise_cosine_of_sum, within
from steering.plan import Gate, Method, Schedule, SteeringPlan
from steering.vectors import ShiftVectors

NUM = 48
_HARMLESS = ("harmless", "over-refusal")


@dataclass(frozen=True)
class Steered:
    """A condition's plan, and what it subtracts."""

    condition: str
    plan: SteeringPlan
    row: RowSteering


def measure_states(
    run_dir: Path,
    loaded: LoadedModel,
    vectors: Sequence[ShiftVectors] = (),
    *,
    num: int = NUM,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> States:
    """Measure `num` prompts, as many harmful as harmless where the run has them.

    vectors: the sets that the run's conditions need; a condition whose set is missing is left out,
    and `about` says so. Raises EvaluationError, VectorError for a set of another model.
    """
    run = RunDir(run_dir)
    for each in vectors:
        each.check(loaded.identity)
    steered, skipped = plans_of(run, vectors)
    num_layers, size = loaded.identity.num_layers, loaded.identity.hidden_size
    layers = kept_layers(num_layers)
    num = affordable(len(PLAIN) + len(steered), len(layers), size, num)
    items = _sample(run.items(), num, seed)
    if len(items) < 2:
        raise EvaluationError(f"{run_dir}: states need two harmful or harmless prompts or more")
    rows, doses = _measured(loaded, items, steered, progress)
    about = {
        "groups": [*PLAIN, *(each.condition for each in steered)],
        "kinds": ["harmful" if item.kind == "harmful" else "harmless" for item in items],
        "prompts": [[item.suite, item.id] for item in items],
        "seed": seed,
        "model": vars(loaded.identity).copy(),
        "vectors": [each.id for each in vectors],
        "skipped": skipped,
    }
    return _summed(about, layers, rows, doses)


def _measured(
    loaded: LoadedModel,
    items: Sequence[Item],
    steered: Sequence[Steered],
    progress: Callable[[int, int], None],
) -> tuple[Tensor, Tensor]:
    """(N, G, L, D) states, and (N, C, L) relative doses of the steered conditions."""
    rows, doses = [], []
    with steer(decoder_layers(loaded.model)) as injector:
        passes = Passes(loaded, injector)
        for done, item in enumerate(items, start=1):
            states, dose_of = passes.of(item, steered)
            rows.append(states)
            doses.append(dose_of)
            progress(done, len(items))
    return torch.stack(rows), torch.stack(doses)


def plans_of(run: RunDir, vectors: Sequence[ShiftVectors]) -> tuple[list[Steered], dict[str, str]]:
    """The steered conditions in the run's order, and why others are left out."""
    by_id = {each.id: each for each in vectors}
    found, skipped = [], {}
    asked = {each["name"]: each for each in run.settings().get("conditions", ())}
    applied: dict[str, Answer] = {}
    for answer in run.answers():
        said = answer.steering
        if said and said.get("mode") != "off" and said.get("reason") is None and not answer.error:
            applied.setdefault(answer.condition, answer)
    for name, answer in applied.items():
        try:
            plan = _plan((asked.get(name) or {}).get("steering") or {}, answer, by_id)
            needed = by_id.get(plan.vector_id or "")
            found.append(Steered(name, plan, row_steering(plan, needed)))
        except PlanError as error:
            skipped[name] = str(error)
    return found, skipped


def _plan(
    asked: Mapping[str, Any], answer: Answer, vectors: Mapping[str, ShiftVectors]
) -> SteeringPlan:
    """What the answer says was in force; the gate, and the most that it lets through, as asked."""
    said = answer.steering or {}
    gate = Gate.parse(asked["gate"]) if "gate" in asked else None
    is_gated = said.get("gate_opening") is not None
    alpha = asked.get("alpha") if is_gated else said["alpha"]
    if is_gated and (gate is None or alpha is None):
        raise PlanError("its gate is the policy's, of which the answers do not tell")
    method: Method = said["method"] if said.get("method") else "subtract"
    vector = said.get("vector")
    if vector is not None and vector not in vectors:
        raise PlanError(f"vector set {vector[:12]} was not given")
    return SteeringPlan(
        mode=said["mode"],
        method=method,
        alpha=float(alpha or 0.0),
        schedule=Schedule.parse(said.get("schedule") or "all"),
        vector_id=vector,
        corruption=said.get("corruption") or "blank",
        reason=None,
        gate=gate,
    )


class Passes:
    """Forward passes of one prompt at a time, under the hooks of `injector`."""

    def __init__(self, loaded: LoadedModel, injector: Injector) -> None:
        self._loaded, self._injector = loaded, injector

    def of(self, item: Item, steered: Sequence[Steered]) -> tuple[Tensor, Tensor]:
        """(G, L, D) states, and (C, L) relative doses of the steered conditions."""
        image = _opened(item)
        text, own = self._last(item, None), self._last(item, image)
        corrupted = {"blank": self._last(item, corrupt(image, "blank"))}
        states, doses = [text, own, corrupted["blank"]], []
        for each in steered:
            kind: Corruption = each.plan.corruption
            if each.plan.mode == "sample" and kind not in corrupted:
                corrupted[kind] = self._last(item, corrupt(image, kind))
            shifted = corrupted.get(kind, corrupted["blank"])
            delta, basis = _subtracted(each, text, own, shifted)
            states.append(self._last(item, image, self._injection(delta, basis)))
            taken = delta if basis is None else within(own, basis)
            assert taken is not None, "a plan subtracts a vector or projects"
            doses.append(dose(taken, own.norm(dim=-1)))
        none = torch.zeros(0, len(text))
        return torch.stack(states), torch.stack(doses) if doses else none

    def _injection(self, delta: Tensor | None, basis: Tensor | None) -> Injection:
        model = self._loaded.model
        return Injection(
            deltas=None if delta is None else delta[:, None].to(model.device, model.dtype),
            token=-1,
            bases=None if basis is None else basis[:, None].to(model.device),
        )

    def _last(
        self, item: Item, image: Image.Image | None, injection: Injection | None = None
    ) -> Tensor:
        """(L, D) float32 on the CPU."""
        self._injector.injection = injection
        try:
            hidden = last_hidden(self._loaded.model, self._loaded.processor, [item.prompt], image)
        finally:
            self._injector.injection = None
        return hidden[:, 0].cpu()


def _subtracted(
    steered: Steered, text: Tensor, own: Tensor, corrupted: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """delta (L, D) and basis (L, k, D) of one prompt; states (L, D)."""
    row, plan = steered.row, steered.plan
    delta = row.delta
    if plan.mode == "sample":
        delta = sample_delta(plan, corrupted, text, row.directions)
    opening = 1.0
    if row.gate is not None:
        read = text if plan.mode == "sample" else own
        opening = float(row.gate.opening(read[row.gate.gate.layer]))
    basis = None if row.basis is None else row.basis * math.sqrt(opening)
    return None if delta is None else delta * opening, basis


def _summed(about: Mapping[str, Any], layers: list[int], rows: Tensor, doses: Tensor) -> States:
    """rows (N, G, L, D), doses (N, C, L)."""
    text, corrupted = rows[:, 0], rows[:, 2]
    shifts = corrupted - text  # (N, L, D)
    units = torch.nn.functional.normalize(shifts.double(), dim=-1)
    consistency = pairwise_cosine_of_sum(
        units.sum(dim=0), units.square().sum(dim=(0, 2)), len(rows)
    )
    norms = rows[:, :3].norm(dim=-1).median(dim=0).values
    pictured = torch.cat([rows[:, 1:2], rows[:, 3:]], dim=1)  # unsteered, then steered
    distances = (pictured - text[:, None]).norm(dim=-1).median(dim=0).values
    return States(
        about=about,
        layers=np.array(layers),
        states=rows[:, :, layers].transpose(0, 1).contiguous().numpy(),
        norms=norms.numpy(),
        shift=shifts.norm(dim=-1).median(dim=0).values.numpy(),
        consistency=consistency.float().numpy(),
        doses=doses.median(dim=0).values.numpy(),
        distances=distances.numpy(),
    )


def _sample(items: Sequence[Item], num: int, seed: int) -> list[Item]:
    """As many harmful as harmless, in the order of a seeded shuffle."""
    groups = [
        [item for item in items if item.image is not None and item.kind in kinds]
        for kinds in (("harmful",), _HARMLESS)
    ]
    for place, group in enumerate(groups):
        random.Random(f"{seed}:{place}:states").shuffle(group)
    harmful, harmless = groups
    share = max(num // 2, num - len(harmless))
    chosen = harmful[:share]
    return [*chosen, *harmless[: num - len(chosen)]]


def _opened(item: Item) -> Image.Image:
    try:
        return Image.open(io.BytesIO(item.picture() or b"")).convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise EvaluationError(f"suite {item.suite}, {item.id}: no picture to read") from None
