"""The whole thing as processes: the command, real sockets, the official client, signals, stores."""

import asyncio
import json
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from steering.stores import opened_store
from tests.sites import (
    ANCHORS,
    ENDLESS,
    FAST,
    Server,
    Site,
    about,
    deshift,
    png_url,
    serving,
)
from tests.tiny_models import build_tiny_llava

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava().save(tmp_path_factory.mktemp("model") / "tiny-llava")


@pytest.fixture(scope="module")
def made_store(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store filled by the command."""
    folder = tmp_path_factory.mktemp("store")
    anchors = folder / "anchors.jsonl"
    anchors.write_text("".join(json.dumps(anchor) + "\n" for anchor in ANCHORS))
    made = deshift(
        *("extract", "--model", str(model_dir), "--anchors", str(anchors), "--activate"),
        *("--store", f"sqlite:///{folder / 'made.db'}", "--image-size", "32x32", "--json"),
    )
    assert made.returncode == 0, made.stderr
    return folder / "made.db", json.loads(made.stdout)["id"]


@pytest.fixture
def site(model_dir: Path, made_store: tuple[Path, str], tmp_path: Path) -> Site:
    """A copy of the store, to be broken freely."""
    source, vector_id = made_store
    store = tmp_path / "deshift.db"
    with sqlite3.connect(source) as original, sqlite3.connect(store) as copy:
        original.backup(copy)
    return Site(model_dir, store, vector_id)


@pytest.fixture(scope="module")
def server(
    model_dir: Path, made_store: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One for all tests that leave it as it was; no probes, which by chance run beside a decode
    step, whose sums are then rounded otherwise where no compiler is for the kernels."""
    store, vector_id = made_store
    folder = tmp_path_factory.mktemp("server")
    with serving(Site(model_dir, store, vector_id), folder, DESHIFT_PROBE_SHARE="0") as started:
        yield started


def test_the_official_client_creates_and_streams_the_same_answer(
    server: Server, made_store: tuple[Path, str]
) -> None:
    client = server.client()
    raw = client.chat.completions.with_raw_response.create(messages=about("Hi", 1), **FAST)
    whole = raw.parse()
    chunks = list(
        client.chat.completions.create(
            messages=about("Hi", 1), stream=True, stream_options={"include_usage": True}, **FAST
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    again, first = chunks[-1].usage, whole.usage
    assert again is not None and first is not None
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(again, name) for name in counts] == [getattr(first, name) for name in counts]
    cached = [usage.prompt_tokens_details for usage in (first, again)]
    assert cached[0] is not None and cached[0].cached_tokens == 0
    assert cached[1] is not None and (cached[1].cached_tokens or 0) > 0, "the same prompt again"
    applied = whole.model_extra["steering"]  # type: ignore[index]
    assert (applied["mode"], applied["alpha"], applied["reason"]) == ("dataset", 0.5, None)
    assert applied["vector"] == made_store[1]
    assert raw.headers["x-deshift-steering"].startswith("mode=dataset; alpha=0.5;")


def test_steering_changes_the_answer_and_zero_is_the_unsteered_one(server: Server) -> None:
    """Pitfall 4: every spelling of zero over the wire, compared on log-probabilities."""
    client = server.client()

    def logprobs(**steering: Any) -> list[float]:
        answer = client.chat.completions.create(
            messages=about("Hi", 1),
            logprobs=True,
            extra_body={"steering": steering, "ignore_eos": True},
            **FAST,
        )
        content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
        return [token.logprob for token in content or []]

    off = logprobs(mode="off")
    assert logprobs(alpha=0) == logprobs(mode="dataset", alpha=0.0) == off
    assert logprobs(mode="off", alpha=0.5) == off
    assert logprobs() == logprobs(alpha=None) == logprobs(alpha=0.5) != off
    assert logprobs(alpha=0.1) != off


def test_text_only_requests_say_that_nothing_was_applied(server: Server) -> None:
    raw = server.client().chat.completions.with_raw_response.create(messages=about("Hi"), **FAST)
    assert raw.headers["x-deshift-steering"].startswith("mode=off; reason=text-only")


def test_sixteen_at_once_by_the_async_client(server: Server) -> None:
    """Each gets the answer about its own picture, whatever it is batched with.

    Texts were compared, and a greedy choice between near-equal tokens may turn with the batch's
    shape (pitfall 12): so log-probabilities of the first token.
    """

    async def ask(client: openai.AsyncOpenAI, number: int) -> dict[str, float]:
        answer = await client.chat.completions.create(
            messages=about("Hi", number), logprobs=True, top_logprobs=20, **FAST
        )
        first = answer.choices[0].logprobs.content[0]  # type: ignore[union-attr, index]
        return {str(top.bytes): top.logprob for top in first.top_logprobs}

    async def ask_all() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="unused", _strict_response_validation=True
        ) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(16)))
            alone = [await ask(client, number) for number in range(16)]
        return together, alone

    together, alone = asyncio.run(ask_all())
    for number, mine in enumerate(together):
        gaps = [_largest_gap(mine, other) for other in alone]
        assert gaps[number] < 1e-3
        assert min(gaps) == gaps[number], "the answer is nearer to another picture's"


def _largest_gap(one: dict[str, float], other: dict[str, float]) -> float:
    """Between the log-probabilities of the tokens that both name; of 20, some do."""
    return max(abs(one[token] - other[token]) for token in one.keys() & other.keys())


def test_a_client_that_leaves_mid_stream_frees_its_row(server: Server) -> None:
    """Pitfall 15."""
    stream = server.client().chat.completions.create(
        messages=about("Hi", 1), stream=True, **ENDLESS
    )
    next(iter(stream))
    stream.response.close()
    deadline = time.monotonic() + 10
    while server.ready()["engine"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(site: Site, tmp_path: Path) -> None:
    patience = {"DESHIFT_DRAIN_TIMEOUT_S": "120"}  # 1600 tokens on a busy machine
    with serving(site, tmp_path, **patience) as server, ThreadPoolExecutor() as pool:
        arrived = []

        def read_stream() -> str | None:
            stream = server.client().chat.completions.create(
                messages=about("Hi", 1), stream=True, **ENDLESS
            )
            reason = None
            for chunk in stream:
                arrived.append(chunk)
                reason = chunk.choices[0].finish_reason if chunk.choices else reason
            return reason

        running = [pool.submit(read_stream) for _ in range(4)]
        while len(arrived) < 8:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while True:  # until the signal is seen, requests are taken as ever
            try:
                server.client().chat.completions.create(messages=about("Hi"), **FAST)
            except openai.APIStatusError as refused:
                assert refused.status_code == 503
                break
            except openai.APIConnectionError:
                break
        assert [future.result(120) for future in running] == ["length"] * 4
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_the_process_cleanly_while_an_answer_runs(
    site: Site, tmp_path: Path
) -> None:
    """Raised again by uvicorn after its end, it killed the process: no exit code 0."""
    with serving(site, tmp_path) as server:
        stream = server.client().chat.completions.create(
            messages=about("Hi", 1), stream=True, **ENDLESS
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        while server.ready()["draining"] is False:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server stopped"):
            list(stream)
        assert server.process.wait(10) == 0


def test_kill_and_restart_lose_no_vector(site: Site, tmp_path: Path) -> None:
    with serving(site, tmp_path) as server:
        server.process.kill()
        server.process.wait()
    with serving(site, tmp_path) as server:
        assert server.ready()["steering"]["vector"] == site.vector_id
        answer = server.client().chat.completions.create(messages=about("Hi", 1), **FAST)
        assert answer.model_extra["steering"]["vector"] == site.vector_id  # type: ignore[index]
        assert server.stop() == 0


def corrupt_vectors(site: Site) -> None:
    """Point the alias to a set whose blob has a flipped byte, behind the commands' back."""
    with sqlite3.connect(site.store) as connection:
        (data,) = connection.execute("select data from vectors").fetchone()
        broken = bytearray(data)
        broken[-5] ^= 1
        connection.execute(
            "insert into vectors select ?, manifest, ?, 99 from vectors", ("f" * 64, bytes(broken))
        )

    async def switch() -> None:
        async with opened_store(site.store_url) as store:
            await store.commit({"alias/default": json.dumps({"vector": "f" * 64})}, {}, "{}")

    asyncio.run(switch())


def test_the_last_good_vectors_stay_when_the_new_ones_are_damaged(
    site: Site, tmp_path: Path
) -> None:
    with serving(site, tmp_path) as server:
        corrupt_vectors(site)
        deadline = time.monotonic() + 10
        while not (problem := server.ready()["steering"]["problem"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "ffffffffffff" in problem
        answer = server.client().chat.completions.create(messages=about("Hi", 1), **FAST)
        assert answer.model_extra["steering"]["vector"] == site.vector_id  # type: ignore[index]


def test_without_valid_vectors_no_picture_is_answered_unsteered(site: Site, tmp_path: Path) -> None:
    """Fail closed; and once a good set is in force again, without a restart, all is well."""
    corrupt_vectors(site)
    with serving(site, tmp_path) as server:
        assert httpx.get(f"{server.url}/ready").status_code == 503
        with pytest.raises(
            openai.InternalServerError, match="steered by shift vectors, and there is no valid set"
        ):
            server.client().chat.completions.create(messages=about("Hi", 1), **FAST)
        server.client().chat.completions.create(messages=about("Hi"), **FAST)
        healed = deshift("vectors", "activate", site.vector_id, "--store", site.store_url)
        assert healed.returncode == 0, healed.stderr
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.url}/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.client().chat.completions.create(messages=about("Hi", 1), **FAST)


def test_a_damaged_store_file_stops_the_start_with_one_clear_line(site: Site) -> None:
    site.store.write_bytes(b"this is not a database" * 500)
    failed = deshift("serve", "--model", str(site.model), "--store", site.store_url, "--port", "0")
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()
    assert str(site.store) in line and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nonexistent/model"], "/nonexistent/model"),
        (["--model", "MODEL", "--host", "0.0.0.0"], "DESHIFT_API_KEY"),
        (["--model", "MODEL", "--schedule", "sideways"], "sideways"),
        (["--model", "MODEL", "--alpha", "-1"], "alpha"),
        ([], "model"),
    ],
)
def test_a_start_that_cannot_succeed_says_why_in_one_line(
    site: Site, arguments: list[str], message: str
) -> None:
    given = [str(site.model) if a == "MODEL" else a for a in arguments]
    failed = deshift("serve", *given, "--store", site.store_url, "--port", "0")
    assert failed.returncode in (1, 2)
    assert message in failed.stderr and "Traceback" not in failed.stderr


def test_a_taken_port_is_named(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = deshift("serve", "--model", str(site.model), "--port", str(port))
    assert failed.returncode == 1
    assert f"127.0.0.1:{port}" in failed.stderr and "Traceback" not in failed.stderr


def test_the_log_holds_no_prompt_no_picture_and_no_key(site: Site, tmp_path: Path) -> None:
    """Pitfall 21, over a whole run."""
    secret = "sk-test-0123456789abcdef"
    with serving(site, tmp_path, DESHIFT_API_KEY=secret) as server:
        client = server.client(secret)
        client.chat.completions.create(messages=about("the quick brown fox", 1), **FAST)
        with pytest.raises(openai.AuthenticationError):
            server.client().chat.completions.create(messages=about("a lazy dog"), **FAST)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(messages=about("jumped over"), n=99, **FAST)
        server.stop()
        log = server.log.read_text()
    assert "request_id=" in log
    for private in (secret, "quick brown", "lazy dog", "jumped over", png_url()[30:60]):
        assert private not in log
