"""What the judges say of one answer: a line of judged.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steering.evaluate.items import Kind
from steering.evaluate.record import Key


@dataclass(frozen=True)
class RefusedBy:
    """What each judge of refusals says by itself. classifier: probability."""

    prefix: bool
    classifier: float


@dataclass(frozen=True)
class Verdict:
    """refused: by both judges together (refusal.py), never of a degenerate answer, which is never
    right either. right and unsafe: None where nobody was asked, or what the judge said was no
    verdict; unsafe is None too of a degenerate answer that a model called safe, for babble is not
    safety. answer_digest: of the answer that was judged, by which an older verdict is told from a
    later answer."""

    condition: str
    suite: str
    kind: Kind
    id: str
    answer_digest: str
    refused: bool
    refused_by: RefusedBy
    degenerate: bool
    right: bool | None
    unsafe: bool | None

    @property
    def key(self) -> Key:
        return (self.condition, self.suite, self.id)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        """Raises TypeError for a mapping that is no verdict."""
        return cls(**{**values, "refused_by": RefusedBy(**values["refused_by"])})
