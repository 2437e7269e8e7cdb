"""The load against scripted servers: dialects, conditions, order, real waiting."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence

import httpx
import pytest
from PIL import Image

from server.bench.effort import Effort
from server.bench.load import Burst, Served, in_turn, measure, steady_gaps
from server.bench.prompts import Message, Prompts
from server.bench.stream import StreamRecord
from server.bench.target import BenchError, Target, resolved, variants
from tests.server.bench.fake_server import Script, fake_server

PROMPTS = Prompts(Image.new("RGB", (48, 32), "teal"))
MAX_TOKENS = 6


def run_resolved(target: Target) -> Target:
    async def go() -> Target:
        async with httpx.AsyncClient() as client:
            return await resolved(client, target, PROMPTS.about_picture(-1))

    return asyncio.run(go())


def run_measure(targets: Sequence[Target], streams: list[int], rounds: int) -> list[Burst]:
    async def go() -> list[Burst]:
        async with httpx.AsyncClient() as client:
            ready = [await resolved(client, t, PROMPTS.about_picture(-1)) for t in targets]
            columns = [Served(client, target) for target in ready]
            effort = Effort(streams=streams, rounds=rounds, max_tokens=MAX_TOKENS)
            return await measure(columns, PROMPTS, effort)

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


def test_a_condition_is_an_override_and_cold_is_a_new_size() -> None:
    conditions = {"a": "off,sample-cold,sample-warm,0.25,off"}
    found = variants([Target("a", "u"), Target("b", "u")], conditions)
    assert [(t.name, dict(t.extra), t.new_sizes) for t in found] == [
        ("a off", {"steering": {"mode": "off"}}, False),
        ("a sample-cold", {"steering": {"mode": "sample"}}, True),
        ("a sample-warm", {"steering": {"mode": "sample"}}, False),
        ("a 0.25", {"steering": {"mode": "dataset", "alpha": 0.25}}, False),
        ("a off (2)", {"steering": {"mode": "off"}}, False),
        ("b", {}, False),
    ]


def test_columns_take_every_place_and_precede_each_other_equally_often() -> None:
    orders = [tuple(in_turn("abc", round_)) for round_ in range(6)]
    assert len(set(orders)) == 6
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(pairs.values()) == {2} and len(pairs) == 6
    assert [in_turn("ab", round_) for round_ in range(4)] == [
        ["a", "b"],
        ["b", "a"],
        ["b", "a"],
        ["a", "b"],
    ]


def test_targets_take_turns_and_no_prompt_is_sent_twice() -> None:
    """Equal pictures for all columns would let one condition fill the cache for the next."""
    one, two = Script(), Script(accepts=frozenset({"generation_config"}), refusal_status=422)
    with fake_server(one) as first, fake_server(two) as second:
        targets = variants([Target("a", first), Target("b", second)], {"a": "off,sample-cold"})
        bursts = run_measure(targets, [1, 3], rounds=2)
    names = [(b.round, b.num_streams, b.target) for b in bursts]
    around = ["a off", "a sample-cold", "b"]
    assert names == [
        (round_, num_streams, name)
        for round_, order in enumerate((around, around[::-1]))
        for num_streams in (1, 3)
        for name in order
    ]
    assert [record.tokens for b in bursts for record in b.records] == [MAX_TOKENS] * 24
    sent = [
        body["messages"]
        for script in (one, two)
        for body in script.bodies
        if body["max_tokens"] == MAX_TOKENS
    ]
    # 3 rounds (one of warm-up) of 1 and 3 chats in 3 columns.
    assert len(sent) == 36
    contents = [messages[0]["content"] for messages in sent]
    assert len({content[0]["image_url"]["url"] for content in contents}) == 36
    assert len({content[1]["text"] for content in contents}) == 36


class Quick:
    """A column that answers at once and writes down when it was asked."""

    new_sizes = False

    def __init__(self, name: str, process: str, asked: list[tuple[float, str]]) -> None:
        self.name, self.process = name, process
        self._asked = asked

    async def answer(
        self, chats: Sequence[Sequence[Message]], _max_tokens: int
    ) -> list[StreamRecord]:
        self._asked.append((time.perf_counter(), self.process))
        return [StreamRecord() for _ in chats]


def test_there_is_a_pause_before_another_process_and_none_between_its_own_conditions() -> None:
    """Threads of a server that spun on after its last answer slowed the next one down."""
    asked: list[tuple[float, str]] = []
    columns = [Quick("a off", "a", asked), Quick("a on", "a", asked), Quick("b", "b", asked)]
    start = time.perf_counter()
    asyncio.run(
        measure(
            columns,
            PROMPTS,
            Effort(streams=[1], rounds=2, max_tokens=2, warmup=0, pause_s=0.4),
        )
    )
    assert [process for _, process in asked] == ["a", "a", "b", "b", "a", "a"]
    times = [start, *(moment for moment, _ in asked)]
    waited = [after - before > 0.39 for before, after in itertools.pairwise(times)]
    assert waited == [True, False, True, False, True, False]


def test_streams_run_at_once_and_waiting_is_measured() -> None:
    with fake_server(Script(gap_s=0.05)) as url:
        [burst] = run_measure([Target("a", url)], [4], rounds=1)
    assert burst.wall_s < 1.2  # four in a row would take 1.2 s at least
    assert 0.045 < burst.step_s < 0.2
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


def test_a_step_is_a_gap_in_which_all_chats_were_decoding() -> None:
    early = StreamRecord(start_s=10.0, time_to_first_token_s=1.0, gaps_s=(5.0, 0.5, 0.5))
    late = StreamRecord(start_s=10.5, time_to_first_token_s=5.0, gaps_s=(0.75, 0.25, 9.0))
    # All decode from 15.5 (the late one's first token) to 17 (the early one's last).
    assert steady_gaps([early, late]) == [0.5, 0.5, 0.75, 0.25]
    assert steady_gaps([early, StreamRecord(error="no")]) == [5.0, 0.5, 0.5]
    assert steady_gaps([StreamRecord(error="no")]) == []
    assert Burst("a", 2, 0, 1.0, (early, late)).step_s == 0.5
