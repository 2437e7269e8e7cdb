"""What a search keeps of the answers of a server."""

import json
from pathlib import Path

import httpx
import pytest

from steering.errors import EvaluationError
from steering.evaluate.arms import parse_all
from steering.evaluate.asking import Asking
from steering.evaluate.bounds import Bounds
from steering.evaluate.calibration import Items, calibrate
from steering.evaluate.client import Patience, Server, http_client
from steering.evaluate.conditions import parse
from steering.evaluate.items import Item
from steering.evaluate.record import Answer
from steering.evaluate.run import Asker
from steering.evaluate.sweep import sweep

pytestmark = pytest.mark.anyio
BROKEN = "the broken one"


def items(num: int) -> list[Item]:
    photo = Path("server/demo/photo.jpg")
    found = [Item(str(n), "bad", "harmful", f"Prompt {n}", photo) for n in range(num)]
    return [*found, Item("broken", "bad", "harmful", BROKEN, photo)]


def refusing_asker(words: str) -> Asker:
    """A server that answers 400 to prompts with these words."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if words in body["messages"][0]["content"][1]["text"]:
            return httpx.Response(400, json={"error": {"message": "not a picture"}})
        said = {"message": {"content": "I'm sorry, but I can't help with that."}}
        return httpx.Response(
            200, json={"choices": [said], "steering": {"mode": "off", "alpha": 0.0}}
        )

    client = http_client("http://127.0.0.1:9", None, 1)
    client._transport = httpx.MockTransport(answer)
    return Asker(client, Server("http://127.0.0.1:9", "tiny", True), patience=Patience(1))


async def test_one_prompt_that_a_server_refuses_does_not_end_a_condition() -> None:
    """Its 400 counted as the server's word on all that was to be asked, also when going on."""
    kept: list[Answer] = []
    asking = Asking(refusing_asker(BROKEN), [], kept.append)
    said = await asking(parse("base"), items(20))
    assert not isinstance(said, str)
    assert [verdict.id for verdict in said] == [str(n) for n in range(20)]
    assert [answer.id for answer in kept if answer.error] == ["broken"]
    again = Asking(refusing_asker(BROKEN), kept[::-1], kept.append)
    assert await again(parse("base"), items(20)) == said
    assert again.num_asked == 1  # the error, once more


async def test_a_server_that_refuses_the_base_is_an_error_in_words() -> None:
    asking = Asking(refusing_asker("Prompt"), [], lambda _: None)
    parts = Items((tuple(items(3)),), (tuple(items(3)),))
    with pytest.raises(EvaluationError, match="refuses to answer unsteered: not a picture"):
        await calibrate(parse_all(["dataset"], (0.1,)), parts, asking)
    with pytest.raises(EvaluationError, match="refuses to answer unsteered: not a picture"):
        await sweep([], items(3), asking, Bounds(), {})
