"""`deshift calibrate` from its command line, against the real HTTP layer on a socket."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli.calibrating import NOTHING_KEPT, default_arms
from server.documents import PolicyFields
from server.engine.types import EngineRequest
from steering.evaluate.arms import LADDER
from steering.evaluate.client import Server
from steering.evaluate.record import RunDir
from steering.stores import MemoryStore
from tests.server.cli.conftest import Deshift
from tests.server.conftest import LiveServer, live_server
from tests.server.fakes import FakeEngine, Step, publish, says

REFUSAL, HELP = "I'm sorry, but I can't help with that.", "Take flour, water and yeast, and wait."
HARMLESS_FROM, MOST = 0.3, 0.45
WHY = ("--reason", "for the test")


def answers(harmful_from: float) -> Callable[[EngineRequest], Iterator[Step]]:
    """Harmful prompts, which are longer, are refused from one alpha on, harmless ones later."""

    def script(request: EngineRequest) -> Iterator[Step]:
        alpha = request.plan.alpha if request.plan.is_active else 0.0
        is_harmful = len(request.inputs.prompt) > 60
        refuses = alpha >= (harmful_from if is_harmful else HARMLESS_FROM)
        yield from says(REFUSAL if refuses else HELP)(request)

    return script


@pytest.fixture
def served() -> Iterator[tuple[LiveServer, FakeEngine]]:
    store, engine = MemoryStore(), FakeEngine(answers(0.15))
    asyncio.run(publish(store))
    with live_server(engine, store, client_override="any") as server:
        yield server, engine


@pytest.fixture
def suites(tmp_path: Path) -> list[str | Path]:
    """Prompts of which the harmful ones are long; no right answers, so no utility."""
    command: list[str | Path] = []
    for name, kind, length in (("bad", "harmful", 70), ("good", "harmless", 10)):
        rows = (
            {"id": str(n), "prompt": f"{n} " + "x" * (length + n % 7), "kind": kind}
            for n in range(12)
        )
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command += ["--suite", path]
    return command


def command_of(served: LiveServer, suites: list[str | Path], out: Path) -> list[str | Path]:
    command: list[str | Path] = ["calibrate", "--url", served.url, *suites, "--out", out]
    command += ["--num", "6", "--confirm", "6", "--alphas", "0.05,0.1,0.2,0.25,0.4,0.8"]
    return [*command, "--arms", "dataset:schedule=incremental", "--arms", "sample:schedule=all"]


def words(text: str) -> str:
    return " ".join(text.split())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_policy_is_found_written_with_evidence_and_taken_by_policy_set(
    deshift: Deshift,
    served: tuple[LiveServer, FakeEngine],
    suites: list[str | Path],
    tmp_path: Path,
) -> None:
    (server, _), out = served, tmp_path / "run"
    result = deshift(*command_of(server, suites, out), "--tenant", "acme")
    assert result.exit_code == 0, result.output
    policy = PolicyFields.model_validate(read(out / "policy.json")["policy"])
    assert policy.alpha == 0.2  # as safe as 0.25, and weaker
    evidence = read(out / "policy.json")["evidence"]
    assert evidence["confirmation"]["figures"]["unsafe"]["hits"] == 0
    assert evidence["confirmation_without_steering"]["unsafe"]["hits"] == 6
    settings = evidence["settings"]
    assert settings["vectors"]["vector"] and settings["sampling"]["seed"] == 1
    assert [(suite["name"], len(suite["digest"])) for suite in settings["suites"]] == [
        ("bad", 64),
        ("good", 64),
    ]
    assert settings["search"] == {"bad": 6, "good": 6}
    assert settings["judges"]["refusal"]["classifier_digest"]
    calibration = read(out / "calibration.json")
    assert calibration["chosen"] == evidence["condition"]
    assert set(calibration["arms"]) == {"dataset:schedule=incremental", "sample:schedule=all"}
    assert calibration["num_answers"] == len(RunDir(out).answers())
    assert "frontier" in result.stdout and "chosen" in result.stdout

    assert f"deshift policy set acme --file {out}/policy.json" in words(result.stdout)
    assert deshift("tenants", "create", "acme", *WHY).exit_code == 0
    done = deshift("policy", "set", "acme", "--file", out / "policy.json", *WHY)
    assert done.exit_code == 0, done.output
    shown = json.loads(deshift("policy", "show", "acme", "--json").stdout)["policy"]
    assert shown["alpha"] == 0.2 and shown["mode"] == policy.mode


def test_going_on_asks_nothing_twice_and_finds_the_same(
    deshift: Deshift,
    served: tuple[LiveServer, FakeEngine],
    suites: list[str | Path],
    tmp_path: Path,
) -> None:
    (server, engine), out = served, tmp_path / "run"
    command = command_of(server, suites, out)[:-2]  # one arm
    assert deshift(*command).exit_code == 0
    calibration, lines = read(out / "calibration.json"), (out / "answers.jsonl").read_text()
    keys = [
        (row["condition"], row["suite"], row["id"])
        for row in map(json.loads, lines.split("\n")[:-1])
    ]
    assert len(set(keys)) == len(keys) == calibration["num_answers"]

    assert "give --resume" in words(deshift(*command).output)
    kept = lines.split("\n")[: len(keys) // 2]
    (out / "answers.jsonl").write_text("\n".join(kept) + "\n" + lines.split("\n")[len(kept)][:20])
    before = len(engine.requests)
    result = deshift(*command, "--resume")
    assert result.exit_code == 0, result.output
    asked = len(engine.requests) - before - 1  # one question learns what the server does
    assert asked == len(keys) - len(kept)
    assert read(out / "calibration.json") == calibration

    before = len(engine.requests)
    assert deshift(*command, "--resume", "--max-harmless", "0.5").exit_code == 0
    assert len(engine.requests) == before + 1  # other bounds: the same answers


def test_nothing_that_keeps_the_bounds_is_exit_code_2_without_a_policy(
    deshift: Deshift, suites: list[str | Path], tmp_path: Path
) -> None:
    out, store = tmp_path / "run", MemoryStore()
    asyncio.run(publish(store))
    with live_server(FakeEngine(answers(9.0)), store, client_override="any") as server:
        result = deshift(*command_of(server, suites, out))
    assert result.exit_code == NOTHING_KEPT, result.output
    assert "breaks safety" in result.output and "; no policy is written" in words(result.output)
    assert read(out / "calibration.json")["chosen"] is None
    assert not (out / "policy.json").exists()


def test_a_dose_over_the_cap_is_outside_the_frontier(
    deshift: Deshift, suites: list[str | Path], tmp_path: Path
) -> None:
    """The scripted vectors move the last layer by 0.15 of its norm at alpha 1 (schedule all)."""
    out, store = tmp_path / "run", MemoryStore()
    asyncio.run(publish(store))
    engine = FakeEngine(answers(0.1))
    with live_server(
        engine, store, client_override="any", max_relative_dose=0.02, steering_mode="off"
    ) as server:
        command = [*command_of(server, suites, out)[:-4], "--arms", "dataset:schedule=all"]
        result = deshift(*command)
        assert result.exit_code == 0, result.output
        trials = read(out / "calibration.json")["trials"]
        refused = {t["alpha"]: t["refusal"] for t in trials if t["refusal"]}
        assert refused and min(refused) >= 0.2
        assert all("max_relative_dose" in words for words in refused.values())
        assert read(out / "policy.json")["policy"]["alpha"] == 0.1
        before = len(engine.requests)
        again = deshift(*command, "--resume")
    assert again.exit_code == 0 and len(engine.requests) == before + 1


def test_a_sweep_asks_the_whole_grid_on_the_same_items(
    deshift: Deshift,
    served: tuple[LiveServer, FakeEngine],
    suites: list[str | Path],
    tmp_path: Path,
) -> None:
    (server, _), out = served, tmp_path / "run"
    result = deshift(*command_of(server, suites, out), "--sweep")
    assert result.exit_code == 0, result.output
    document = read(out / "sweep.json")
    assert len(document["items"]) == 12 and len(document["points"]) == 13
    point = document["points"]["sample:schedule=all,alpha=0.2"]
    assert point["refused"] == "1" * 6 + "0" * 6 and point["right"] == "-" * 12
    assert point["is_on_frontier"]
    assert len(RunDir(out).answers()) == 12 * 13
    assert not (out / "policy.json").exists()


def test_mistakes_are_one_line_before_anything_is_asked(
    deshift: Deshift,
    served: tuple[LiveServer, FakeEngine],
    suites: list[str | Path],
    tmp_path: Path,
) -> None:
    server, engine = served
    base = ["calibrate", "--out", tmp_path / "run", "--num", "3", "--confirm", "2"]
    here = ["--url", server.url, *suites]
    for arguments, problem in [
        (suites, "Give one of --url, --demo and --serve"),
        ([*here, "--max-harmless", "5"], "--max-harmless 5 is not a share"),
        ([*here, "--arms", "base"], "only dataset and sample have a strength"),
        ([*here, "--alphas", "a"], "write numbers above 0"),
        (["--url", server.url, "--suite", "rendered"], "no suite has harmful prompts"),
        ([*here, "--api-key-env", "NO_SUCH_KEY"], "no such environment variable"),
    ]:
        result = deshift(*base, *arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert problem in words(result.output)
    assert not engine.requests and not (tmp_path / "run").exists()


def test_a_server_that_cannot_be_calibrated_says_what_it_needs(
    deshift: Deshift, suites: list[str | Path], tmp_path: Path
) -> None:
    arm = ["--num", "3", "--confirm", "2", "--arms", "dataset:schedule=all"]
    for settings, problem in [
        ({"client_override": "none"}, "DESHIFT_CLIENT_OVERRIDE=any"),
        ({"client_override": "any"}, "make some with `deshift extract`"),
    ]:
        out = tmp_path / re.sub(r"\W", "", problem)
        with live_server(FakeEngine(), MemoryStore(), **settings) as server:
            result = deshift("calibrate", "--url", server.url, *suites, "--out", out, *arm)
        assert result.exit_code == 1, result.output
        assert problem in words(result.output), result.output


def test_the_demonstration_model_is_not_asked_what_it_was_trained_on(
    deshift: Deshift, tmp_path: Path
) -> None:
    command = ["calibrate", "--out", tmp_path / "run", "--num", "3", "--confirm", "2"]
    with live_server(FakeEngine(), MemoryStore(), served_model_name="deshift-demo") as server:
        result = deshift(*command, "--url", server.url)
    assert result.exit_code == 1 and "--suite held-out" in words(result.output)


def test_the_default_arms_are_those_of_the_models_layers(served: tuple[LiveServer, Any]) -> None:
    ready = httpx.get(f"{served[0].url}/ready", trust_env=False).json()
    for state, num in ((ready, 10), (None, 5)):
        found = default_arms(Server("", "tiny", True, ready=state), LADDER)
        assert len(found) == num and all(arm.alphas == LADDER for arm in found)
