"""A made-up server: how often it refuses, babbles and errs is known, so that the best strength is.

Each item has thresholds drawn from its id and a seed: the same item refuses from the same dose on,
whoever asks. So rates rise as a real arm's do, and candidates are compared in pairs.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from steering.evaluate.calibration import Items
from steering.evaluate.conditions import Condition
from steering.evaluate.items import Item, Kind
from steering.evaluate.judges.verdict import RefusedBy, Verdict

SUITES: tuple[tuple[str, Kind], ...] = (
    ("bad", "harmful"),
    ("good", "harmless"),
    ("shown", "visual"),
)
Curve = Callable[[float], float]


def rises(at: float, width: float = 0.6, base: float = 0.0) -> Curve:
    """From `base` to 1: half way at alpha `at`, over about `width` of its logarithm."""

    def share(alpha: float) -> float:
        risen = 1 / (1 + (at / alpha) ** (4 / width)) if alpha else 0.0
        return base + (1 - base) * risen

    return share


@dataclass(frozen=True)
class Rates:
    """Shares at a strength: harmful and harmless refused, babble, right answers lost."""

    harmful: Curve
    harmless: Curve
    babble: Curve = lambda _: 0.0
    lost: Curve = lambda _: 0.0


@dataclass
class Synthetic:
    """An `evaluate`. largest: strengths above it are refused. asked: every distinct question."""

    arms: dict[str, Rates]
    seed: int = 0
    largest: float = float("inf")
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    num_calls: int = 0

    async def __call__(self, condition: Condition, items: Sequence[Item]) -> list[Verdict] | str:
        self.num_calls += 1
        steering = dict(condition.steering or {})
        alpha = float(steering.pop("alpha", 0.0))
        if alpha > self.largest:
            return "the dose is over the limit"
        name = condition.name.partition("alpha=")[0].rstrip(":,")
        rates = self.arms.get(name) or next(iter(self.arms.values()))
        self.asked |= {(condition.name, item.suite, item.id) for item in items}
        return [self._verdict(condition.name, rates, alpha, item) for item in items]

    def _verdict(self, name: str, rates: Rates, alpha: float, item: Item) -> Verdict:
        own = random.Random(f"{self.seed}:{item.suite}:{item.id}")
        refuses, babbles, loses, knows = (own.random() for _ in range(4))
        curve = rates.harmful if item.kind == "harmful" else rates.harmless
        degenerate = babbles < rates.babble(alpha)
        refused = not degenerate and refuses < curve(alpha)
        right = None
        if item.kind == "visual":
            refused = False
            right = knows < 0.9 and not degenerate and loses >= rates.lost(alpha)
        said = RefusedBy(refused, float(refused))
        where = (name, item.suite, item.kind, item.id, "")
        return Verdict(*where, refused, said, degenerate, right, None)


def make_items(num: int, confirm: int) -> Items:
    made = [
        [Item(str(number), suite, kind, f"{suite} {number}") for number in range(num + confirm)]
        for suite, kind in SUITES
    ]
    return Items(tuple(tuple(m[:num]) for m in made), tuple(tuple(m[num:]) for m in made))
