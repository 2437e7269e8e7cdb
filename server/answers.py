"""ASGI responses that run one engine request while they answer it.

Whole or streamed; a client that leaves cancels the request. Does not cover what the bytes say
(convert.py, steered.py) nor how the request came about (routes/chat.py).
"""

import logging
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.convert import AnswerHead, StreamedAnswer, WholeAnswer, error_frame
from server.engine.types import EngineEvent, EngineRequest, Finished, SteeringApplied
from server.errors import GenerationFailedError, error_body
from server.generation import Generation
from server.record import RequestRecord
from server.steered import Steered

log = logging.getLogger("deshift.steering")


class EngineResponse(Response):
    """Raises, before anything is sent, what has an HTTP status of its own: a full queue, a prompt
    that is too long, a failure or a timeout before the first token; ClientLeftError at any time.
    """

    def __init__(
        self, generation: Generation, engine_request: EngineRequest, record: RequestRecord
    ) -> None:
        super().__init__()
        self._generation = generation
        self._engine_request = engine_request
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope  # the answer does not depend on it
        self._record.submitted_at = time.monotonic()
        async with self._generation.running(self._engine_request, receive):
            await self._answer(send)

    async def _answer(self, send: Send) -> None:
        raise NotImplementedError

    async def _start(self, send: Send, steered: Steered, *headers: tuple[bytes, bytes]) -> None:
        self._record.steered = steered
        steering = (b"x-deshift-steering", steered.header.encode("ascii"))
        start = {"type": "http.response.start", "status": 200, "headers": [steering, *headers]}
        await send(start)

    def _note(self, event: EngineEvent) -> None:
        match event:
            case Finished():
                self._record.prompt_tokens = event.prompt_tokens
                self._record.completion_tokens = event.completion_tokens
                self._record.cached_tokens = event.cached_tokens
                self._record.timings = event.timings
                self._record.projection = event.projection
            case SteeringApplied(failure=str(failure)):
                log.warning(
                    "request_id=%s unsteered: %a",
                    self._record.request_id,
                    failure,
                    extra=self._record.ids,
                )


class WholeResponse(EngineResponse):
    """One JSON body, when everything is there."""

    def __init__(
        self,
        generation: Generation,
        engine_request: EngineRequest,
        record: RequestRecord,
        head: AnswerHead,
        steered: Steered,
    ) -> None:
        super().__init__(generation, engine_request, record)
        self._answer_so_far = WholeAnswer(head, steered)

    async def _answer(self, send: Send) -> None:
        answer = self._answer_so_far
        async for events in self._generation.batches():
            for event in events:
                self._note(event)
                answer.add(event)
        body = answer.body()
        length = (b"content-length", str(len(body)).encode("ascii"))
        await self._start(send, answer.steered, (b"content-type", b"application/json"), length)
        await send({"type": "http.response.body", "body": body})


class StreamResponse(EngineResponse):
    """Server-sent events; the head waits for the first frame, so that failures keep their status
    and the steering that it names is settled.

    Events that arrived together leave together.
    """

    def __init__(
        self,
        generation: Generation,
        engine_request: EngineRequest,
        record: RequestRecord,
        head: AnswerHead,
        steered: Steered,
        include_usage: bool,
    ) -> None:
        super().__init__(generation, engine_request, record)
        self._answer_so_far = StreamedAnswer(head, steered, include_usage)
        self._is_started = False

    async def _answer(self, send: Send) -> None:
        try:
            async for events in self._generation.batches():
                frames = [self._answer_so_far.frames(event) for event in events]
                await self._send(send, b"".join(frames))
                for event in events:
                    self._note(event)
        except GenerationFailedError as error:
            if not self._is_started:
                raise
            self._record.failure = error.kind
            await self._send(send, error_frame(error_body(error)))
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, frames: bytes) -> None:
        if not frames:
            return
        if not self._is_started:
            self._is_started = True
            await self._start(
                send,
                self._answer_so_far.steered,
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            )
            frames = self._answer_so_far.opening() + frames
        await send({"type": "http.response.body", "body": frames, "more_body": True})
