"""The one interface of an engine; `server` speaks to nothing deeper.

Implementations: the embedded engine (engine.py) and the tests' fake.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from server.engine.stats import EngineStats
from server.engine.types import EngineInputs, EngineRequest, EngineStatus
from steering.corruption import Corruption
from steering.models import ModelIdentity


class Engine(Protocol):
    """Every method may be called from the event loop's thread; only `prepare` is slow."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        ...

    @property
    def identity(self) -> ModelIdentity:
        """Which model it runs; shift vectors are checked against it."""
        ...

    def prepare(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        corruption: Corruption | None = None,
    ) -> EngineInputs:
        """Apply the chat template and the processor; CPU work, run it in a thread pool.

        messages: {"role", "content"}; content a string or a list of {"type": "text", "text"} and
        {"type": "image"} parts, in order; images: the pictures of all image parts, in order.
        corruption: also make the sample level's pair of prompts, with pictures corrupted so.
        Raises InputError.
        """
        ...

    def submit(self, request: EngineRequest) -> None:
        """Accept a request; from here exactly one terminal event follows.

        Raises PromptTooLongError, QueueFullError, NotAcceptingError: then no event follows.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Free the request's rows at the next step; unknown ids are ignored."""
        ...

    def status(self) -> EngineStatus: ...

    def stats(self) -> EngineStats:
        """What it has counted so far."""
        ...

    def start(self) -> None:
        """Start the thread and run the canary; returns when ready. Raises EngineError if not."""
        ...

    def drain(self, timeout_s: float) -> None:
        """Accept nothing more, finish what runs, stop the thread; blocks up to `timeout_s`."""
        ...
