"""Runs against the real HTTP layer with a scripted engine, in this process."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.app import create_app
from server.engine.types import EngineRequest, Failed, QueueFullError
from steering.errors import EvaluationError
from steering.evaluate.client import Patience, connect, http_client
from steering.evaluate.conditions import parse
from steering.evaluate.evaluation import Evaluation, Sampling
from steering.evaluate.items import Item
from steering.evaluate.pictures import Photos, photos
from steering.evaluate.record import Answer, RunDir
from steering.evaluate.run import Asker, Tally, for_server, run
from steering.evaluate.suites import read_suite
from steering.stores import MemoryStore
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine, publish, says

pytestmark = pytest.mark.anyio
QUICK = Patience(attempts=3, first_wait_s=0.001, longest_wait_s=0.002)
CONDITIONS = ("base", "text-only", "blank", "dataset:alpha=0.25")


def echo(request: EngineRequest) -> Iterator[Any]:
    """An answer that only the request decides, so that another one would be noticed."""
    plan = request.plan
    text = f"{len(request.inputs.prompt)} {plan.mode} {plan.alpha if plan.is_active else 0}"
    yield from says(text)(request)


def make_evaluation(
    folder: Path, num: int = 6, conditions: tuple[str, ...] = CONDITIONS, **sampling: Any
) -> Evaluation:
    """Two suites with dealt photographs."""
    folder.mkdir(exist_ok=True)
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (6, 4), colour).save(folder / f"{colour}.png")
    suites = []
    for name, kind in (("first", "harmful"), ("second", "harmless")):
        path = folder / f"{name}.jsonl"
        rows = ({"id": f"n{n}", "prompt": "Say " + "x" * n, "kind": kind} for n in range(num))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        suites.append(photos(folder).dealt(read_suite(str(path), num, 1), 1))
    chosen = tuple(parse(text) for text in conditions)
    return Evaluation(tuple(suites), chosen, photos(folder), Sampling(**sampling))


@asynccontextmanager
async def asker(
    engine: FakeEngine, patience: Patience = QUICK, *, vectors: bool = True, **settings: Any
) -> AsyncIterator[Asker]:
    store = MemoryStore()
    if vectors:
        await publish(store)
    values = {"client_override": "any"} | settings
    app = create_app(make_settings(**values), engine=engine, store=store)
    async with app.router.lifespan_context(app):
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")
        async with client:
            yield Asker(client, await connect(client, None), patience=patience)


async def asked(
    evaluation: Evaluation,
    asker: Asker,
    out: Path,
    *,
    resume: bool = False,
    done: Callable[[Answer], None] = lambda _: None,
) -> Tally:
    asker = replace(asker, sampling=evaluation.sampling)
    return await run(
        evaluation,
        asker,
        RunDir(out),
        start={"url": "here"},
        resume=resume,
        concurrency=3,
        done=done,
    )


def content(out: Path) -> list[dict[str, Any]]:
    """The lines of answers.jsonl in a fixed order, without what the clock decides."""
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        for clocked in ("overhead_ms", "shift_ms"):
            (row["steering"] or {}).pop(clocked, None)
        del row["seconds"]
    return sorted(rows, key=lambda row: (row["condition"], row["suite"], row["id"]))


async def test_every_item_is_asked_in_every_condition_and_says_what_was_done(
    tmp_path: Path,
) -> None:
    evaluation, engine = make_evaluation(tmp_path / "data"), FakeEngine(echo)
    async with asker(engine) as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    answers = RunDir(tmp_path / "run").answers()
    assert tally == Tally(num_asked=2 * 6 * 4, num_known=0, num_errors=0)
    assert {answer.key for answer in answers} == {
        (condition, suite, f"n{n}")
        for condition in CONDITIONS
        for suite in ("first", "second")
        for n in range(6)
    }
    items = {(item.suite, item.id): item for item in evaluation.items}
    for answer in answers:
        item = items[answer.suite, answer.id]
        num_tokens = len(item.prompt) + 10 * (answer.condition != "text-only")
        mode, alpha = ("dataset", 0.25) if answer.condition.startswith("dataset") else ("off", 0)
        assert answer.answer == f"{num_tokens} {mode} {alpha}"
        assert (answer.digest, answer.kind, answer.error) == (item.digest, item.kind, None)
        assert answer.finish_reason == "stop" and answer.steering is not None
        assert answer.steering["reason"] == {
            "base": "disabled",
            "blank": "disabled",
            "text-only": "text-only",
        }.get(answer.condition)
    request = engine.requests[-1]
    assert (request.params.temperature, request.params.max_tokens) == (0.0, 32)


async def test_conditions_show_the_picture_that_they_say(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", 1, ("base", "blank", "noise", "text-only"))
    evaluation = replace(evaluation, suites=evaluation.suites[:1])
    item, engine = evaluation.items[0], FakeEngine(echo)
    async with asker(engine) as deshift:
        for condition in evaluation.conditions:
            await deshift.answer(item, condition)
    shown = [images for _, images in engine.prompts]
    assert [len(images) for images in shown] == [1, 1, 1, 0]
    assert isinstance(item.image, Path)
    own, blank, noise = (images[0].convert("RGB") for images in shown[:3])
    assert own.tobytes() == Image.open(item.image).convert("RGB").tobytes()
    assert blank.size == noise.size == own.size
    assert set(blank.get_flattened_data()) == {(255, 255, 255)}
    assert len(set(noise.get_flattened_data())) > 12


async def test_a_caption_takes_the_place_of_the_picture(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", 2, ("caption",))
    with pytest.raises(EvaluationError, match="condition 'caption': no item has a caption"):
        evaluation.asked()
    told = replace(evaluation.suites[0].items[0], caption="A red square.")
    suite = replace(evaluation.suites[0], items=(told, evaluation.suites[0].items[1]))
    evaluation, engine = replace(evaluation, suites=(suite,)), FakeEngine(echo)
    async with asker(engine) as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    assert tally.num_asked == 1
    [messages, images] = engine.prompts[-1]
    assert messages[0]["content"][0]["text"] == f"The picture shows: A red square.\n\n{told.prompt}"
    assert len(images) == 0
    settings = RunDir(tmp_path / "run").settings()
    assert settings["conditions"][0]["asked"] == {"first": 1}


def test_a_killed_run_has_all_conditions_alike(tmp_path: Path) -> None:
    order = make_evaluation(tmp_path / "data", 40).asked()
    for cut in range(0, len(order), 7):
        counts = [sum(c.name == name for _, c in order[:cut]) for name in CONDITIONS]
        assert max(counts) - min(counts) <= 1
        suites = [sum(i.suite == name for i, _ in order[:cut]) for name in ("first", "second")]
        assert abs(suites[0] - suites[1]) <= 32 * len(CONDITIONS)
    digests = [item.picture_digest for item, _ in order[: 64 * len(CONDITIONS)]]
    changes = sum(one != other for one, other in zip(digests, digests[1:], strict=False))
    assert changes == 2  # three pictures, each back to back within the first round


async def test_a_killed_run_resumes_and_is_the_same_as_one_that_was_not(tmp_path: Path) -> None:
    evaluation, engine = make_evaluation(tmp_path / "data"), FakeEngine(echo)
    num_done = 0

    def kill(_: Answer) -> None:
        nonlocal num_done
        num_done += 1
        if num_done == 17:
            running.cancel()

    async with asker(engine) as deshift:
        await asked(evaluation, deshift, tmp_path / "whole")
        running = asyncio.create_task(asked(evaluation, deshift, tmp_path / "killed", done=kill))
        with pytest.raises(asyncio.CancelledError):
            await running
        path = tmp_path / "killed" / "answers.jsonl"
        num_known = len(path.read_text().splitlines()) - 1
        assert 16 <= num_known < 24  # others were under way beside the seventeenth
        path.write_bytes(path.read_bytes()[:-20])  # torn in its last line
        assert len(RunDir(tmp_path / "killed").answers()) == num_known
        engine.requests.clear()
        tally = await asked(evaluation, deshift, tmp_path / "killed", resume=True)
    assert tally == Tally(num_asked=48, num_known=num_known, num_errors=0)
    assert len(engine.requests) == len(CONDITIONS) + 48 - num_known  # a check before what is left
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    whole, killed = (
        json.loads((tmp_path / n / "run.json").read_text()) for n in ("whole", "killed")
    )
    assert whole["settings"] == killed["settings"]
    assert (len(whole["starts"]), len(killed["starts"])) == (1, 2)


async def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    evaluation, engine = make_evaluation(tmp_path / "data", 2), FakeEngine(echo)
    async with asker(engine) as deshift:
        await asked(evaluation, deshift, tmp_path / "run")
        before = content(tmp_path / "run")
        tally = await asked(evaluation, deshift, tmp_path / "run", resume=True)
    assert (tally.num_known, tally.num_asked) == (16, 16) and content(tmp_path / "run") == before


async def test_other_settings_are_another_run_and_the_difference_is_named(tmp_path: Path) -> None:
    evaluation, out = make_evaluation(tmp_path / "data"), tmp_path / "run"
    async with asker(FakeEngine(echo)) as deshift:
        await asked(evaluation, deshift, out)
        with pytest.raises(EvaluationError, match="holds a run already: give --resume"):
            await asked(evaluation, deshift, out)
        stronger = tuple(parse(text) for text in (*CONDITIONS[:3], "dataset:alpha=0.5"))
        more = make_evaluation(tmp_path / "data", 7)
        for change, words in [
            ({"sampling": Sampling(max_tokens=64)}, "sampling.max_tokens is 32 there and 64 here"),
            ({"conditions": stronger}, "steering.alpha is 0.25 there and 0.5 here"),
            ({"suites": more.suites}, "suites[first].num is 6 there and 7 here"),
            ({"photos": Photos("x", (b"1",))}, "photos.num is 3 there and 1 here"),
            ({"checkpoint": "c" * 64}, "checkpoint is null there"),
            ({"setup": "d" * 64}, "setup is null there"),
        ]:
            with pytest.raises(EvaluationError) as error:
                await asked(replace(evaluation, **change), deshift, out, resume=True)
            assert words in str(error.value), error.value
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").touch()
        with pytest.raises(EvaluationError, match="is not empty and holds no run"):
            await asked(evaluation, deshift, tmp_path / "full", resume=True)


async def test_the_same_prompts_from_another_place_are_the_same_run(tmp_path: Path) -> None:
    async with asker(FakeEngine(echo)) as deshift:
        await asked(make_evaluation(tmp_path / "data", 2), deshift, tmp_path / "run")
        moved = make_evaluation(tmp_path / "moved", 2)
        tally = await asked(moved, deshift, tmp_path / "run", resume=True)
    assert tally.num_known == 16


async def test_run_json_holds_what_it_takes_to_repeat_the_run(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", max_tokens=8, seed=5)
    async with asker(FakeEngine(echo)) as deshift:
        await asked(evaluation, deshift, tmp_path / "run")
    folder = RunDir(tmp_path / "run")
    settings = folder.settings()
    assert (settings["model"], settings["is_deshift"]) == ("tiny", True)
    assert settings["sampling"] == {"max_tokens": 8, "seed": 5, "temperature": 0.0}
    assert settings["conditions"][3] == {
        "name": "dataset:alpha=0.25",
        "picture": "own",
        "steering": {"mode": "dataset", "alpha": 0.25},
        "asked": {"first": 6, "second": 6},
    }
    assert settings["suites"][0] == {
        "name": "first",
        "seed": 1,
        "skip": 0,
        "num": 6,
        "available": 6,
        "kinds": {"harmful": 6},
        "digest": evaluation.suites[0].digest,
        "repeats_anchors": [],
    }
    assert settings["photos"] == {"num": 3, "digest": evaluation.photos.digest}
    assert len(settings["vectors"]["vector"]) == 64 and len(settings["anchors"]["digest"]) == 64
    restored = folder.items()
    assert restored == evaluation.items
    assert [item.digest for item in restored] == [item.digest for item in evaluation.items]


async def test_pictures_of_our_own_making_are_kept_with_the_run(tmp_path: Path) -> None:
    suite = read_suite("rendered", 2, 0)
    evaluation = Evaluation((suite,), (parse("base"),), photos(None))
    async with asker(FakeEngine(echo)) as deshift:
        await asked(evaluation, deshift, tmp_path / "run")
    restored = RunDir(tmp_path / "run").items()
    assert [item.picture() for item in restored] == [item.image for item in suite.items]
    assert [item.answers for item in restored] == [item.answers for item in suite.items]


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    class Busy(FakeEngine):
        num_refused = 0

        def submit(self, request: EngineRequest) -> None:
            self.num_refused += 1
            if self.num_refused % 2:
                raise QueueFullError("the queue is full")
            super().submit(request)

    engine = Busy(echo)
    evaluation = make_evaluation(tmp_path / "data", 2, ("base",))
    patient = Patience(attempts=50, first_wait_s=0.001, longest_wait_s=0.002)
    async with asker(engine, patient) as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    assert (tally.num_asked, tally.num_errors) == (4, 0)
    assert len(engine.requests) == 5 and engine.num_refused == 10


async def test_a_failed_answer_is_recorded_counted_and_asked_again(tmp_path: Path) -> None:
    lock, fail = threading.Lock(), [1]

    def script(request: EngineRequest) -> Iterator[Any]:
        with lock:
            broken = bool(fail) and len(request.inputs.prompt) == len("Say xx") + 10
        if broken:
            yield Failed("engine", "a kernel broke")
        else:
            yield from echo(request)

    evaluation, out = make_evaluation(tmp_path / "data", 3, ("base",)), tmp_path / "run"
    async with asker(FakeEngine(script)) as deshift:
        tally = await asked(evaluation, deshift, out)
        assert (tally.num_asked, tally.num_errors) == (6, 2)
        failed = [answer for answer in RunDir(out).answers() if answer.error]
        assert [(a.id, a.answer, a.finish_reason) for a in failed] == [("n2", "", None)] * 2
        assert all(a.error and a.error.startswith("500 generation_engine") for a in failed)
        fail.clear()
        tally = await asked(evaluation, deshift, out, resume=True)
    assert (tally.num_known, tally.num_errors) == (4, 0)
    answers = RunDir(out).answers()
    assert len(answers) == 6 and not any(answer.error for answer in answers)
    assert len(content(out)) == 8  # what went wrong stays on record


async def test_an_answer_that_was_not_steered_as_asked_is_an_error(tmp_path: Path) -> None:
    """A server that serves unsteered instead would count as an ineffective method."""
    evaluation = make_evaluation(tmp_path / "data", 1, ("sample:alpha=0.5",))
    script = says("Hello", shift_failure="no shift")
    async with asker(FakeEngine(script), on_error="serve-unsteered") as deshift:
        with pytest.raises(EvaluationError, match=r"steering\.mode was 'off' \(shift-failed\)"):
            await asked(evaluation, deshift, tmp_path / "run")
        answer = await deshift.answer(*evaluation.asked()[0])
    assert answer.answer == "" and "asked for was 'sample'" in str(answer.error)


@pytest.mark.parametrize(
    ("settings", "condition", "words"),
    [
        ({"client_override": "none"}, "base", "DESHIFT_CLIENT_OVERRIDE=any"),
        ({"vectors": False}, "dataset:alpha=1", "make some with `deshift extract`"),
        ({}, "dataset:alpha=9", "alpha 9 is outside 0..2"),
        ({}, "dataset:schedule=single:99", "names layer 99"),
    ],
)
async def test_what_the_server_will_not_do_is_said_before_the_run(
    settings: dict[str, Any], condition: str, words: str, tmp_path: Path
) -> None:
    evaluation = make_evaluation(tmp_path / "data", 1, (condition,))
    async with asker(FakeEngine(echo), **settings) as deshift:
        with pytest.raises(EvaluationError) as error:
            await asked(evaluation, deshift, tmp_path / "run")
    assert words in str(error.value) and f"condition {condition!r}" in str(error.value)
    assert not (tmp_path / "run").exists()


async def test_text_conditions_and_the_policys_own_need_no_permission(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", 1, ("text-only", "served"))
    async with asker(FakeEngine(echo), client_override="none") as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    assert tally == Tally(4, 0, 0)
    served = [a for a in RunDir(tmp_path / "run").answers() if a.condition == "served"]
    assert {(a.steering or {}).get("alpha") for a in served} == {0.5}


def other_server(answer: Callable[[httpx.Request], httpx.Response], key: str = "") -> Asker:
    client = http_client("http://127.0.0.1:9/v1/", key or None, 1)
    client._transport = httpx.MockTransport(answer)  # the client's own base URL and headers
    return Asker(client, None, patience=QUICK)  # type: ignore[arg-type]


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


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    with folder.appending(), pytest.raises(EvaluationError, match="another process goes on"):
        RunDir(tmp_path).appending().__enter__()
    with RunDir(tmp_path).appending():  # the first has ended
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"condition": "base"}\n')
    with pytest.raises(EvaluationError, match=r"answers\.jsonl, line 1: not an answer"):
        RunDir(tmp_path).answers()


def test_photographs_are_dealt_evenly_and_the_same_when_the_sample_grows(tmp_path: Path) -> None:
    make_evaluation(tmp_path, 20)
    few, many = (
        photos(tmp_path).dealt(read_suite(str(tmp_path / "first.jsonl"), num, 1), 1).items
        for num in (6, 9)
    )
    assert few == many[:6]
    images = [item.image for item in many]
    assert {images.count(image) for image in images} == {3} and len(set(images)) == 3


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(EvaluationError, match=r"a\.jpg: not a picture"):
        photos(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"no \.jpg"):
        photos(tmp_path)
    assert photos(None).source == "rendered" and len(photos(None).images) == 32
