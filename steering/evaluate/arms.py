"""Arms: ways to steer whose strength is to be found, and the strengths that are tried.

An arm is a condition without its alpha. Asks and judges nothing (calibration.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from steering.errors import EvaluationError
from steering.evaluate import conditions
from steering.evaluate.conditions import Condition

# Each a quarter more than the one before (the R10 series), so that every strength is met within
# an eighth, and a bisection needs five of them.
LADDER = (
    *(0.01, 0.0125, 0.016, 0.02, 0.025, 0.032, 0.04, 0.05, 0.063, 0.08),
    *(0.1, 0.125, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.63, 0.8),
    *(1.0, 1.25, 1.6, 2.0),
)
_LARGEST = {"project": 1.0}  # method project takes everything away at 1
# What `deshift calibrate --sweep` asks: strengths around what each arm can take on the
# demonstration model, five ways of six strengths.
SWEEP = (
    "dataset:schedule=all@0.01,0.02,0.03,0.04,0.06,0.1",
    "dataset:schedule=incremental@0.05,0.1,0.15,0.2,0.25,0.4",
    "sample:schedule=incremental@0.05,0.1,0.15,0.2,0.25,0.4",
    "dataset:method=safety-projected,schedule=incremental@0.125,0.25,0.5,0.75,1,1.5",
    "dataset:schedule=incremental,gate=15:0:0.1@0.1,0.15,0.2,0.25,0.4,0.8",
)


@dataclass(frozen=True)
class Arm:
    """name: the condition without alpha, as `conditions.parse` reads it. alphas: rising."""

    name: str
    alphas: tuple[float, ...]

    def condition(self, alpha: float) -> Condition:
        """What is asked for at that strength."""
        colon = "," if ":" in self.name else ":"
        return conditions.parse(f"{self.name}{colon}alpha={alpha:g}")


def parse(text: str, alphas: Sequence[float] = LADDER) -> Arm:
    """Parse `dataset:schedule=incremental`, or with strengths of its own after an @:
    `dataset:schedule=all@0.01,0.02`. Raises EvaluationError.
    """
    name, at, own = text.partition("@")
    condition = conditions.parse(name)
    steering = condition.steering or {}
    if steering.get("mode") not in ("dataset", "sample"):
        raise EvaluationError(f"arm {text!r}: only dataset and sample have a strength to be found")
    if "alpha" in steering:
        raise EvaluationError(f"arm {text!r}: its alpha is what is to be found: write {name}@ALPHA")
    chosen = parse_alphas(own) if at else tuple(alphas)
    method = steering.get("method", "")
    return Arm(name, tuple(a for a in chosen if a <= _LARGEST.get(method, float("inf"))))


def parse_all(texts: Sequence[str], alphas: Sequence[float] = LADDER) -> list[Arm]:
    """Several. Raises EvaluationError, for two of one name or one without strengths too."""
    arms = [parse(text, alphas) for text in texts]
    for index, arm in enumerate(arms):
        if not arm.alphas:
            raise EvaluationError(f"arm {arm.name!r} has no strength left to try")
        if any(arm.name == other.name for other in arms[:index]):
            raise EvaluationError(f"arm {arm.name!r} is given twice")
    return arms


def parse_alphas(text: str) -> tuple[float, ...]:
    """`0.05,0.1,0.2`, sorted. Raises EvaluationError for what is no number above 0."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not 0 < found[0] <= found[-1] < float("inf"):
        raise EvaluationError(f"strengths {text!r}: write numbers above 0, such as 0.05,0.1,0.2")
    return tuple(found)


def defaults(num_layers: int | None) -> list[str]:
    """The arms that are tried where none are named. num_layers: of the model; without it those
    that name layers are left out."""
    found = [
        "dataset:schedule=all",
        "dataset:schedule=incremental",
        "sample:schedule=all",
        "sample:schedule=incremental",
        "dataset:method=safety-projected,schedule=incremental",
    ]
    if num_layers is None:
        return found
    gate = f"gate={num_layers // 2}:0:0.1"
    found += [f"{mode}:schedule=incremental,{gate}" for mode in ("dataset", "sample")]
    bounds = [num_layers * third // 3 for third in range(4)]
    thirds = [(a, b - 1) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    return found + [f"dataset:schedule=incremental:{first}-{last}" for first, last in thirds]
