"""What a scenario is given besides columns and prompts, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from server.bench.fleet import Fleet
from server.bench.footprint import Budget

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured, and against what.

    streams: numbers of chats at once; pause_s: before each burst of another process; arrivals: long
    prompts at once in `stalls`; num_requests: of `memory`; num_changes: of the tenant's alpha in
    `toggle`. baseline: the column that ratios refer to; budgets: what the process of that id may
    fill with its memory; fleet: what the columns are replicas of, in scenarios that need one.
    """

    streams: Sequence[int]
    rounds: int = 1
    max_tokens: int = 64
    warmup: int = 1
    pause_s: float = 0.0
    arrivals: int = 1
    num_requests: int = 1
    num_changes: int = 1
    baseline: str = ""
    budgets: Mapping[int, Budget] = field(default_factory=dict)
    fleet: Fleet | None = None

    @property
    def num_rounds(self) -> int:
        """Those of the warm-up included."""
        return self.warmup + self.rounds


@dataclass(frozen=True)
class Outcome:
    """tables: for a terminal; figures: everything, for JSON."""

    tables: list[Table]
    figures: dict[str, Any]
    num_failed: int
