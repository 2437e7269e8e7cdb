"""The load against scripted servers: dialects, order, equal pictures, real waiting."""

import asyncio
import base64
import io

import httpx
import pytest
from PIL import Image

from server.bench.load import Burst, Load, measure
from server.bench.target import BenchError, Target, resolved
from tests.server.bench.fake_server import Script, fake_server

LOAD = Load(Image.new("RGB", (48, 32), "teal"), max_tokens=6)


def run_resolved(target: Target) -> Target:
    async def go() -> Target:
        async with httpx.AsyncClient() as client:
            return await resolved(client, target, LOAD.prompt(-1, 0)[0])

    return asyncio.run(go())


def run_measure(targets: list[Target], streams: list[int], rounds: int) -> list[Burst]:
    async def go() -> list[Burst]:
        async with httpx.AsyncClient() as client:
            ready = [await resolved(client, t, LOAD.prompt(-1, 0)[0]) for t in targets]
            return await measure(client, ready, LOAD, streams=streams, rounds=rounds, pause_s=0)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("accepts", "status", "dialect"),
    [
        ({"ignore_eos", "stream_options"}, 400, "ignore_eos"),
        ({"generation_config"}, 422, "generation_config"),
        ({"stream_options"}, 400, "usage"),
        (set(), 422, "bare"),
    ],
)
def test_the_dialect_is_the_first_that_the_server_takes(
    accepts: set[str], status: int, dialect: str
) -> None:
    with fake_server(Script(accepts=frozenset(accepts), refusal_status=status)) as url:
        found = run_resolved(Target("x", url))
    assert (found.dialect, found.model) == (dialect, "the-model")


def test_a_server_that_refuses_everything_is_quoted() -> None:
    with (
        fake_server(Script(refusal_status=401, accepts=frozenset())) as url,
        pytest.raises(BenchError, match="401.*unexpected"),
    ):
        run_resolved(Target("x", url))


def test_targets_take_turns_and_get_the_same_pictures_and_questions() -> None:
    one, two = Script(), Script(accepts=frozenset({"generation_config"}), refusal_status=422)
    with fake_server(one) as first, fake_server(two) as second:
        bursts = run_measure([Target("a", first), Target("b", second)], [1, 3], rounds=2)
    order = [(b.round, b.num_streams, b.target) for b in bursts]
    assert order == [
        (0, 1, "a"),
        (0, 1, "b"),
        (0, 3, "a"),
        (0, 3, "b"),
        (1, 1, "b"),
        (1, 1, "a"),
        (1, 3, "b"),
        (1, 3, "a"),
    ]
    assert [record.tokens for b in bursts for record in b.records] == [6] * 16
    sent = [
        [body["messages"] for body in script.bodies if body["max_tokens"] == 6]
        for script in (one, two)
    ]
    assert sorted(map(repr, sent[0])) == sorted(map(repr, sent[1]))
    # 3 rounds (one of warm-up) of 1 and 3 chats; a round's first stream is the same picture.
    assert len(sent[0]) == 12
    assert len(set(map(repr, sent[0]))) == 9


def test_every_chat_of_a_round_has_its_own_picture_of_the_same_size() -> None:
    urls = [LOAD.prompt(round_, stream)[0] for round_ in range(2) for stream in range(3)]
    assert len(set(urls)) == 6
    assert LOAD.prompt(1, 2) == LOAD.prompt(1, 2)
    data = base64.b64decode(urls[0].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (48, 32)


def test_streams_run_at_once_and_waiting_is_measured() -> None:
    with fake_server(Script(gap_s=0.05)) as url:
        [burst] = run_measure([Target("a", url)], [4], rounds=1)
    assert burst.wall_s < 1.2  # four in a row would take 1.2 s at least
    for record in burst.records:
        assert record.time_to_first_token_s >= 0.05
        assert 0.045 < record.inter_token_latency_s < 0.2


def test_a_refused_chat_is_a_failure_with_the_servers_words() -> None:
    with fake_server(Script(fail=True)) as url:
        [burst] = run_measure([Target("a", url)], [2], rounds=1)
    assert ["503" in record.error and "no room" in record.error for record in burst.records] == [
        True,
        True,
    ]
