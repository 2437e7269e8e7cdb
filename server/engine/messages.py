"""What other threads leave for the engine's."""

from dataclasses import dataclass

from server.engine.sequences import ActiveRequest


@dataclass(frozen=True)
class Submit:
    active: ActiveRequest


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class Drain:
    pass


Message = Submit | Cancel | Drain
