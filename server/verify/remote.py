"""The checks of a running server, over HTTP only, by log-probabilities: texts prove nothing, since
a greedy choice between near-equal tokens turns with the batch's shape.

What a check needs and the policy forbids is skipped with what would allow it. Does not cover
counters (counters.py) nor time (overhead.py).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from server.bench.prompts import Message
from server.verify.access import Access, Override, found_out
from server.verify.check import (
    Check,
    FailedError,
    Finding,
    RefusedError,
    SkippedError,
    Tolerance,
    VerifyError,
    check_async,
)
from server.verify.client import OFF, Answer, Asker, Wish, gap

NUM_PROMPTS = 3
FORBIDDEN = "steering_override_forbidden"
WOULD_ALLOW = (
    "requests may not change the steering: client_override any (DESHIFT_CLIENT_OVERRIDE, or the "
    "tenant's policy) would allow it, for a tenant of its own, say"
)
Target = tuple[str, list[Message], Wish | None]


class Remote:
    """One run of the checks, in order: the first request of all is the first that is sent."""

    def __init__(
        self,
        asker: Asker,
        dtype: str,
        *,
        max_dose: float,
        expected_override: Override | None = None,
    ) -> None:
        self.tolerance = Tolerance(dtype)
        self._asker = asker
        self._max_dose = max_dose
        self._expected_override = expected_override
        self.access = Access(asker)

    async def run(self, progress: Callable[[str], None] = lambda _: None) -> list[Check]:
        """Raises VerifyError where nothing answers."""
        prompt = self._asker.fresh()
        try:
            first = await self._asker.ask(prompt)
        except RefusedError as refused:
            raise VerifyError(f"the first request was refused: {refused}") from None
        if not first.header:
            raise VerifyError("the answer has no x-deshift-steering header: not a Deshift server")
        self.access = await found_out(self._asker, first)

        async def first_steered() -> Finding:
            return await self._first_steered(prompt, first)

        looks = {
            "noise": self._noise,
            "first request": first_steered,
            "fires": self._fires,
            "alpha 0": self._zero,
            "isolated rows": self._isolated,
            "clean cache": self._cache,
            "one story": self._agreement,
            "override": self._overrides,
            "dose": self._dose,
        }
        checks = []
        for name, look in looks.items():
            progress(name)
            checks.append(await check_async(name, look))
        return checks

    async def _noise(self) -> Finding:
        """Unsteered requests again, and beside unsteered ones."""
        gaps = []
        for num_words in (3, 11):
            prompt, wish = self.access.unsteered(num_words)
            alone = await self._asker.ask(prompt, wish)
            again = await self._asker.ask(prompt, wish)
            beside, _ = await self.access.beside(prompt, wish, self.access.unsteered_neighbours())
            gaps += [gap(alone, again), gap(alone, beside)]
        noise = max(gaps)
        self.tolerance = replace(self.tolerance, noise=noise)
        figures = {"gaps": gaps, "limit": self.tolerance.limit, "dtype": self.tolerance.dtype}
        if not noise <= self.tolerance.ceiling:
            raise FailedError(
                f"equal unsteered requests differ by {noise:.2g}: more than rounding", **figures
            )
        return f"equal requests differ by up to {noise:.2g}", figures

    async def _first_steered(self, prompt: list[Message], first: Answer) -> Finding:
        figures: dict[str, Any] = {"header": dict(first.header)}
        if not first.is_steered:
            reason = first.steering.get("reason")
            raise FailedError(f"the policy in force steers nobody: reason {reason}", **figures)
        again = await self._asker.ask(prompt)
        figures["gap"] = self._same(first, again, "the first answer and its repetition", figures)
        said = "; ".join(f"{k}={v}" for k, v in first.header.items() if k in ("mode", "alpha"))
        return f"{said}; asked again it is the same", figures

    async def _fires(self) -> Finding:
        """Some prompt's log-probabilities change; a gate may leave others alone."""
        wishes: dict[str, Wish | None] = {"policy": None}
        baseline: Wish | None = OFF
        if self.access.has_sample:
            wishes["sample"] = {"mode": "sample"}
        if not self.access.may_unsteer:
            if self.access.stronger is None:
                raise SkippedError(WOULD_ALLOW)
            wishes, baseline = {"a higher alpha": self.access.stronger}, None
        gaps: dict[str, list[float]] = {name: [] for name in wishes}
        for number in range(NUM_PROMPTS):
            prompt = self._asker.fresh(4 + number)
            before = await self._asker.ask(prompt, baseline)
            for name, wish in wishes.items():
                gaps[name].append(gap(before, await self._asker.ask(prompt, wish)))
        limit = self.tolerance.limit
        figures = {"gaps": gaps, "limit": limit}
        if idle := [name for name, seen in gaps.items() if not max(seen) > limit]:
            raise FailedError(
                f"{' and '.join(idle)}: steering changes log-probabilities by no more than "
                f"{max(max(gaps[name]) for name in idle):.2g}, where equal ones may differ by "
                f"{limit:.2g}",
                **figures,
            )
        said = ", ".join(f"{name} {max(seen):.2g}" for name, seen in gaps.items())
        return f"log-probabilities change: {said}", figures

    async def _zero(self) -> Finding:
        """Every spelling of nothing is the same nothing."""
        if not self.access.may_unsteer:
            raise SkippedError(WOULD_ALLOW)
        alpha = self.access.stronger or {"alpha": 1e-3}
        spellings: list[Wish] = [
            {"alpha": 0},
            {"mode": "dataset", "alpha": 0.0},
            {"mode": "off"} | dict(alpha),
        ]
        prompt, text = self._asker.fresh(), self._asker.fresh(has_picture=False)
        figures: dict[str, Any] = {}
        for asked, wishes in ((prompt, spellings), (text, [None, alpha])):
            off = await self._asker.ask(asked, OFF)
            for wish in wishes:
                answer = await self._asker.ask(asked, wish)
                name = f"{'picture' if asked is prompt else 'text only'}, {wish or 'policy'}"
                if answer.is_steered:
                    raise FailedError(f"{name}: the answer says it is steered", **figures)
                figures[name] = self._same(off, answer, f"off and {name}", figures)
        return f"{len(figures)} spellings of nothing are off", figures

    async def _isolated(self) -> Finding:
        """Each kind of request alone, and beside all others."""
        targets: list[Target] = [
            ("policy", self._asker.fresh(5), None),
            ("text only", self._asker.fresh(9, has_picture=False), None),
        ]
        if self.access.may_unsteer:
            targets.append(("off", self._asker.fresh(7), OFF))
        if self.access.has_sample:
            targets.append(("sample", self._asker.fresh(3), {"mode": "sample"}))
        figures: dict[str, Any] = {}
        overlaps = []
        for name, prompt, wish in targets:
            alone = await self._asker.ask(prompt, wish)
            beside, num_beside = await self.access.beside(prompt, wish, self.access.neighbours())
            overlaps.append(num_beside)
            figures[name] = self._same(alone, beside, f"{name}: alone and in a batch", figures)
        if not min(overlaps):
            raise SkippedError("nothing ran beside a request: is max_rows 1?", **figures)
        return f"{len(targets)} kinds of requests are alone what they are in a batch", figures

    async def _cache(self) -> Finding:
        """Alpha 0, high, 0 again: no key or value of the second may reach the third."""
        if not self.access.may_unsteer:
            raise SkippedError(WOULD_ALLOW)
        prompt = self._asker.fresh(8)
        cold = await self._asker.ask(prompt, {"alpha": 0})
        await self._asker.ask(prompt, self.access.stronger)
        warm = await self._asker.ask(prompt, {"alpha": 0})
        figures: dict[str, Any] = {"cached_tokens": [cold.cached_tokens, warm.cached_tokens]}
        figures["gap"] = self._same(cold, warm, "alpha 0 before and after a high alpha", figures)
        if not warm.cached_tokens:
            raise SkippedError(
                "no token came from the prefix cache: is DESHIFT_PREFIX_CACHE_BYTES 0?", **figures
            )
        return f"{warm.cached_tokens} cached tokens are clean", figures

    async def _agreement(self) -> Finding:
        """Header, body and every chunk tell of one plan and one revision."""
        wishes = [None, OFF] if self.access.may_unsteer else [None]
        for wish in wishes:
            prompt = self._asker.fresh()
            whole = await self._asker.ask(prompt, wish)
            streamed = await self._asker.ask(prompt, wish, is_stream=True)
            for way, answer in (("body", whole), ("stream", streamed)):
                if differing := _contradictions(answer):
                    raise FailedError(f"{way} and header disagree on {', '.join(differing)}")
            if streamed.revisions != (streamed.steering.get("revision"),):
                raise FailedError(f"the chunks of one stream name revisions {streamed.revisions}")
            self._same(whole, streamed, "the answer and its stream", {})
        return "header, body and chunks agree on plan and revision", {"kinds": len(wishes)}

    async def _overrides(self) -> Finding:
        """A request's wish is refused with a 403, or done and told."""
        found = self.access.override
        figures = {"client_override": found}
        try:
            answer = await self._asker.ask(self._asker.fresh(), OFF, max_tokens=1)
        except RefusedError as refused:
            if refused.status != 403 or refused.code != FORBIDDEN:
                raise
        else:
            if answer.steering.get("reason") != "disabled":
                raise FailedError(f"asked to be off, it says {dict(answer.header)}", **figures)
        expected = self._expected_override
        said = f"requests may do what client_override {found} says"
        if expected not in (None, found):
            raise FailedError(f"{said}, not {expected}", **figures)
        return said, figures

    async def _dose(self) -> Finding:
        """Of everything that was steered so far."""
        doses = self._asker.doses
        if not doses:
            raise SkippedError("nothing was steered")
        figures = {"largest": max(doses), "smallest": min(doses), "cap": self._max_dose}
        if not max(doses) <= self._max_dose:
            raise FailedError(
                f"a relative dose of {max(doses):.3g} is over {self._max_dose:g}", **figures
            )
        if not max(doses) > 0:
            raise FailedError("what says it is steered has a dose of 0", **figures)
        return f"up to {max(doses):.3g} of the state's norm, cap {self._max_dose:g}", figures

    def _same(self, one: Answer, other: Answer, what: str, figures: dict[str, Any]) -> float:
        """Their difference. Raises FailedError beyond the limit."""
        difference, limit = gap(one, other), self.tolerance.limit
        if not difference <= limit:
            seen = "no number" if math.isinf(difference) else f"{difference:.2g}"
            raise FailedError(
                f"{what} differ by {seen}, allowed is {limit:.2g}",
                **figures,
                difference=seen,
                limit=limit,
            )
        return difference


def _contradictions(answer: Answer) -> list[str]:
    """Fields that header and body tell differently; with a gate alpha is the plan's in the one
    and what was applied in the other."""
    differing = []
    for name, told in answer.header.items():
        body = answer.steering.get(name)
        if name == "alpha":
            is_gated = answer.steering.get("gate_opening") is not None
            if not is_gated and told != f"{body:g}":
                differing.append(name)
        elif name != "gate" and str(body) != told:
            differing.append(name)
    return differing
