"""Traces of chat requests by OpenTelemetry, made from each record once its request has ended.

Needs the extra `otel`. Where spans go, what is sampled and the service's name are the standard
OTEL_* variables'. The SDK's own thread exports them: a collector that is slow or gone costs spans,
never a request. Does not cover other paths, nor the operators' listener.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.config import Settings
from server.errors import ConfigError
from server.heartbeat import replica_name
from server.logs import steering_fields
from server.record import RequestRecord, Stage

FLUSH_S = 5.0  # on shutdown, for the last spans to leave
TIMEOUT_STATUS = 408  # the one failure of ours with a client's status
_STAGES: tuple[Stage, ...] = ("admission", "store", "media", "prepare")
_Value = str | bool | int | float


@dataclass(frozen=True)
class Part:
    """A stretch of a request's life, in monotonic seconds, and what happened within it."""

    name: str
    start: float
    end: float
    parts: "tuple[Part, ...]" = ()


def open_tracer(settings: Settings, model: str) -> "RequestTracer":
    """Exports by OTLP over HTTP. Raises ConfigError for OTEL_* variables that cannot be used."""
    ours = Resource.create(
        {"service.name": "deshift", "service.instance.id": replica_name(settings)}
    )
    try:
        provider = TracerProvider(
            resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise ConfigError(f"an OTEL_* variable cannot be used: {error}") from None
    return RequestTracer(provider, model)


class RequestTracer:
    """`observe` is an observer of requests; takes the provider over. model: the name it has for
    clients.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("deshift")
        self._model = model
        self._propagator = TraceContextTextMapPropagator()

    def observe(self, record: RequestRecord) -> None:
        """Sets the record's trace_id where its trace is exported."""
        if not record.is_chat:
            return
        carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
        wall_ns = _wall_clock(record)
        root = self._tracer.start_span(
            f"{record.method} {record.path}",
            self._propagator.extract(carrier, Context()),  # malformed: no parent
            SpanKind.SERVER,
            start_time=wall_ns(record.started),
        )
        if not root.is_recording():
            return
        record.trace_id = f"{root.get_span_context().trace_id:032x}"
        root.set_attributes(dict(_attributes(record, self._model)))
        if record.status >= 500 or record.status == TIMEOUT_STATUS or record.failure is not None:
            root.set_status(StatusCode.ERROR)
        self._add(root, parts_of(record), wall_ns)
        root.end(wall_ns(record.started if record.ended_at is None else record.ended_at))

    def _add(
        self, parent: Span, parts: "tuple[Part, ...]", wall_ns: Callable[[float], int]
    ) -> None:
        context = set_span_in_context(parent, Context())
        for part in parts:
            span = self._tracer.start_span(part.name, context, start_time=wall_ns(part.start))
            self._add(span, part.parts, wall_ns)
            span.end(wall_ns(part.end))

    def close(self) -> None:
        """Send what waits, for FLUSH_S at most."""
        # The SDK's own bound is 30 s, and its exporter tries again for longer.
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


def parts_of(record: RequestRecord) -> tuple[Part, ...]:
    """The stages before the engine was asked and, of a finished request, the engine's, in order.

    The sample level's passes are shared with others': `shift` is this request's share of them,
    drawn from where they began.
    """
    return (*_before_engine(record), *_in_engine(record))


def _before_engine(record: RequestRecord) -> Iterator[Part]:
    for stage in _STAGES:
        if stage in record.stages:
            start = record.stage_starts[stage]
            yield Part(stage, start, start + record.stages[stage])
    if "pair" in record.stages:  # made in one go with the request's own prompt, after it
        start = record.stage_starts["prepare"] + record.stages["prepare"]
        yield Part("pair", start, start + record.stages["pair"])


def _in_engine(record: RequestRecord) -> Iterator[Part]:
    timings, submitted = record.timings, record.submitted_at
    if timings is None or submitted is None:
        return
    prefill = submitted + timings.queue_s
    first_token = prefill + timings.prefill_s
    shift = Part("shift", prefill, min(prefill + timings.shift_s, first_token))
    yield Part("queue", submitted, prefill)
    yield Part("prefill", prefill, first_token, (shift,) if timings.shift_s else ())
    yield Part("decode", first_token, submitted + timings.e2e_s)


def _wall_clock(record: RequestRecord) -> Callable[[float], int]:
    """From monotonic seconds to nanoseconds since 1970."""
    received_ns = int(record.received_at * 1e9)
    return lambda instant: received_ns + round((instant - record.started) * 1e9)


def _attributes(record: RequestRecord, model: str) -> Iterator[tuple[str, _Value]]:
    """Named by OpenTelemetry's conventions (HTTP, GenAI) where these have a name."""
    yield "http.request.method", record.method
    yield "url.path", record.path
    yield "http.response.status_code", record.status
    yield "deshift.request_id", record.request_id
    if record.failure is not None or record.status >= 400:
        yield "error.type", record.failure or str(record.status)
    if record.tenant is not None:
        yield "deshift.tenant", record.tenant
    if record.steered is not None:  # the request names this model and is understood
        yield "gen_ai.operation.name", "chat"
        yield "gen_ai.provider.name", "deshift"
        yield "gen_ai.request.model", model
        yield "gen_ai.request.stream", record.is_streamed
        for name, value in steering_fields(record).items():
            yield f"deshift.steering.{name}", value
    if record.timings is not None:
        yield "gen_ai.usage.input_tokens", record.prompt_tokens
        yield "gen_ai.usage.output_tokens", record.completion_tokens
        yield "gen_ai.usage.cache_read.input_tokens", record.cached_tokens
        if record.steered is not None:
            overhead = record.steered.overhead(record.timings)
            yield "deshift.steering.overhead_s", overhead.total_s
    if record.projection is not None:
        yield "deshift.projection", record.projection
