"""Other servers than ours, ours behind a proxy, servers that go away: over a scripted transport."""

import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from steering.errors import EvaluationError
from steering.evaluate.client import connect, http_client
from steering.evaluate.conditions import parse
from steering.evaluate.items import Item
from steering.evaluate.record import RunDir
from steering.evaluate.run import for_server
from tests.steering.evaluate.small_runs import asked, make_evaluation, other_server

pytestmark = pytest.mark.anyio


async def test_another_server_is_asked_in_plain_openai() -> None:
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer secret-key"
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        if request.url.path == "/v1/chat/completions":
            bodies.append(json.loads(request.content))
            message = {"role": "assistant", "content": None, "refusal": "No."}
            return httpx.Response(200, json={"choices": [{"message": message}]})
        return httpx.Response(404)

    asker = other_server(answer, "secret-key")
    server = await connect(asker.client, None)
    assert (server.model, server.is_deshift, server.ready) == ("theirs", False, None)
    [base] = for_server([parse("base")], server)
    item = Item("a", "s", "harmful", "Hi", Path("server/demo/photo.jpg"))
    answered = await replace(asker, server=server).answer(item, base)
    assert (answered.answer, answered.steering, answered.error) == ("No.", None, None)
    [body] = bodies
    assert body.keys() == {"model", "messages", "max_tokens", "temperature", "seed"}
    [image, text] = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert text == {"type": "text", "text": "Hi"}
    with pytest.raises(EvaluationError, match="'dataset' needs a Deshift server"):
        for_server([parse("dataset")], server)
    with pytest.raises(EvaluationError, match="has no model 'ours', but theirs"):
        await connect(asker.client, "ours")


async def test_our_server_is_known_behind_a_proxy_that_hides_its_status() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny", "owned_by": "deshift"}]})
        return httpx.Response(404)

    server = await connect(other_server(answer).client, None)
    assert (server.is_deshift, server.ready) == (True, None)


async def test_nobody_there_a_wrong_key_and_no_models_are_told_apart() -> None:
    def gone(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    for answer, words in [
        (gone, "no server answers at http://127.0.0.1:9: refused"),
        (lambda _: httpx.Response(401, json={}), "name the environment variable"),
        (lambda _: httpx.Response(200, text="<html>"), "lists no models"),
    ]:
        with pytest.raises(EvaluationError, match=words):
            await connect(other_server(answer).client, None)


async def test_a_deshift_server_that_a_proxy_hides_is_no_unsteered_server() -> None:
    """Asked in plain OpenAI, its policy would have steered what counts as the base."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        if request.url.path != "/v1/chat/completions":
            return httpx.Response(404)
        said = {"message": {"content": "No."}}
        return httpx.Response(200, json={"choices": [said], "steering": {"mode": "dataset"}})

    asker = other_server(answer)
    asker = replace(asker, server=await connect(asker.client, None))
    [base] = for_server([parse("base")], asker.server)
    answered = await asker.answer(
        Item("a", "s", "harmful", "Hi", Path("server/demo/photo.jpg")), base
    )
    assert answered.answer == "" and "Deshift server behind" in str(answered.error)


@pytest.mark.parametrize(
    ("opening", "problem"), [(0.5, None), (None, "the answer does not say that a gate was read")]
)
async def test_a_gate_that_was_not_read_is_none_of_the_condition(
    opening: float | None, problem: str | None
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny", "owned_by": "deshift"}]})
        if request.url.path != "/v1/chat/completions":
            return httpx.Response(404)
        applied = {"mode": "dataset", "alpha": 0.2, "gate_opening": opening, "reason": None}
        said = {"message": {"content": "No."}}
        return httpx.Response(200, json={"choices": [said], "steering": applied})

    asker = other_server(answer)
    asker = replace(asker, server=await connect(asker.client, None))
    item = Item("a", "s", "harmful", "Hi", Path("server/demo/photo.jpg"))
    answered = await asker.answer(item, parse("dataset:alpha=0.4,gate=1"))
    assert answered.error == problem


async def test_half_a_character_in_an_answer_becomes_a_whole_one() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        if request.url.path != "/v1/chat/completions":
            return httpx.Response(404)
        return httpx.Response(200, content=b'{"choices": [{"message": {"content": "a\\ud83d b"}}]}')

    asker = other_server(answer)
    asker = replace(asker, server=await connect(asker.client, None))
    answered = await asker.answer(Item("a", "s", "harmful", "Hi"), parse("text-only"))
    assert answered.answer == "a\ufffd b"


@pytest.mark.parametrize("url", ["http://me:pw@host", "http://host/v1?key=k", "host:80"])
async def test_a_key_in_an_address_would_be_recorded_and_is_refused(url: str) -> None:
    with pytest.raises(EvaluationError, match="without credentials in it"):
        http_client(url, None, 1)


async def test_a_key_that_a_server_quotes_is_not_recorded(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        return httpx.Response(401, json={"error": {"message": "wrong key: secret-key"}})

    asker = other_server(answer, "secret-key")
    asker = replace(asker, server=await connect(asker.client, None))
    evaluation = make_evaluation(tmp_path / "data", 1, ("text-only",))
    with pytest.raises(EvaluationError, match=r"401: wrong key: \*\*\*"):
        await asker.check(evaluation.asked())


async def test_a_server_that_goes_away_ends_the_run_and_keeps_the_answers(tmp_path: Path) -> None:
    num = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal num
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        num += 1
        if num > 4:
            raise httpx.ReadError("reset")
        message = {"role": "assistant", "content": "Yes."}
        return httpx.Response(200, json={"choices": [{"message": message}]})

    asker = other_server(answer)
    asker = replace(asker, server=await connect(asker.client, None))
    evaluation = make_evaluation(tmp_path / "data", 5, ("text-only",))
    with pytest.raises(EvaluationError, match="no server answers at"):
        await asked(evaluation, asker, tmp_path / "run")
    assert len(RunDir(tmp_path / "run").answers()) == 3
