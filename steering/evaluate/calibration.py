"""The search for the strength that leaves the fewest unsafe answers within bounds.

Within an arm, refusals of harmful and of harmless prompts rise with alpha until the model babbles,
so the largest alpha that keeps every bound is found by bisection on the arm's ladder of strengths.
Where a smaller one that was tried refused more harmful prompts, the search goes on around it.
Across arms it is a race (successive halving): all arms on a third of the items, the better half on
two thirds, half of these on all. Candidates see the same items, the first ones of each suite, so
they are compared in pairs and what was answered for a few items counts among the many. Among a
third of the items a single refusal may break a bound: an arm that breaks it at every strength, but
at some by no more than a standard error, goes on beside the better half.

The best two are confirmed on items that the search has not seen. One that breaks a bound there, or
is no safer than no steering, is followed by the next weaker strength of its arm, three times at
the most. Knows no server: `evaluate` is injected.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from steering.errors import EvaluationError
from steering.evaluate import conditions
from steering.evaluate.arms import Arm
from steering.evaluate.bounds import Bounds, Counts
from steering.evaluate.conditions import Condition
from steering.evaluate.items import Item
from steering.evaluate.judges.verdict import Verdict

FINALISTS = 2
STEPS_DOWN = 3
ROUNDS = 3
SLACK = 1.0  # standard errors, before the last round
Stage = Literal["search", "confirm"]
# The verdicts, of those that were answered; a text where the server will not do the condition at
# all (a dose over the policy's cap): the server's words.
Evaluate = Callable[[Condition, Sequence[Item]], Awaitable[list[Verdict] | str]]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Items:
    """search, confirm: by suite, the same suites in the same order, without common items."""

    search: tuple[tuple[Item, ...], ...]
    confirm: tuple[tuple[Item, ...], ...]

    def first(self, num: int) -> list[Item]:
        """Of each suite in the search."""
        return [item for suite in self.search for item in suite[:num]]

    @property
    def fresh(self) -> list[Item]:
        return [item for suite in self.confirm for item in suite]

    @property
    def rounds(self) -> list[int]:
        """Items of each suite, rising."""
        num = max(len(suite) for suite in self.search)
        return sorted({-(-num * part // ROUNDS) for part in range(1, ROUNDS + 1)})


@dataclass(frozen=True)
class Trial:
    """One condition on some items. index: of the strength among its arm's. num_items: asked.
    counts: None where the server refused, and `refusal` is why. broken: bounds that it breaks."""

    arm: str
    index: int
    alpha: float
    condition: str
    stage: Stage
    num_items: int
    counts: Counts | None
    broken: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def keeps(self) -> bool:
        return self.counts is not None and not self.broken

    def nearly_keeps(self, bounds: Bounds) -> bool:
        """Whether more items may show that it keeps them."""
        return self.counts is not None and not bounds.broken(self.counts, SLACK)

    @property
    def problem(self) -> str:
        """Why it does not keep the bounds; empty where it does."""
        if self.refusal:
            return f"refused, {self.refusal}"
        return f"breaks {' and '.join(self.broken)}" if self.broken else ""

    @property
    def order(self) -> tuple[float, ...]:
        """Better comes first; of what is alike, the weaker."""
        return (*(self.counts.order if self.counts else (1.0, 1.0)), self.alpha)


@dataclass(frozen=True)
class Calibration:
    """chosen: the confirmed trial; None where nothing keeps the bounds, and `problem` says why.
    base: without steering, on all items of each stage. ends: what became of each arm.
    num_answers: distinct questions that were put."""

    chosen: Trial | None
    problem: str | None
    base: dict[Stage, Counts]
    trials: tuple[Trial, ...]
    ends: dict[str, str]
    num_answers: int


async def calibrate(
    arms: Sequence[Arm],
    items: Items,
    evaluate: Evaluate,
    bounds: Bounds | None = None,
    told: Told = lambda _: None,
) -> Calibration:
    """Race the arms, confirm the best two, choose. told: hears what is being done."""
    search = _Search(evaluate, bounds or Bounds(), told)
    ends: dict[str, str] = {}
    finalists = await search.race(arms, items, ends)
    base: dict[Stage, Counts] = {"search": await search.base(items.first(items.rounds[-1]))}
    chosen, problem = None, None
    if finalists:
        by_name = {arm.name: arm for arm in arms}
        base["confirm"] = await search.base(items.fresh)
        leading = [(by_name[trial.arm], trial.index) for trial in finalists]
        chosen, problem = await search.confirm(leading, items.fresh)
    else:
        problem = _nothing_kept(search.trials, search.bounds, base["search"])
    if chosen:
        ends[chosen.arm] = f"chosen: alpha {chosen.alpha:g}"
    return Calibration(chosen, problem, base, tuple(search.trials), ends, len(search.questions))


async def largest_kept(
    num: int, keeps: Callable[[int], Awaitable[bool]], near: int | None = None
) -> int:
    """The largest of `num` indices that keeps, where those below one that keeps do too; -1: none.

    By bisection; with `near`, by growing steps away from there first.
    """
    low, high = -1, num
    if near is not None:
        step = 1
        if await keeps(near):
            low = near
            while low + step < num and await keeps(low + step):
                low, step = low + step, 2 * step
            high = min(num, low + step)
        else:
            high = near
            while high - step >= 0 and not await keeps(high - step):
                high, step = high - step, 2 * step
            low = max(-1, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await keeps(middle) else (low, middle)
    return low


class _Search:
    """What was tried so far. trials: in order."""

    def __init__(self, evaluate: Evaluate, bounds: Bounds, told: Told) -> None:
        self.bounds = bounds
        self.trials: list[Trial] = []
        self.questions: set[tuple[str, str, str]] = set()
        self._evaluate = evaluate
        self._told = told
        self._base = conditions.parse("base")

    async def race(self, arms: Sequence[Arm], items: Items, ends: dict[str, str]) -> list[Trial]:
        """The best trial of each of the best arms, on all items of the search, best first."""
        left: list[tuple[Arm, int | None]] = [(arm, None) for arm in arms]
        ranked: list[Trial] = []
        for number, num in enumerate(items.rounds, start=1):
            is_last = num == items.rounds[-1]
            found: list[tuple[Arm, Trial]] = []
            doubtful: list[tuple[Arm, Trial]] = []
            for arm, near in left:
                self._told(f"round {number} of {len(items.rounds)}, {arm.name}")
                tried = _Tried(self, arm, items.first(num))
                if best := await tried.best(near):
                    found.append((arm, best))
                elif not is_last and (best := await tried.nearly_best(near)):
                    doubtful.append((arm, best))
                else:
                    ends[arm.name] = self._end(arm)
            found.sort(key=lambda each: each[1].order)
            kept = found[: FINALISTS if is_last else max(FINALISTS, -(-len(found) // 2))]
            for arm, best in found[len(kept) :]:
                share = best.order[0]
                ends[arm.name] = f"out: {share:.0%} unsafe at alpha {best.alpha:g}, {num} a suite"
            left = [(arm, best.index) for arm, best in kept + doubtful]
            ranked = [best for _, best in kept]
        for trial in ranked:
            ends[trial.arm] = f"confirmed from alpha {trial.alpha:g}"
        return ranked

    async def confirm(
        self, leading: Sequence[tuple[Arm, int]], fresh: Sequence[Item]
    ) -> tuple[Trial | None, str | None]:
        """The best of those that keep the bounds on fresh items; else None, and why."""
        done: list[Trial] = []
        for step in range(STEPS_DOWN + 1):
            now = [(arm, index - step) for arm, index in leading if index >= step]
            for arm, index in now:
                self._told(f"confirming {arm.name} at alpha {arm.alphas[index]:g}")
                done.append(await self.trial(arm, index, fresh, "confirm"))
            kept = [trial for trial in done if trial.keeps]
            if kept:
                return min(kept, key=lambda trial: trial.order), None
        told = [f"{trial.condition}: {trial.problem}" for trial in done]
        return None, f"what kept the bounds in the search does not on fresh items: {_few(told)}"

    async def base(self, items: Sequence[Item]) -> Counts:
        """Without steering."""
        verdicts = await self._unsteered(items)
        return Counts.of(verdicts, verdicts)

    async def trial(self, arm: Arm, index: int, items: Sequence[Item], stage: Stage) -> Trial:
        alpha = arm.alphas[index]
        condition = arm.condition(alpha)
        verdicts = await self._verdicts(condition, items)
        place = (arm.name, index, alpha, condition.name, stage, len(items))
        if isinstance(verdicts, str):
            trial = Trial(*place, counts=None, refusal=verdicts)
        else:
            base = await self._unsteered(items)
            counts, unsteered = Counts.of(verdicts, base), Counts.of(base, base)
            broken = self.bounds.broken(counts)
            if stage == "confirm" and counts.order[0] >= unsteered.order[0]:
                broken += ("safety",)  # no better than without steering
            trial = Trial(*place, counts=counts, broken=broken)
        self.trials.append(trial)
        return trial

    async def _unsteered(self, items: Sequence[Item]) -> list[Verdict]:
        """Raises EvaluationError."""
        verdicts = await self._verdicts(self._base, items)
        if isinstance(verdicts, str):
            raise EvaluationError(f"the server refuses to answer unsteered: {verdicts}")
        return verdicts

    async def _verdicts(self, condition: Condition, items: Sequence[Item]) -> list[Verdict] | str:
        verdicts = await self._evaluate(condition, items)
        if not isinstance(verdicts, str):
            self.questions |= {(condition.name, item.suite, item.id) for item in items}
        return verdicts

    def _end(self, arm: Arm) -> str:
        """Why an arm has no strength that keeps the bounds: that of the weakest one tried."""
        weakest = min((t for t in self.trials if t.arm == arm.name), key=lambda t: t.alpha)
        return f"no strength kept the bounds; alpha {weakest.alpha:g}: {weakest.problem}"


class _Tried:
    """An arm's strengths on some items, each tried once."""

    def __init__(self, search: _Search, arm: Arm, items: Sequence[Item]) -> None:
        self._search = search
        self._arm = arm
        self._items = items
        self._trials: dict[int, Trial] = {}

    async def best(self, near: int | None) -> Trial | None:
        """The one with the fewest unsafe answers of those that keep the bounds."""

        async def keeps(index: int) -> bool:
            return (await self._at(index)).keeps

        await largest_kept(len(self._arm.alphas), keeps, near)
        while kept := [trial for trial in self._trials.values() if trial.keeps]:
            best = min(kept, key=lambda trial: trial.order)
            strongest = max(kept, key=lambda trial: trial.index)
            between = _between(self._trials, best.index)
            if best.order[0] == strongest.order[0] or not between:
                return best
            for index in between:
                await self._at(index)
        return None

    async def nearly_best(self, near: int | None) -> Trial | None:
        """Where none keeps the bounds: the strongest that nearly does."""

        async def keeps(index: int) -> bool:
            return (await self._at(index)).nearly_keeps(self._search.bounds)

        index = await largest_kept(len(self._arm.alphas), keeps, near)
        return self._trials[index] if index >= 0 else None

    async def _at(self, index: int) -> Trial:
        if index not in self._trials:
            self._trials[index] = await self._search.trial(self._arm, index, self._items, "search")
        return self._trials[index]


def _between(tried: dict[int, Trial], best: int) -> list[int]:
    """Untried indices half way from the best one to its tried neighbours."""
    below = max((index for index in tried if index < best), default=-1)
    above = min((index for index in tried if index > best), default=best)
    return [
        middle
        for middle in ((below + best) // 2, (best + above + 1) // 2)
        if middle not in tried and middle >= 0
    ]


def _nothing_kept(trials: Sequence[Trial], bounds: Bounds, base: Counts) -> str:
    if broken := bounds.broken(base):
        return f"the model breaks {' and '.join(broken)} without any steering: widen the bounds"
    tried = list(dict.fromkeys(trial.arm for trial in trials))
    return f"no strength of {len(tried)} arms keeps the bounds: {_few(tried)}"


def _few(texts: Sequence[str], num: int = 4) -> str:
    more = f" and {len(texts) - num} more" if len(texts) > num else ""
    return "; ".join(texts[:num]) + more
