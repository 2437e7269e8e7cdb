"""POST /v1/chat/completions: what comes in reaches the engine, what it says comes out."""

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from server.engine.types import (
    ChoiceFinished,
    Failed,
    Finished,
    InputError,
    NotAcceptingError,
    PromptTooLongError,
    QueueFullError,
    SamplingParams,
    TextEvent,
    TokenLogprob,
)
from tests.server.conftest import wait_until
from tests.server.fakes import TIMINGS, FakeEngine, chat_body, data_url, make_vectors, plays, says

PATH = "/v1/chat/completions"
USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 3,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The JSON of every event but [DONE], which must be the last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_has_openais_shape(client: TestClient) -> None:
    response = client.post(PATH, json=chat_body("Hi"))
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == USAGE


def test_a_text_prompt_is_never_steered_and_the_answer_says_so(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    response = client.post(PATH, json=chat_body("Hi"))
    assert response.headers["x-deshift-steering"] == "mode=off; reason=text-only; revision=0"
    assert response.json()["steering"]["reason"] == "text-only"
    assert fake_engine.requests[0].steering.delta is None


def test_an_image_prompt_is_steered_by_the_policy(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    response = client.post(PATH, json=chat_body("Hi", images=1))
    vectors = make_vectors()
    assert response.headers["x-deshift-steering"] == (
        f"mode=dataset; alpha=0.5; schedule=all; vector={vectors.id}; revision=0"
    )
    steering = response.json()["steering"]
    assert steering.pop("overhead_ms") > 0.5, "the engine's, the plan's and the vectors'"
    assert steering == {
        "mode": "dataset",
        "alpha": 0.5,
        "gate_opening": None,
        "method": "subtract",
        "schedule": "all",
        "vector": vectors.id,
        "corruption": None,
        "revision": 0,
        "relative_dose": 0.075,  # 0.5 * 1.5 / 10 at the last layer
        "shift_ms": 0.0,
        "reason": None,
    }
    delta = fake_engine.requests[0].steering.delta
    assert delta is not None and torch.equal(delta, 0.5 * vectors.mean)


def test_an_image_in_an_earlier_turn_counts(client: TestClient) -> None:
    body = chat_body("Look", images=1)
    body["messages"] += [
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": "And now?"},
    ]
    assert client.post(PATH, json=body).headers["x-deshift-steering"].startswith("mode=dataset")


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_says_what_the_whole_answer_says(client: TestClient, include_usage: bool) -> None:
    whole = client.post(PATH, json=chat_body("Hi", images=1, n=2)).json()
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = client.post(PATH, json=chat_body("Hi", images=1, n=2, stream=True, **options))
    chunks = chunks_of(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:2]] == ["assistant"] * 2
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert [reason for reason in reasons if reason] == ["stop", "stop"]
    measured = {"overhead_ms": 0}
    assert chunks[-1]["steering"] | measured == whole["steering"] | measured
    assert not any("steering" in chunk for chunk in chunks[:-1])


def test_include_usage_gives_null_in_each_chunk_and_one_more_without_choices(
    client: TestClient,
) -> None:
    body = chat_body("Hi", stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(client.post(PATH, json=body).text)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE
    without = chunks_of(client.post(PATH, json=chat_body("Hi", stream=True)).text)
    assert not any("usage" in chunk for chunk in without)


def test_a_stream_stays_ascii_so_that_no_client_splits_a_line(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    """U+2028 is a line end to Python's splitlines, and JSON may hold it as it is."""
    fake_engine.script = says("a\u2028b", "é\n\nc")
    response = client.post(PATH, json=chat_body(stream=True))
    assert response.text.isascii()
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks_of(response.text))
    assert text == "a\u2028bé\n\nc"


def test_a_truncated_answer_ends_with_length(client: TestClient, fake_engine: FakeEngine) -> None:
    fake_engine.script = says("x", reason="length")
    body = client.post(PATH, json=chat_body(max_tokens=1)).json()
    assert body["choices"][0]["finish_reason"] == "length"


def test_every_sampling_field_reaches_the_engine(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    body = chat_body(
        max_tokens=9,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=-3,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "7": 2.5},
        stop=["a", "b"],
        n=2,
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
    )
    assert client.post(PATH, json=body).status_code == 200
    assert fake_engine.requests[0].params == SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=-3,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={5: -100.0, 7: 2.5},
        stop=("a", "b"),
        ignore_eos=True,
        n=2,
        top_logprobs=3,
    )


def test_without_max_tokens_the_engine_decides_how_much_fits(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    """Computed here from the model's length alone, it asked for more than the KV budget holds."""
    client.post(PATH, json=chat_body("x" * 30))
    assert fake_engine.requests[0].params == SamplingParams(max_tokens=None)


def test_top_p_zero_is_greedy_and_top_k_minus_one_is_off(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    client.post(PATH, json=chat_body(top_p=0, top_k=-1, temperature=1.5))
    params = fake_engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 0)


def test_messages_reach_the_engine_as_parts_with_their_images_in_order(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    body = chat_body()
    body["messages"] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "See"}, _image("red")]},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": [_image("blue"), {"type": "text", "text": "this?"}]},
    ]
    assert client.post(PATH, json=body).status_code == 200
    messages, images = fake_engine.prompts[0]
    assert list(messages) == [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this?"}]},
    ]
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]


def _image(colour: str) -> dict[str, Any]:
    from tests.server.fakes import image_bytes

    url = data_url(image_bytes(colour=colour))
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_bytes_and_alternatives(
    client: TestClient, fake_engine: FakeEngine, stream: bool
) -> None:
    top = (TokenLogprob(1, "é", "é".encode(), -0.5), TokenLogprob(2, "b", b"b", -math.inf))
    token = TokenLogprob(1, "é", "é".encode(), -0.5, top)
    fake_engine.script = plays(
        TextEvent(0, "é", (token,)), ChoiceFinished(0, "stop"), Finished(1, 1, TIMINGS)
    )
    response = client.post(PATH, json=chat_body(logprobs=True, top_logprobs=2, stream=stream))
    choice = (chunks_of(response.text)[1] if stream else response.json())["choices"][0]
    assert choice["logprobs"]["content"] == [
        {
            "token": "é",
            "logprob": -0.5,
            "bytes": [195, 169],
            "top_logprobs": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                {"token": "b", "logprob": -9999.0, "bytes": [98]},
            ],
        }
    ]


# ------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLongError("150 tokens; the limit is 100"), 400, "context_length_exceeded"),
        (QueueFullError("full"), 429, "queue_full"),
        (NotAcceptingError("no"), 503, "service_unavailable"),
        (InputError("bad"), 400, None),
    ],
)
def test_what_the_engine_refuses_has_its_status(
    client: TestClient,
    fake_engine: FakeEngine,
    error: Any,
    status: int,
    code: str | None,
    stream: bool,
) -> None:
    fake_engine.refusal = error
    response = client.post(PATH, json=chat_body(stream=stream))
    assert response.status_code == status
    assert response.json()["error"]["message"] == str(error)
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_what_the_engine_refuses_names_the_field_at_fault(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    """Every refusal of the engine's was blamed on `messages`, a wrong logit_bias too."""
    fake_engine.refusal = InputError("no such token", param="logit_bias")
    assert client.post(PATH, json=chat_body()).json()["error"]["param"] == "logit_bias"
    fake_engine.refusal = InputError("no such template")
    assert client.post(PATH, json=chat_body()).json()["error"]["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "retried"), [("timeout", 0), ("engine", 0), ("draining", 1)])
def test_what_has_cost_a_generation_is_not_to_be_retried(
    client: TestClient, fake_engine: FakeEngine, kind: Any, retried: int, stream: bool
) -> None:
    """OpenAI's clients repeat 408 and 500 twice: a request that timed out cost three times 600 s.

    Another replica may well answer what a shutdown cut off.
    """
    fake_engine.script = plays(Failed(kind, "why"))
    response = client.post(PATH, json=chat_body(stream=stream))
    assert response.headers.get("x-should-retry") == (None if retried else "false")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "status"), [("timeout", 408), ("draining", 503), ("engine", 500)])
def test_a_failure_before_the_first_token_is_a_status_also_of_a_stream(
    client: TestClient, fake_engine: FakeEngine, kind: Any, status: int, stream: bool
) -> None:
    fake_engine.script = plays(Failed(kind, "why"))
    response = client.post(PATH, json=chat_body(stream=stream))
    assert response.status_code == status
    assert response.json() == {
        "error": {
            "message": "why",
            "type": "server_error",
            "param": None,
            "code": f"generation_{kind}",
        }
    }


def test_a_failure_in_mid_stream_is_an_error_event_and_the_end(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    fake_engine.script = plays(TextEvent(0, "Hel"), Failed("engine", "broken"))
    response = client.post(PATH, json=chat_body(stream=True))
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert json.loads(events[-2])["choices"][0]["delta"]["content"] == "Hel"
    assert json.loads(events[-1])["error"]["message"] == "broken"
    assert client.post(PATH, json=chat_body()).status_code == 500


def test_an_unforeseen_error_is_a_500_that_gives_nothing_away(
    client: TestClient, fake_engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    fake_engine.prepare_error = RuntimeError("secret detail")
    response = client.post(PATH, json=chat_body())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-request-id"] in caplog.text
    fake_engine.prepare_error = None
    assert client.post(PATH, json=chat_body()).status_code == 200


def test_an_unknown_model_is_a_404(client: TestClient) -> None:
    response = client.post(PATH, json=chat_body() | {"model": "gpt-4o"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_more_requests_than_the_engine_holds_are_refused_before_their_images_are_decoded(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(max_rows=1, max_queue=1)
    client.app.state.services.in_flight.count = 2  # type: ignore[attr-defined]
    response = client.post(PATH, json=chat_body(images=1))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert not fake_engine.prompts


# ------------------------------------------------------------------------------------- steering


def test_a_client_cannot_weaken_the_steering(client: TestClient, fake_engine: FakeEngine) -> None:
    """Peers take the scale from the body; here alpha 0 is refused, and nothing is served."""
    for steering in ({"alpha": 0}, {"mode": "off"}, {"alpha": 0.4}, {"schedule": "single:0"}):
        response = client.post(PATH, json=chat_body(images=1, steering=steering))
        assert response.status_code == 403
        assert "client_override" in response.json()["error"]["message"]
    assert not fake_engine.requests


@pytest.mark.parametrize("steering", [None, {}, {"alpha": None}, {"alpha": 0.5, "mode": "dataset"}])
def test_an_override_that_changes_nothing_is_fine(client: TestClient, steering: Any) -> None:
    response = client.post(PATH, json=chat_body(images=1, steering=steering))
    assert "alpha=0.5" in response.headers["x-deshift-steering"]


def test_where_any_override_is_allowed_alpha_is_the_clients(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(client_override="any")
    body = chat_body(images=1, steering={"alpha": 1.5, "schedule": "incremental"})
    response = client.post(PATH, json=body)
    assert "alpha=1.5; schedule=incremental" in response.headers["x-deshift-steering"]
    off = client.post(PATH, json=chat_body(images=1, steering={"mode": "off"}))
    assert off.headers["x-deshift-steering"] == "mode=off; reason=disabled; revision=0"
    zero = client.post(PATH, json=chat_body(images=1, steering={"alpha": 0}))
    assert zero.headers["x-deshift-steering"] == "mode=off; reason=alpha-zero; revision=0"
    deltas = [request.steering.delta for request in fake_engine.requests]
    assert [delta is None for delta in deltas] == [False, True, True]
    assert fake_engine.corruptions == [None] * 3


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        ({"alpha": 2.5}, ["2.5", "0..2"]),
        ({"alpha": -1}, ["greater than or equal to 0"]),
        ({"schedule": "single:3"}, ["layer 3", "has 3"]),
        ({"schedule": "sometimes"}, ["sometimes", "incremental"]),
        ({"mode": "samples"}, ["'off'", "'sample'"]),
        ({"mode": "sample", "schedule": "single:3"}, ["layer 3", "has 3"]),
        ({"mode": "sample", "corruption": "black"}, ["'blank'", "'mean-colour'"]),
        ({"mode": "sample", "corruption": 1}, ["'blank'"]),
        ({"corruption": "noise"}, ["no effect in mode dataset"]),
        ({"alfa": 1}, ["not supported"]),
        ("off", ["object"]),
        ({"alpha": True}, ["number"]),
    ],
)
def test_a_malformed_override_is_a_400(
    client_for: Callable[..., TestClient], steering: Any, words: list[str]
) -> None:
    client = client_for(client_override="any")
    response = client.post(PATH, json=chat_body(images=1, steering=steering))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("steering")
    for word in words:
        assert word in response.json()["error"]["message"]


def test_a_dose_over_the_cap_is_a_400_with_the_numbers(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(client_override="any", max_relative_dose=0.1)
    response = client.post(PATH, json=chat_body(images=1, steering={"alpha": 1.0}))
    assert response.status_code == 400
    assert "0.150" in response.json()["error"]["message"]  # 1.0 * 1.5 / 10
    assert not fake_engine.requests


def test_without_vectors_image_requests_are_refused_and_text_is_served(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Fail closed: a steered server never answers about an image unsteered instead."""
    client = client_for(vector_alias="missing")
    response = client.post(PATH, json=chat_body(images=1))
    assert response.status_code == 503
    assert "missing" in response.json()["error"]["message"]
    assert not fake_engine.requests
    assert client.post(PATH, json=chat_body()).status_code == 200
    assert client.get("/ready").status_code == 503


def test_without_vectors_an_operator_may_choose_to_serve_unsteered_and_the_answer_says_so(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    client = client_for(vector_alias="missing", on_error="serve-unsteered")
    response = client.post(PATH, json=chat_body(images=1))
    assert (
        response.headers["x-deshift-steering"] == "mode=off; reason=vectors-unavailable; revision=0"
    )
    assert response.json()["steering"]["reason"] == "vectors-unavailable"
    assert fake_engine.requests[0].steering.delta is None
    ready = client.get("/ready")
    assert ready.status_code == 200 and "missing" in ready.json()["steering"]["problem"]


# ------------------------------------------------------------------------------- time and memory


def test_slow_preparation_counts_towards_the_timeout_and_is_a_408(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Only the body had a limit, and the engine began to count anew after the preparation."""
    fake_engine.prepare_gate = threading.Event()
    client = client_for(request_timeout_s=0.1)
    response = client.post(PATH, json=chat_body())
    fake_engine.prepare_gate.set()
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "request_timeout"
    assert "x-should-retry" not in response.headers
    assert not fake_engine.requests


def test_the_engine_gets_what_is_left_of_the_requests_time(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """It got the whole timeout again, so that a request could live twice as long."""
    client = client_for(request_timeout_s=20)
    fake_engine.prepare_gate = threading.Event()
    threading.Timer(0.2, fake_engine.prepare_gate.set).start()
    assert client.post(PATH, json=chat_body()).status_code == 200
    assert 10 < fake_engine.requests[0].timeout_s < 19.9


def test_what_times_out_while_it_waits_for_the_pool_is_never_prepared(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Pictures were decoded for requests whose time was over, which kept the pool from others."""
    client = client_for(request_timeout_s=0.2)
    gate, pool = threading.Event(), client.app.state.services.pool  # type: ignore[attr-defined]
    held = [pool.submit(gate.wait, 10) for _ in range(8)]
    assert client.post(PATH, json=chat_body(images=1)).status_code == 408
    gate.set()
    assert all(future.result() for future in held)
    assert client.post(PATH, json=chat_body("after")).status_code == 200
    (only,) = fake_engine.prompts
    assert only[0][0]["content"][0]["text"] == "after"


def test_bodies_that_together_are_too_many_bytes_are_refused_until_others_are_prepared(
    client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Each was limited and their sum was not: 272 bodies of 32 MiB could be held at once."""
    client = client_for(max_body_bytes=1024, max_buffered_bytes=1500)
    services = client.app.state.services  # type: ignore[attr-defined]
    fake_engine.prepare_gate = threading.Event()
    body = chat_body("x" * 800)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, PATH, json=body)
        wait_until(lambda: len(fake_engine.prompts) == 1)
        assert 800 < services.bodies.held < 1024
        chunked = iter([json.dumps(body).encode()])
        json_type = {"content-type": "application/json"}
        for refused in (
            client.post(PATH, json=body),
            client.post(PATH, content=chunked, headers=json_type),
        ):
            assert refused.status_code == 429 and "retry-after" in refused.headers
        assert client.post(PATH, content=b"{", headers=json_type).status_code == 400
        fake_engine.prepare_gate.set()
        assert first.result().status_code == 200
    assert services.bodies.held == 0
    assert client.post(PATH, json=body).status_code == 200


def test_a_body_is_given_back_before_its_answer_is_generated(
    client: TestClient, fake_engine: FakeEngine
) -> None:
    """Held as long as the answer takes, the budget would limit generation, not memory."""
    held = []

    def script(request: Any) -> Any:
        held.append(client.app.state.services.bodies.held)  # type: ignore[attr-defined]
        yield from says("x")(request)

    fake_engine.script = script
    assert client.post(PATH, json=chat_body(images=1)).status_code == 200
    assert held == [0]
