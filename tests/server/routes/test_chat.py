"""POST /v1/chat/completions: what comes in reaches the engine, what it says comes out."""

import json
import math
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from server.engine.types import (
    ChoiceFinished,
    Finished,
    SamplingParams,
    TextEvent,
    TokenLogprob,
)
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
