"""Small runs against the real HTTP layer with a scripted engine, or against a scripted server."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from server.app import create_app
from server.engine.types import EngineRequest
from steering.evaluate.client import Patience, connect, http_client
from steering.evaluate.conditions import parse
from steering.evaluate.evaluation import Evaluation, Sampling
from steering.evaluate.pictures import photos
from steering.evaluate.record import Answer, RunDir
from steering.evaluate.run import Asker, Tally, run
from steering.evaluate.suites import read_suite
from steering.stores import MemoryStore
from tests.server.conftest import make_settings
from tests.server.fakes import FakeEngine, publish, says

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


def other_server(answer: Callable[[httpx.Request], httpx.Response], key: str = "") -> Asker:
    client = http_client("http://127.0.0.1:9/v1/", key or None, 1)
    client._transport = httpx.MockTransport(answer)  # the client's own base URL and headers
    return Asker(client, None, patience=QUICK)  # type: ignore[arg-type]
