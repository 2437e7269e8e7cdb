"""The checks of a model directory with its vectors, in this process, before anything is served.

Tolerances: a layer moves by what was planned within 2 % of it, and the rounding of the stream that
it is subtracted from (none to speak of where that is float32). Against the bare model, whose
passes round otherwise, steering's effect may differ by 1 % and 3 times what the two differ by
unsteered, which in turn is bounded: 0.1 % of the state in float32, 15 % in the halves. Nothing,
however it is spelled, is nothing to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from server.config import Settings
from server.engine.batch import Decoder
from server.engine.decoders import DecoderChoice, build_decoder
from server.policy import Override, Policy, decide, default_fields
from server.verify.check import Check, FailedError, Finding, SkippedError, VerifyError, check
from server.verify.passes import BareModel, EnginePasses, Pass, at_layer
from steering.corruption import corrupt
from steering.demo.pictures import example
from steering.errors import PlanError
from steering.methods import RowSteering, row_steering, sample_delta
from steering.models import LoadedModel
from steering.ops import within
from steering.plan import SteeringPlan
from steering.vectors import ShiftVectors

MAGNITUDE = 0.02
ROUNDING = 0.3  # of a dtype's step: what rounding to nearest does to a state, at most
BARE = 0.01
STATES = {torch.float32: 1e-3}
STATES_OF_HALVES = 0.15  # as the self-check at start allows the logits
Build = Callable[[DecoderChoice, Any, ExitStack], Decoder]
SEED = 0  # of the rendered picture and its question


@dataclass(frozen=True)
class Layer:
    """One layer, steered alone: |alpha w Delta| as planned, |h' - h| in a prefill and in a decode
    step, and the larger distance of the two differences from the plan, of the plan's length.

    against_bare: how far the whole plan's effect is from what it does to the bare model, of that
    effect; dose: of the state's norm. A layer that the schedule leaves alone has planned 0.
    """

    layer: int
    planned: float
    prefill: float
    decode: float
    deviation: float
    limit: float
    dose: float
    against_bare: float
    bare_limit: float


@torch.inference_mode()
def verify_model(
    loaded: LoadedModel,
    settings: Settings,
    vectors: ShiftVectors | None,
    progress: Callable[[str], None] = lambda _: None,
    build: Build = build_decoder,
) -> list[Check]:
    """`loaded` is taken over. vectors: of the settings' alias, checked against the model.

    Raises VerifyError where the settings' policy cannot be followed with these.
    """
    policy = Policy.of(default_fields(settings), 0)
    if policy.needs_vectors and policy.is_active and vectors is None:
        raise VerifyError(f"there are no vectors under the alias {policy.vector_alias!r}")
    shown = example(SEED)
    bare = BareModel(loaded, shown.question.text, shown.image)
    try:
        plan = decide(policy, None, True, vectors)
        steering = _row(plan, vectors, bare, shown.image)
    except PlanError as error:
        raise VerifyError(str(error)) from None
    progress("the bare model")
    expected = (bare.states(), bare.states(steering) if plan.is_active else None)
    with ExitStack() as life:
        decoder = partial(build, settings.decoder, loaded.model, life)
        passes = EnginePasses(loaded, shown.question.text, shown.image, decoder)
        local = Local(passes, policy, plan, steering, vectors, expected)
        checks = []
        for name, look in local.looks.items():
            progress(name)
            checks.append(check(name, look))
        return checks


def _row(
    plan: SteeringPlan, vectors: ShiftVectors | None, bare: BareModel, image: Image.Image
) -> RowSteering:
    """What the plan subtracts, its gate open; at sample level the shift that the bare model shows.
    Raises PlanError."""
    if not plan.is_active:
        return RowSteering()
    steering = replace(row_steering(plan, vectors), gate=None)
    if plan.mode != "sample":
        return steering
    corrupted, text_only = bare.states(image=corrupt(image, plan.corruption)), bare.text_only()
    delta = sample_delta(plan, corrupted, text_only, steering.directions).cpu()
    return replace(steering, delta=delta)


class Local:
    """expected: the bare model's states, unsteered and steered as planned."""

    def __init__(
        self,
        passes: EnginePasses,
        policy: Policy,
        plan: SteeringPlan,
        steering: RowSteering,
        vectors: ShiftVectors | None,
        expected: tuple[Tensor, Tensor | None],
    ) -> None:
        self._passes = passes
        self._policy = policy
        self._plan = plan
        self._steering = steering
        self._vectors = vectors
        self._bare, self._bare_steered = expected
        self.looks: dict[str, Callable[[], Finding]] = {
            "planned magnitude": self._magnitude,
            "bare model": self._unsteered,
            "zero to the bit": self._zero,
            "prompt untouched": self._untouched,
        }

    @cached_property
    def _layers(self) -> list[Layer]:
        """Raises SkippedError where nothing is steered."""
        if not self._plan.is_active:
            raise SkippedError(f"the settings steer nobody ({self._plan.reason})")
        prefill, decode = self._passes.prefill().states, self._passes.decode().states
        effect, expected, distance = self._effects()
        return [
            self._layer(number, prefill, decode, effect[number], expected[number], distance[number])
            for number in range(self._passes.decoder.num_layers)
        ]

    def _layer(
        self,
        number: int,
        prefill: Tensor,
        decode: Tensor,
        effect: Tensor,
        expected: Tensor,
        distance: Tensor,
    ) -> Layer:
        alone = at_layer(self._steering, number)
        moved = [
            plain[number] - run(alone).states[number]
            for plain, run in ((prefill, self._passes.prefill), (decode, self._passes.decode))
        ]
        planned = [_planned(alone, number, plain[number]) for plain in (prefill, decode)]
        length = float(planned[0].norm())
        norm = float(prefill[number].norm())
        rounding = ROUNDING * torch.finfo(self._passes.decoder.steering_dtype).eps * norm
        errors = [_part(m - p, p) for m, p in zip(moved, planned, strict=True)]
        return Layer(
            layer=number,
            planned=length,
            prefill=float(moved[0].norm()),
            decode=float(moved[1].norm()),
            deviation=max(errors),
            limit=MAGNITUDE + (rounding / length if length else 0.0),
            dose=length / norm,
            against_bare=_part(effect - expected, expected),
            bare_limit=BARE + 3 * _part(distance, expected),
        )

    def _effects(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the plan moves here, what it moves in the bare model, and by what the two differ
        unsteered: all (L, D)."""
        assert self._bare_steered is not None, "an active plan has been run"
        plain, steered = self._passes.whole().states, self._passes.whole(self._steering).states
        expected = self._bare - self._bare_steered
        return (plain - steered).cpu(), expected.cpu(), (plain - self._bare).cpu()

    def _magnitude(self) -> Finding:
        layers = self._layers
        steered = [layer for layer in layers if layer.planned]
        figures = {"plan": str(self._policy), "layers": [asdict(layer) for layer in layers]}
        if not steered:
            raise FailedError("the plan moves no layer", **figures)
        for layer in layers:
            idle = not layer.planned and (layer.prefill or layer.decode)
            if idle or not layer.deviation <= layer.limit:
                raise FailedError(
                    f"layer {layer.layer} moves by {layer.prefill:.4g} (prefill) and "
                    f"{layer.decode:.4g} (decode), planned is {layer.planned:.4g}",
                    **figures,
                )
            if not layer.against_bare <= layer.bare_limit:
                raise FailedError(
                    f"at layer {layer.layer} the plan's effect is {layer.against_bare:.1%} off "
                    f"what it does to the bare model (allowed {layer.bare_limit:.1%})",
                    **figures,
                )
        worst = max(steered, key=lambda layer: layer.deviation)
        bare = max(layer.against_bare for layer in layers)
        return (
            f"{len(steered)} layers move as planned, at most {worst.deviation:.2%} off (layer "
            f"{worst.layer}); all together as in the bare model, at most {bare:.2%} off"
        ), figures

    def _unsteered(self) -> Finding:
        """The passes that are steered are, unsteered, the model's own."""
        plain = self._passes.whole().states.cpu()
        distance = [
            _part(ours - theirs, theirs)
            for ours, theirs in zip(plain, self._bare.cpu(), strict=True)
        ]
        bound = STATES.get(self._passes.dtype, STATES_OF_HALVES)
        figures: dict[str, object] = {"unsteered": distance, "bound": bound}
        if not max(distance) <= bound:
            raise FailedError(
                f"unsteered states differ from the bare model's by {max(distance):.2g} of them",
                **figures,
            )
        return f"unsteered states are the bare model's, at most {max(distance):.2g} off", figures

    def _zero(self) -> Finding:
        passes = self._passes
        plain = (passes.prefill(), passes.decode())
        names = []
        for name, nothing in self._nothings():
            ours = (passes.prefill(nothing), passes.decode(nothing))
            if not all(_equal(a, b) for a, b in zip(plain, ours, strict=True)):
                raise FailedError(f"{name}: the logits are not those of an unsteered pass")
            names.append(name)
        return f"{len(names)} spellings of nothing give equal logits", {"spellings": names}

    def _nothings(self) -> Iterator[tuple[str, RowSteering]]:
        free = replace(self._policy, client_override="any")
        off, zero = replace(free, mode="off"), replace(free, alpha=0.0)
        plans = {
            "alpha 0 asked for": decide(free, Override(alpha=0.0), True, self._vectors),
            "mode off asked for": decide(free, Override(mode="off"), True, self._vectors),
            "policy's alpha 0": decide(zero, None, True, self._vectors),
            "policy's mode off": decide(off, Override(alpha=self._policy.alpha), True, None),
            "text only": decide(free, None, False, self._vectors),
            "kill switch": decide(free, None, True, self._vectors, kill="unsteered"),
            "not rolled out": decide(replace(free, rollout=0.0), None, True, self._vectors),
        }
        for name, plan in plans.items():
            if plan.is_active:
                raise FailedError(f"{name}: the plan steers all the same")
            yield name, RowSteering()
        zeros = torch.zeros_like(self._passes.prefill().states, device="cpu")
        yield "a row of zeros beside steered rows", RowSteering(delta=zeros)
        if self._plan.mode == "dataset" and self._vectors is not None:
            yield "0 x Delta", RowSteering(delta=0.0 * self._vectors.mean)

    def _untouched(self) -> Finding:
        """Keys and values before a prompt's last token are what the prefix cache shares."""
        if not self._plan.is_active:
            raise SkippedError(f"the settings steer nobody ({self._plan.reason})")
        plain, steered = self._passes.whole(), self._passes.whole(self._steering)
        assert plain.kv is not None and steered.kv is not None, "whole passes have them"
        if not torch.equal(plain.kv, steered.kv):
            raise FailedError("steering changes keys and values of earlier prompt tokens")
        return f"{plain.kv.shape[-2]} earlier tokens have the same keys and values", {}


def _planned(steering: RowSteering, layer: int, state: Tensor) -> Tensor:
    """delta_l + basis_l^T basis_l h, (D,)."""
    planned = torch.zeros_like(state)
    if steering.delta is not None:
        planned = planned + steering.delta[layer].to(state.device)
    if steering.basis is not None:
        basis = steering.basis[layer].to(state.device)
        planned = planned + within(state[None], basis[None])[0]
    return planned


def _part(difference: Tensor, of: Tensor) -> float:
    """|difference| / |of|; 0 where there is neither."""
    length = float(of.norm())
    return float(difference.norm()) / length if length else float(difference.norm())


def _equal(one: Pass, other: Pass) -> bool:
    return torch.equal(one.logits, other.logits)
