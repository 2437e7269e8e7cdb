"""What a check says, and how far two log-probabilities may lie apart.

Tolerances: a difference is one when it is beyond both 3 times the noise that the same run showed
and an absolute bound: 1e-4 for float32, 0.05 for the halves (natural logarithms). The noise is
measured on unsteered requests that are asked again, alone and in batches: a pass of another shape
rounds otherwise, in bfloat16 visibly. Noise beyond a ceiling (0.01 and 1) is a failure by itself,
since anything could hide in it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from server.errors import ServerError

Status = Literal["ok", "failed", "skipped"]
Finding = tuple[str, dict[str, Any]]  # what was seen, and the figures
FACTOR = 3.0
BOUND = {"float32": 1e-4}
BOUND_OF_HALVES = 0.05
CEILING = {"float32": 1e-2}
CEILING_OF_HALVES = 1.0


class VerifyError(ServerError):
    """Nothing can be verified; the message is for the person at the terminal."""


class Outcome(Exception):
    """A check that is not ok; `figures` are what was measured until then."""

    status: Status

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


class FailedError(Outcome):
    """What was to be shown is not so."""

    status: Status = "failed"


class SkippedError(Outcome):
    """The check cannot be made here; the message says what would allow it."""

    status: Status = "skipped"


class RefusedError(Exception):
    """The server's own words to one request."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Check:
    """One line of the report. figures: everything that was measured, for the JSON file."""

    name: str
    status: Status
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """Of log-probabilities. noise: the largest difference between answers that ought to be equal,
    None before it was measured."""

    dtype: str
    noise: float | None = None

    @property
    def bound(self) -> float:
        return BOUND.get(self.dtype, BOUND_OF_HALVES)

    @property
    def ceiling(self) -> float:
        """Of noise that is still rounding."""
        return CEILING.get(self.dtype, CEILING_OF_HALVES)

    @property
    def limit(self) -> float:
        """What equal answers may differ by. Noise beyond the ceiling widens it no further."""
        return max(self.bound, FACTOR * min(self.noise or 0.0, self.ceiling))


def check(name: str, look: Callable[[], Finding]) -> Check:
    """Look, and put into words what came out."""
    try:
        return Check(name, "ok", *look())
    except Outcome as outcome:
        return Check(name, outcome.status, str(outcome), outcome.figures)


async def check_async(name: str, look: Callable[[], Awaitable[Finding]]) -> Check:
    """The same of a server; a request that it refuses fails the check, unless it is too busy."""
    try:
        return Check(name, "ok", *await look())
    except Outcome as outcome:
        return Check(name, outcome.status, str(outcome), outcome.figures)
    except RefusedError as refused:
        if refused.status == 429:
            return Check(name, "skipped", f"limits are in the way: {refused}")
        return Check(name, "failed", f"the server refuses a request: {refused}")


def is_verified(checks: Sequence[Check]) -> bool:
    """Whether something was looked at and nothing failed."""
    return any(c.status == "ok" for c in checks) and all(c.status != "failed" for c in checks)
