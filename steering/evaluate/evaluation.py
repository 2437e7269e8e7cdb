"""What one run asks, in which order, and its settings for run.json. Asks nothing itself."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steering.anchors import load_anchors
from steering.errors import EvaluationError
from steering.evaluate.client import Server
from steering.evaluate.conditions import Condition
from steering.evaluate.items import Item
from steering.evaluate.pictures import Photos
from steering.evaluate.suites import Suite

MAX_TOKENS = 32
_ROUND_LEN = 32  # items of each suite

Asked = tuple[Item, Condition]


@dataclass(frozen=True)
class Sampling:
    """Greedy, so that an answer does not depend on when it was asked for."""

    max_tokens: int = MAX_TOKENS
    seed: int = 0
    temperature: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Every item has its picture (Photos.dealt). checkpoint, setup: digests of what a server that
    was started for this run serves, and of how it was started."""

    suites: tuple[Suite, ...]
    conditions: tuple[Condition, ...]
    photos: Photos
    sampling: Sampling = Sampling()
    checkpoint: str | None = None
    setup: str | None = None

    @property
    def items(self) -> list[Item]:
        return [item for suite in self.suites for item in suite.items]

    def asked(self) -> list[Asked]:
        """Every item in every condition, in the order in which they are sent.

        In rounds of some items of each suite, and in all conditions of one item before the next:
        a run that is killed has all conditions alike, and suites nearly so. Within a round items
        with the same picture follow each other, which a server's prefix cache likes. Items
        without a caption are left out of the condition that needs one. Raises EvaluationError
        where that leaves none.
        """
        places = [(place, item) for suite in self.suites for place, item in enumerate(suite.items)]
        places.sort(key=lambda each: (each[0] // _ROUND_LEN, each[1].picture_digest or ""))
        pairs = [
            (item, condition)
            for _, item in places
            for condition in self.conditions
            if condition.picture != "caption" or item.caption
        ]
        for condition in self.conditions:
            if not any(condition is other for _, other in pairs):
                raise EvaluationError(f"condition {condition.name!r}: no item has a caption")
        return pairs

    def settings(self, server: Server) -> dict[str, Any]:
        """Everything that decides the answers."""
        counts = Counter((condition.name, item.suite) for item, condition in self.asked())
        anchors = load_anchors()
        conditions = [
            {
                **asdict(condition),
                "asked": {suite.name: counts[condition.name, suite.name] for suite in self.suites},
            }
            for condition in self.conditions
        ]
        suites = [
            {
                "name": suite.name,
                "seed": suite.seed,
                "skip": suite.skip,
                "num": len(suite.items),
                "available": suite.available,
                "kinds": dict(Counter(item.kind for item in suite.items)),
                "digest": suite.digest,
                "repeats_anchors": suite.overlap(anchors),
            }
            for suite in self.suites
        ]
        return {
            "model": server.model,
            "is_deshift": server.is_deshift,
            "checkpoint": self.checkpoint,
            "setup": self.setup,
            "vectors": _vectors(server),
            "sampling": asdict(self.sampling),
            "suites": suites,
            "photos": {"num": len(self.photos.images), "digest": self.photos.digest},
            "anchors": {"name": anchors.name, "digest": anchors.digest},
            "conditions": conditions,
        }


def _vectors(server: Server) -> Mapping[str, Any] | None:
    """Alias -> id of the vector sets in force, and the policy by default."""
    steering = (server.ready or {}).get("steering")
    if not isinstance(steering, Mapping):
        return None
    return {name: steering.get(name) for name in ("policy", "vector", "vectors")}
