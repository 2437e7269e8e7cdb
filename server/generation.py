"""One request inside the engine, seen from the event loop: its events, and its end.

The engine thread emits, the event loop consumes; leaving a generation before its terminal event
cancels it, so that nothing is generated for nobody. Does not cover the wire format (convert.py).
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.types import Receive

from server.engine.api import Engine
from server.engine.types import EngineEvent, EngineRequest, Failed, Finished
from server.errors import GenerationFailedError


class ClientLeftError(Exception):
    """The client closed its connection; there is nobody to answer."""


async def until_left(client: Receive) -> None:
    """Wait for the client's leaving. `client` is the ASGI receive channel after the body."""
    while (await client())["type"] != "http.disconnect":
        pass


class EventBridge:
    """Carries events from the engine thread to the event loop, one wake-up for many events."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: deque[tuple[Generation, EngineEvent]] = deque()
        self._is_woken = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def deliver(self, generation: "Generation", event: EngineEvent) -> None:
        """Called on the engine thread; does not block."""
        self._pending.append((generation, event))
        if self._is_woken:
            return  # the flag falls before the loop empties the deque, so this event is seen
        self._is_woken = True
        assert self._loop is not None, "events come only after the lifespan bound the loop"
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_woken = False
        while self._pending:
            generation, event = self._pending.popleft()
            generation.receive(event)


class Generation:
    """The events of one engine request. Bounded by nature: one answer has so many tokens."""

    def __init__(self, engine: Engine, bridge: EventBridge) -> None:
        self._engine = engine
        self._bridge = bridge
        self._inbox: list[EngineEvent] = []
        self._arrived = asyncio.Event()
        self._client_left = False
        self._is_over = False

    def emit(self, event: EngineEvent) -> None:
        """EngineRequest.emit: called on the engine thread."""
        self._bridge.deliver(self, event)

    def receive(self, event: EngineEvent) -> None:
        """Called on the event loop."""
        self._is_over = self._is_over or isinstance(event, Finished | Failed)
        self._inbox.append(event)
        self._arrived.set()

    @asynccontextmanager
    async def running(self, request: EngineRequest, client: Receive) -> AsyncIterator[None]:
        """Submit `request`; on leaving, cancel it unless it is over.

        Raises what Engine.submit raises. `client` is the ASGI receive channel, whose body has been
        read: the next message is the disconnect.
        """
        self._engine.submit(request)
        watch = asyncio.create_task(self._watch(client))
        try:
            yield
        finally:
            watch.cancel()
            if not self._is_over:
                self._engine.cancel(request.request_id)

    async def batches(self) -> AsyncIterator[list[EngineEvent]]:
        """Whatever has arrived, up to and including Finished.

        Raises GenerationFailedError when the engine gave up, ClientLeftError when the client did.
        """
        is_finished = False
        while not is_finished:
            await self._arrived.wait()
            self._arrived.clear()
            if self._client_left:
                raise ClientLeftError
            events, self._inbox = self._inbox, []
            last = events[-1]
            is_finished = isinstance(last, Finished)
            if not isinstance(last, Failed):
                yield events
                continue
            if events[:-1]:
                yield events[:-1]
            raise GenerationFailedError(last.kind, last.message)

    async def _watch(self, client: Receive) -> None:
        await until_left(client)
        self._client_left = True
        self._arrived.set()
