"""What is known about one request once it has ended: its log line, metrics and trace come from it.

Whoever learns something notes it here (middleware, routes, answers); `RequestContext` hands it to
the observers at the end. Never text, images or keys.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from starlette.types import Scope

from server.directory import Principal
from server.engine.types import RequestTimings
from server.steered import Steered

# In the order in which a request goes through them; what the engine does is in its timings.
#   admission  finding the tenant's policy and fixing the plan
#   store      taking the vectors that the plan names; requests never wait for the store itself
#   media      decoding pictures
#   prepare    chat template and processor for the request's own prompt
#   pair       the same for the sample level's two prompts
Stage = Literal["admission", "store", "media", "prepare", "pair"]
CHAT = ("POST", "/v1/chat/completions")


@dataclass
class RequestRecord:
    """Instants are monotonic, durations seconds.

    tenant and key are the principal's, None before it is known. method, path: as asked, the path
    cut. status: HTTP's; 0 until one was sent, 499 when the client left. failure: why an answer
    that had begun did not end as it should (its status is 200). steered: None until the plan is
    fixed. timings: the engine's, None unless the request finished. projection: see
    `Finished.projection`. received_at: the wall time of `started`. stage_starts: when each stage
    began first. trace_id: of the trace that is exported, None where none is.
    """

    request_id: str
    method: str = ""
    path: str = ""
    principal: Principal | None = None
    status: int = 0
    failure: str | None = None
    has_images: bool = False
    is_streamed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    steered: Steered | None = None
    stages: dict[Stage, float] = field(default_factory=dict)
    stage_starts: dict[Stage, float] = field(default_factory=dict)
    submitted_at: float | None = None
    ended_at: float | None = None
    timings: RequestTimings | None = None
    projection: float | None = None
    traceparent: str | None = None
    trace_id: str | None = None
    started: float = field(default_factory=time.monotonic)
    received_at: float = field(default_factory=time.time)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Adds what the block takes to a stage, whatever becomes of it."""
        started = time.monotonic()
        self.stage_starts.setdefault(stage, started)
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.monotonic() - started

    @property
    def tenant(self) -> str | None:
        return None if self.principal is None else self.principal.tenant

    @property
    def ids(self) -> dict[str, str]:
        """`extra` of log records about this request: fields of their own in JSON."""
        return {"request_id": self.request_id}

    @property
    def is_chat(self) -> bool:
        return (self.method, self.path) == CHAT


Observer = Callable[[RequestRecord], None]


def record_of(scope: Scope) -> RequestRecord:
    record: RequestRecord = scope["state"]["record"]
    return record
