"""Traces as a collector receives them: over OTLP/HTTP, by the standard variables."""

import builtins
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.testclient import TestClient

from server.app import create_app
from server.errors import ConfigError
from server.record import CHAT, RequestRecord
from server.tracing import RequestTracer, open_tracer
from steering.stores import Store
from tests.server.conftest import make_settings
from tests.server.fakes import SHIFT_S, TIMINGS, FakeEngine, chat_body
from tests.server.test_logs import VECTOR, JsonLines, Lines, chat_record, written

__all__ = ["written"]  # a fixture

METHOD, PATH = CHAT
ROOT = f"{METHOD} {PATH}"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE_ID}-{PARENT_ID}-{flag}" for flag in ("01", "00"))


class Collector:
    """Receives OTLP over HTTP on a free port, and decodes it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.headers = {k.lower(): v for k, v in self.headers.items()}
                collector.add(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Not on stderr."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            self.resource = {a.key: a.value.string_value for a in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans.extend(scope.spans)

    def span(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def children(self, parent: str) -> list[str]:
        """In order of their beginnings."""
        parent_id = self.span(parent).span_id
        mine = [span for span in self.spans if span.parent_span_id == parent_id]
        return [span.name for span in sorted(mine, key=lambda span: span.start_time_unix_nano)]


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """What the standard variables name."""
    with running_collector() as started:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", started.url)
        yield started


@pytest.fixture
def tracer(collector: Collector) -> RequestTracer:
    """Ends up at the collector when it is closed."""
    assert collector.url
    return open_tracer(make_settings(replica="here"), "tiny")


@pytest.fixture
def traced(fake_engine: FakeEngine, store: Store, collector: Collector) -> TestClient:
    """A server whose spans are with the collector once its client is left."""
    assert collector.url
    app = create_app(
        make_settings(tracing="otlp", steering_mode="sample"), engine=fake_engine, store=store
    )
    return TestClient(app, "http://127.0.0.1")


def sampled_record(**changes: Any) -> RequestRecord:
    """With every stage; instants are at round numbers after `started`, 100."""
    values: dict[str, Any] = {
        "received_at": 1_795_000_000.0,
        "stages": {"admission": 0.1, "store": 0.1, "media": 0.2, "prepare": 0.2, "pair": 0.1},
        "stage_starts": {"admission": 100.1, "store": 100.2, "media": 100.3, "prepare": 100.5},
        "submitted_at": 100.9,
        "ended_at": 102.0,
        "trace_id": None,
    }
    return chat_record(**{**values, **changes})


def attributes_of(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def seconds(span: Span) -> tuple[float, float]:
    """Beginning and end after the request's arrival."""
    base = 1_795_000_000_000_000_000
    begin, end = span.start_time_unix_nano - base, span.end_time_unix_nano - base
    return round(begin / 1e9, 6), round(end / 1e9, 6)


def test_the_spans_of_a_request_nest_and_follow_each_other(
    tracer: RequestTracer, collector: Collector
) -> None:
    record = sampled_record()
    assert record.timings is not None
    record.timings = replace(record.timings, shift_s=0.05)
    tracer.observe(record)
    tracer.close()
    stages = ["admission", "store", "media", "prepare", "pair"]
    assert collector.children(ROOT) == [*stages, "queue", "prefill", "decode"]
    assert collector.children("prefill") == ["shift"]
    assert len(collector.spans) == 10
    expected = {
        ROOT: (0.0, 2.0),
        "admission": (0.1, 0.2),
        "store": (0.2, 0.3),
        "media": (0.3, 0.5),
        "prepare": (0.5, 0.7),
        "pair": (0.7, 0.8),
        "queue": (0.9, 1.0),  # 0.1 s after it was submitted,
        "prefill": (1.0, 1.2),  # 0.2 s later,
        "shift": (1.0, 1.05),
        "decode": (1.2, 1.9),  # and 1 s end to end
    }
    assert {span.name: seconds(span) for span in collector.spans} == expected
    assert {span.trace_id.hex() for span in collector.spans} == {record.trace_id}
    assert collector.span(ROOT).parent_span_id == b""
    assert collector.span(ROOT).kind == Span.SPAN_KIND_SERVER


def test_the_root_says_what_was_asked_answered_and_subtracted(
    tracer: RequestTracer, collector: Collector
) -> None:
    tracer.observe(sampled_record())
    tracer.close()
    assert attributes_of(collector.span(ROOT)) == {
        "http.request.method": "POST",
        "url.path": PATH,
        "http.response.status_code": 200,
        "deshift.request_id": "r1",
        "deshift.tenant": "acme",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "deshift",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": 80,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 64,
        "deshift.steering.mode": "dataset",
        "deshift.steering.method": "subtract",
        "deshift.steering.alpha": 0.37,
        "deshift.steering.vector": VECTOR,
        "deshift.steering.revision": 12,
        "deshift.steering.relative_dose": 0.25,
        "deshift.steering.overhead_s": pytest.approx(0.007),
        "deshift.projection": 0.5,
    }
    assert collector.span(ROOT).status.code == Status.STATUS_CODE_UNSET
    assert collector.resource["service.name"] == "deshift"
    assert collector.resource["service.instance.id"] == "here"


def test_the_standard_variables_name_the_service_and_what_is_sent(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-eu")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=abc")
    tracer = open_tracer(make_settings(), "tiny")
    tracer.observe(sampled_record())
    tracer.close()
    assert collector.resource["service.name"] == "chat-eu"
    assert collector.headers["x-token"] == "abc"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    collector.spans.clear()
    tracer, record = open_tracer(make_settings(), "tiny"), sampled_record()
    tracer.observe(record)
    tracer.close()
    assert collector.spans == [] and record.trace_id is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"status": 503}, "503"),
        ({"status": 408}, "408"),
        ({"failure": "engine"}, "engine"),
        ({"status": 400}, None),  # the client's: no failure of this server
        ({"status": 499}, None),
    ],
)
def test_failures_are_errors(
    tracer: RequestTracer, collector: Collector, changes: dict[str, Any], error: str | None
) -> None:
    tracer.observe(sampled_record(timings=None, **changes))
    tracer.close()
    root = collector.span(ROOT)
    told = attributes_of(root)["error.type"]
    assert (root.status.code == Status.STATUS_CODE_ERROR) is (error is not None)
    assert told == (error or str(changes["status"]))
    assert "decode" not in collector.children(ROOT), "it did not finish"


def test_a_caller_s_trace_goes_on(tracer: RequestTracer, collector: Collector) -> None:
    record = sampled_record(traceparent=SAMPLED)
    tracer.observe(record)
    tracer.close()
    assert record.trace_id == TRACE_ID
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert collector.span(ROOT).parent_span_id.hex() == PARENT_ID


def test_what_the_caller_does_not_sample_is_not_exported(
    tracer: RequestTracer, collector: Collector
) -> None:
    record = sampled_record(traceparent=UNSAMPLED)
    tracer.observe(record)
    tracer.close()
    assert collector.spans == [] and record.trace_id is None


@pytest.mark.parametrize(
    "header",
    ["", "x", SAMPLED[:-1], f"00-{'0' * 32}-{PARENT_ID}-01", f"ff-{TRACE_ID}-{PARENT_ID}-01",
     f"00-{TRACE_ID}-{'0' * 16}-01", "00-" + "z" * 32 + f"-{PARENT_ID}-01", SAMPLED * 1000, "\xe9"],
)  # fmt: skip
def test_a_malformed_parent_is_none(
    tracer: RequestTracer, collector: Collector, header: str
) -> None:
    tracer.observe(sampled_record(traceparent=header))
    tracer.close()
    root = collector.span(ROOT)
    assert root.parent_span_id == b"" and root.trace_id.hex() != TRACE_ID


def test_only_chats_are_traced(tracer: RequestTracer, collector: Collector) -> None:
    tracer.observe(sampled_record(path="/health", method="GET"))
    tracer.observe(sampled_record(path="/v1/models", method="GET"))
    tracer.close()
    assert collector.spans == []


def test_a_server_s_requests_arrive_with_the_ids_of_log_and_header(
    traced: TestClient, collector: Collector, written: Callable[..., Lines]
) -> None:
    with traced as client:
        lines = written(JsonLines())
        body = chat_body("PROMPT", images=1)
        answer = client.post(PATH, json=body, headers={"traceparent": SAMPLED})
        assert answer.status_code == 200
        assert client.post(PATH, json={}).status_code == 400
    told = [json.loads(t) for t in lines.texts if f'"path": "{PATH}"' in t]
    (root,) = [s for s in collector.spans if s.trace_id.hex() == TRACE_ID and s.name == ROOT]
    names = [s.name for s in collector.spans if s.trace_id.hex() == TRACE_ID]
    assert sorted(names) == sorted(
        ["admission", "store", "media", "prepare", "pair", "queue", "shift", "prefill", "decode"]
        + [ROOT]
    )
    assert attributes_of(root)["deshift.request_id"] == answer.headers["x-request-id"]
    assert told[0]["request_id"] == answer.headers["x-request-id"]
    assert told[0]["trace_id"] == TRACE_ID != told[1]["trace_id"]
    assert attributes_of(root)["deshift.steering.overhead_s"] >= TIMINGS.inject_s + SHIFT_S
    assert "PROMPT" not in str(collector.spans) and "Hello" not in str(collector.spans)


@pytest.mark.parametrize("is_listening", [False, True])
def test_a_collector_that_is_down_or_hangs_disturbs_nobody(
    is_listening: bool,
    fake_engine: FakeEngine,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests succeed, also more than the exporter's queue holds, and the server ends."""
    monkeypatch.setattr("server.tracing.FLUSH_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if is_listening:  # takes connections, and says nothing
            silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
        app = create_app(make_settings(tracing="otlp"), engine=fake_engine, store=store)
        with TestClient(app, "http://127.0.0.1") as client:
            statuses = [client.post(PATH, json=chat_body()).status_code for _ in range(10)]
    assert statuses == [200] * 10


def test_without_the_extra_the_start_says_so(
    fake_engine: FakeEngine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "server.tracing")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"DESHIFT_TRACING.*install deshift\[otel\]"):
        create_app(make_settings(tracing="otlp"), engine=fake_engine, store=store)


def test_a_standard_variable_that_cannot_be_used_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(ConfigError, match="OTEL_.*max_queue_size must be"):
        open_tracer(make_settings(), "tiny")
