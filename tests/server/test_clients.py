"""The official OpenAI client, with strict response validation, on a real socket."""

import asyncio
import threading
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from server.engine.types import TextEvent
from tests.server.conftest import LiveServer, wait_until
from tests.server.fakes import FakeEngine, chat_body, data_url, make_vectors, plays, says

MESSAGES: Any = chat_body("Hi", images=1)["messages"]


@pytest.fixture
def official(live: LiveServer) -> Any:
    with OpenAI(
        base_url=live.url + "/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def async_client(live: LiveServer) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=live.url + "/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    )


def test_create_with_a_picture(official: OpenAI) -> None:
    answer = official.chat.completions.create(model="tiny", messages=MESSAGES, n=2, logprobs=True)
    assert [choice.message.content for choice in answer.choices] == ["Hello there!"] * 2
    assert answer.usage is not None and answer.usage.prompt_tokens == 12
    assert answer.model_extra is not None
    assert answer.model_extra["steering"]["vector"] == make_vectors().id


def test_the_header_is_there_for_those_who_ask(official: OpenAI) -> None:
    raw = official.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES)
    assert raw.headers["x-deshift-steering"].startswith("mode=dataset; alpha=0.5")
    assert raw.parse().id.startswith("chatcmpl-")


def test_a_stream_with_usage(official: OpenAI) -> None:
    stream = official.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello there!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 15


def test_the_stream_helper_and_parse(official: OpenAI) -> None:
    with official.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello there!"
    parsed = official.chat.completions.parse(model="tiny", messages=MESSAGES)
    assert parsed.choices[0].message.content == "Hello there!"


def test_an_answer_can_be_sent_back_as_history(official: OpenAI) -> None:
    first = official.chat.completions.create(model="tiny", messages=MESSAGES)
    history = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "More?"}]
    assert official.chat.completions.create(model="tiny", messages=history).choices


def test_models(official: OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": 3}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
        ({"extra_body": {"steering": {"alpha": 0}}}, openai.PermissionDeniedError),
    ],
)
def test_errors_are_the_clients_own(official: OpenAI, fields: Any, error: Any) -> None:
    with pytest.raises(error) as caught:
        official.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | fields))
    assert caught.value.body["message"]


def test_a_failure_in_mid_stream_is_raised(official: OpenAI, fake_engine: FakeEngine) -> None:
    from server.engine.types import Failed

    fake_engine.script = plays(TextEvent(0, "Hel"), Failed("engine", "broken in the middle"))
    stream = official.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="broken in the middle"):
        list(stream)


def test_sixteen_at_once(live: LiveServer, fake_engine: FakeEngine) -> None:
    """All are in the engine together before any goes on; each gets its own answer."""
    together = threading.Barrier(16, timeout=10)

    def script(request: Any) -> Any:
        together.wait()
        yield from says(f"{len(request.inputs.prompt)} ", "tokens")(request)

    fake_engine.script = script

    async def scenario() -> list[str]:
        async with async_client(live) as client:

            async def one(number: int) -> str:
                messages: Any = [{"role": "user", "content": "x" * (number + 1)}]
                if number % 2:
                    answer = await client.chat.completions.create(model="tiny", messages=messages)
                    return answer.choices[0].message.content or ""
                stream = await client.chat.completions.create(
                    model="tiny", messages=messages, stream=True
                )
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
                return "".join(pieces)

            return list(await asyncio.gather(*(one(number) for number in range(16))))

    assert asyncio.run(scenario()) == [f"{number + 1} tokens" for number in range(16)]
    wait_until(lambda: live.services.in_flight.count == 0)


def test_closing_a_stream_frees_its_row(
    live: LiveServer, official: OpenAI, fake_engine: FakeEngine
) -> None:
    fake_engine.script = plays(TextEvent(0, "Hel"), threading.Event())
    stream = official.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: fake_engine.num_running == 0 and live.services.in_flight.count == 0)
    assert len(fake_engine.cancelled) == 1


def test_a_picture_that_is_no_picture_is_a_bad_request(official: OpenAI) -> None:
    parts: Any = [{"type": "image_url", "image_url": {"url": data_url(b"not a picture")}}]
    with pytest.raises(openai.BadRequestError, match="not a readable image"):
        official.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": parts}]
        )
