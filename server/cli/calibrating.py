"""The second half of `deshift calibrate`: a server is searched, and what was found is written."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from tqdm import tqdm

from server.cli.display import cell, table
from server.cli.evaluate_options import Connection
from server.cli.options import console
from server.demo.cases import MODEL_NAME
from steering.errors import EvaluationError

if TYPE_CHECKING:  # what they import takes seconds
    from steering.evaluate.arms import Arm
    from steering.evaluate.bounds import Bounds
    from steering.evaluate.calibration import Calibration, Items
    from steering.evaluate.client import Server
    from steering.evaluate.evaluation import Evaluation
    from steering.evaluate.record import RunDir

NOTHING_KEPT = 2  # exit code
POLICY, CALIBRATION, SWEEP = "policy.json", "calibration.json", "sweep.json"


@dataclass(frozen=True)
class Wanted:
    """What is searched. arms: none for the default ones. specs: the suites, as they were named."""

    arms: list["Arm"]
    ladder: tuple[float, ...]
    bounds: "Bounds"
    items: "Items"
    specs: list[str]
    is_sweep: bool


@dataclass(frozen=True)
class Found:
    """calibration: of a search. sweep: of a sweep. settings: what the answers depend on."""

    calibration: "Calibration | None"
    sweep: dict[str, Any] | None
    settings: dict[str, Any]


async def search(
    connection: Connection,
    evaluation: "Evaluation",
    wanted: Wanted,
    folder: "RunDir",
    resume: bool,
) -> Found:
    """Ask what is not answered yet. Raises EvaluationError."""
    from steering.evaluate.asking import Asking
    from steering.evaluate.calibration import calibrate
    from steering.evaluate.client import connect, http_client
    from steering.evaluate.run import Asker
    from steering.evaluate.sweep import sweep

    async with http_client(connection.url, connection.api_key, connection.concurrency) as client:
        server = await connect(client, connection.model)
        _check(server, wanted)
        asker = Asker(client, server, evaluation.sampling)
        await asker.check(evaluation.asked()[:1])
        settings = {k: v for k, v in evaluation.settings(server).items() if k != "conditions"}
        arms = wanted.arms or default_arms(server, wanted.ladder)
        start = _start(server, wanted, arms)
        folder.begin(settings, start, evaluation.items, resume=resume)
        evidence = {**settings, **{key: start[key] for key in ("arms", "search", "judges")}}
        with folder.appending() as append, tqdm(unit="answer", dynamic_ncols=True) as bar:
            asking = Asking(
                asker,
                folder.answers(),
                append,
                concurrency=connection.concurrency,
                begun=lambda num: _grow(bar, num),
                done=lambda _: bar.update(),
            )
            if wanted.is_sweep:
                items = wanted.items.first(wanted.items.rounds[-1])
                told = await sweep(
                    arms, items, asking, wanted.bounds, evidence, bar.set_description
                )
                return Found(None, told, evidence)
            found = await calibrate(arms, wanted.items, asking, wanted.bounds, bar.set_description)
            return Found(found, None, evidence)


def report(found: Found, bounds: "Bounds", out: Path, tenant: str) -> None:
    """Write the files and print the table; exits with NOTHING_KEPT where nothing was chosen."""
    from steering.evaluate.evidence import as_dict, policy_document
    from steering.evaluate.evidence import table as rows_of

    if found.sweep is not None:
        _write(out / SWEEP, found.sweep)
        _print(_swept_rows(found.sweep))
        return
    calibration = found.calibration
    assert calibration is not None
    _write(out / CALIBRATION, as_dict(calibration, bounds, found.settings))
    (out / POLICY).unlink(missing_ok=True)  # of an earlier time, under other bounds
    _print(rows_of(calibration, bounds))
    for arm, end in calibration.ends.items():
        typer.echo(f"{arm}: {end}", err=True)
    if calibration.chosen is None:
        typer.echo(f"deshift: {calibration.problem}; no policy is written", err=True)
        raise typer.Exit(NOTHING_KEPT)
    _write(out / POLICY, policy_document(calibration, bounds, found.settings))
    typer.echo(f"\n{calibration.num_answers} answers; chosen: {calibration.chosen.condition}")
    reason = f"calibrated, {out}"
    command = ["deshift", "policy", "set", tenant, "--file", str(out / POLICY), "--reason", reason]
    typer.echo(f"To put it in force:\n  {shlex.join(command)}")


def _check(server: "Server", wanted: Wanted) -> None:
    if not server.is_deshift:
        raise EvaluationError(f"{server.url} is no Deshift server: it has no strength to be found")
    if server.model == MODEL_NAME and "development" in wanted.specs:
        raise EvaluationError(
            "the demonstration model was trained on most of our development prompts: give "
            "--suite held-out --suite rendered, or prompts of your own"
        )


def default_arms(server: "Server", ladder: tuple[float, ...]) -> list["Arm"]:
    """Those that fit the model, with the strengths of `ladder`."""
    from steering.evaluate import arms

    engine = (server.ready or {}).get("engine")
    num_layers = engine.get("num_layers") if isinstance(engine, Mapping) else None
    if num_layers is None:
        typer.echo("/ready does not say how many layers there are: none are chosen from", err=True)
    return arms.parse_all(arms.defaults(num_layers), ladder)


def _start(server: "Server", wanted: Wanted, arms: list["Arm"]) -> dict[str, Any]:
    from server.bench import machine
    from steering.evaluate.judge import Judges

    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": server.url,
        "ready": server.ready,
        "machine": machine.describe(),
        "suites": wanted.specs,
        "arms": [{"name": arm.name, "alphas": list(arm.alphas)} for arm in arms],
        "search": {suite[0].suite: len(suite) for suite in wanted.items.search},
        "judges": Judges().describe(),
    }


def _grow(bar: Any, num: int) -> None:
    """A search does not know how long it will be; its bar knows what has been decided."""
    bar.total = (bar.total or 0) + num
    bar.refresh()


def _swept_rows(document: Mapping[str, Any]) -> list[list[str]]:
    from steering.evaluate.evidence import HEADINGS, row

    rows = [list(HEADINGS)]
    for name, point in document["points"].items():
        mark = "frontier" if point["is_on_frontier"] else ""
        rows.append(row(mark, name, point["figures"], "refused" if point["refusal"] else ""))
    return rows


def _print(rows: list[list[str]]) -> None:
    shown = table(*rows[0])
    for each in rows[1:]:
        shown.add_row(*(cell(text, "bold" if each[0] else "") for text in each))
    console().print(shown)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
