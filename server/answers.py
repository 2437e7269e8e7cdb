"""ASGI responses that run one engine request while they answer it.

Whole or streamed; a client that leaves cancels the request. Does not cover what the bytes say
(convert.py) nor how the request came about (routes/chat.py).
"""

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.convert import AnswerHead, StreamedAnswer, WholeAnswer, error_frame, steering_header
from server.engine.types import EngineEvent, EngineRequest, Finished
from server.errors import GenerationFailedError, error_body
from server.generation import Generation
from server.middleware import RequestRecord


class EngineResponse(Response):
    """Raises, before anything is sent, what has an HTTP status of its own: a full queue, a prompt
    that is too long, a failure or a timeout before the first token; ClientLeftError at any time.
    """

    def __init__(
        self,
        generation: Generation,
        engine_request: EngineRequest,
        head: AnswerHead,
        record: RequestRecord,
    ) -> None:
        super().__init__()
        self._generation = generation
        self._engine_request = engine_request
        self._head = head
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope  # the answer does not depend on it
        async with self._generation.running(self._engine_request, receive):
            await self._answer(send)

    async def _answer(self, send: Send) -> None:
        raise NotImplementedError

    async def _start(self, send: Send, *headers: tuple[bytes, bytes]) -> None:
        steering = (b"x-deshift-steering", steering_header(self._head.plan).encode("ascii"))
        start = {"type": "http.response.start", "status": 200, "headers": [steering, *headers]}
        await send(start)

    def _note(self, event: EngineEvent) -> None:
        if isinstance(event, Finished):
            self._record.prompt_tokens = event.prompt_tokens
            self._record.completion_tokens = event.completion_tokens


class WholeResponse(EngineResponse):
    """One JSON body, when everything is there."""

    async def _answer(self, send: Send) -> None:
        answer = WholeAnswer(self._head)
        async for events in self._generation.batches():
            for event in events:
                self._note(event)
                answer.add(event)
        body = answer.body()
        length = (b"content-length", str(len(body)).encode("ascii"))
        await self._start(send, (b"content-type", b"application/json"), length)
        await send({"type": "http.response.body", "body": body})


class StreamResponse(EngineResponse):
    """Server-sent events; the head waits for the first event, so that failures keep their status.

    Events that arrived together leave together.
    """

    def __init__(
        self,
        generation: Generation,
        engine_request: EngineRequest,
        head: AnswerHead,
        record: RequestRecord,
        include_usage: bool,
    ) -> None:
        super().__init__(generation, engine_request, head, record)
        self._answer_so_far = StreamedAnswer(head, include_usage)
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
            await self._send(send, error_frame(error_body(error)))
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, frames: bytes) -> None:
        if not self._is_started:
            self._is_started = True
            await self._start(
                send,
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            )
            frames = self._answer_so_far.opening() + frames
        if frames:
            await send({"type": "http.response.body", "body": frames, "more_body": True})
