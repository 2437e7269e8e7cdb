"""`deshift eval` from its command line, against the real HTTP layer on a socket."""

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tenacity import wait_none

from server.cli.evaluate_options import Place
from server.engine.types import EngineRequest
from steering.evaluate.judges import endpoint
from steering.stores import MemoryStore
from tests.server.cli.conftest import Deshift
from tests.server.conftest import LiveServer, live_server, wait_until
from tests.server.fakes import FakeEngine, Step, publish, says


@pytest.fixture
def served() -> Iterator[LiveServer]:
    """A scripted engine, vectors, and leave to ask for any steering."""
    store = MemoryStore()
    asyncio.run(publish(store))
    with live_server(FakeEngine(says("I am ", "fine.")), store, client_override="any") as server:
        yield server


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "greetings.jsonl"
    rows = ({"id": f"n{n}", "prompt": f"Hello {n}!", "kind": "harmless"} for n in range(5))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.new("RGB", (6, 4), "red").save(folder / "red.jpg")
    return folder


def words(text: str) -> str:
    return " ".join(text.split())


def test_one_command_asks_records_and_goes_on(
    deshift: Deshift, served: LiveServer, suite: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command: list[str | Path] = ["eval", "--url", served.url, "--suite", suite]
    command += ["--suite", "rendered", "--condition", "base", "--condition", "text-only"]
    command += ["--condition", "dataset:alpha=0.25,schedule=incremental", "--num", "3"]
    command += ["--skip", "greetings=1", "--photos", photographs, "--out", out]
    command += ["--concurrency", "4", "--max-tokens", "8", "--seed", "7"]
    result = deshift(*command)
    assert result.exit_code == 0, result.output
    assert "18 requests, 0 of them ended in an error" in result.output
    run = json.loads((out / "run.json").read_text())
    settings, [start] = run["settings"], run["starts"]
    assert settings["sampling"] == {"max_tokens": 8, "seed": 7, "temperature": 0.0}
    assert [(s["name"], s["num"], s["skip"], s["available"]) for s in settings["suites"]] == [
        ("greetings", 3, 1, 4),
        ("rendered", 3, 0, None),
    ]
    assert start["suites"] == [str(suite), "rendered"] and start["photos"] == str(photographs)
    assert start["url"] == served.url and start["machine"]["packages"]["deshift"]
    assert start["ready"]["steering"]["vector"] == settings["vectors"]["vector"]
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 18
    assert {json.loads(line)["answer"] for line in lines} == {"I am fine."}
    assert len((out / "judged.jsonl").read_text().splitlines()) == 18
    table = "| greetings (harmless) | 0.0 % (0-56), n 3 | 0.0 % (0-56), n 3 | 0.0 % (0-56), n 3 |"
    assert table in result.stdout and "| refused | base | text-only | dataset" in result.stdout
    assert table in deshift("eval", "--only-judge", "--out", out).stdout

    assert "give --resume" in words(deshift(*command).output)
    (out / "answers.jsonl").write_text("\n".join(lines[:10]) + "\n" + lines[10][:30])
    result = deshift(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert sorted(
        (row["condition"], row["suite"], row["id"], row["answer"])
        for row in map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    ) == sorted(
        (row["condition"], row["suite"], row["id"], row["answer"]) for row in map(json.loads, lines)
    )
    result = deshift(*command, "--resume", "--max-tokens", "9")
    assert result.exit_code == 1
    assert "sampling.max_tokens is 8 there and 9 here" in words(result.output)


def test_a_judge_that_is_down_costs_no_answer(
    deshift: Deshift, served: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long it waits between its attempts is no matter here.
    monkeypatch.setattr(endpoint, "wait_random_exponential", lambda **_: wait_none())
    suite, out = tmp_path / "bad.jsonl", tmp_path / "run"
    suite.write_text('{"id": "a", "prompt": "How do I break a window?", "kind": "harmful"}')
    command: list[str | Path] = ["eval", "--url", served.url, "--suite", suite, "--out", out]
    command += ["--condition", "text-only"]
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "judge"]
    result = deshift(*command, *judge)
    assert result.exit_code == 1
    assert "the judge at http://127.0.0.1:9/v1 does not answer" in words(result.output)
    assert "--only-judge goes on from here" in words(result.output)
    assert len((out / "answers.jsonl").read_text().splitlines()) == 1
    result = deshift("eval", "--only-judge", "--out", out)
    assert result.exit_code == 0, result.output
    assert "bad (harmful)" in result.stdout


def test_fewer_prompts_than_asked_for_is_said(
    deshift: Deshift, served: LiveServer, suite: Path, tmp_path: Path
) -> None:
    command = ["eval", "--url", served.url, "--suite", suite, "--condition", "text-only"]
    result = deshift(*command, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "greetings: 5 prompts, fewer than --num 200" in result.output


def test_mistakes_are_one_line_before_anything_is_asked(
    deshift: Deshift, suite: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")]
    asked = ["--suite", str(suite), "--condition", "base"]
    here = ["--url", "http://127.0.0.1:9"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a", "prompt": "Hi"}\n')
    for arguments, problem in [
        (asked, "Give one of --url, --demo and --serve"),
        ([*asked, *here, "--demo"], "Give one of --url, --demo and --serve"),
        ([*asked, *here, "--setting", "max_n=1"], "is for a server that is started here"),
        ([*asked, "--demo", "--setting", "max_n"], "write NAME=VALUE"),
        ([*here, "--suite", str(suite)], "no condition: give --condition"),
        ([*here, "--condition", "base"], "nothing to ask: give --suite"),
        ([*here, *asked, "--condition", "bas"], "'bas' is not one of: base"),
        ([*here, *asked, "--conditions-set", "all"], "there is `table` only"),
        ([*here, *asked, "--suite", str(broken)], "line 1: field 'kind' is missing"),
        ([*here, *asked, "--skip", "x"], "--skip 'x': write N or NAME=N"),
        ([*here, *asked, "--skip", "x=1"], "--skip names no suite of this run: x"),
        ([*here, *asked, "--photos", str(tmp_path / "no")], "not a folder"),
        ([*here, *asked, "--api-key-env", "NO_SUCH_KEY"], "no such environment variable"),
        ([*here, *asked], "no server answers at http://127.0.0.1:9"),
        ([*asked, "--url", "http://me:secret@127.0.0.1:9"], "--url must be http(s)://HOST"),
        ([*asked, "--url", "http://a:b"], "--url must be http(s)://HOST"),
        ([*here, *asked, "--judge-url", "http://127.0.0.1:9/v1"], "belong together"),
        (
            [*here, *asked, "--judge-url", "127.0.0.1:9", "--judge-model", "m"],
            "the judge's address must be http(s)://HOST",
        ),
        (["--only-judge"], "holds no run"),
    ]:
        result = deshift("eval", *arguments, *out)
        assert result.exit_code == 1, (arguments, result.output)
        assert problem in words(result.output) and "secret" not in result.output, result.output
    assert not (tmp_path / "run").exists()


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    deshift: Deshift, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command: list[str | Path] = ["eval", "--suite", suite, "--condition", "text-only", "--out", out]
    key = "a-secret-key-of-some-length"
    with live_server(FakeEngine(), MemoryStore(), api_key=key, steering_mode="off") as server:
        refused = deshift(*command, "--url", server.url)
        assert refused.exit_code == 1 and "with --api-key-env" in words(refused.output)
        monkeypatch.setenv("EVAL_KEY", key)
        result = deshift(*command, "--url", server.url, "--api-key-env", "EVAL_KEY")
    assert result.exit_code == 0, result.output
    assert all(key not in path.read_text() for path in out.iterdir() if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_has_kept_its_answers(
    number: signal.Signals, deshift: Deshift, suite: Path, tmp_path: Path
) -> None:
    """The server answers four requests, and the others only when the process has ended."""
    out, go_on, turns = tmp_path / "run", threading.Event(), itertools.count()

    def script(request: EngineRequest) -> Iterator[Step]:
        if next(turns) >= 4:
            yield go_on
        yield from says("Fine.")(request)

    command = ["--suite", str(suite), "--condition", "text-only", "--out", str(out)]
    command += ["--concurrency", "2"]
    with live_server(FakeEngine(script), MemoryStore(), steering_mode="off") as server:
        command += ["--url", server.url]
        with subprocess.Popen(
            [sys.executable, "-m", "server.cli", "eval", *command], stderr=subprocess.PIPE
        ) as process:
            path = out / "answers.jsonl"
            wait_until(lambda: path.exists() and path.read_text().count("\n") == 3, 120)
            process.send_signal(number)
            assert process.stderr is not None
            said = process.stderr.read().decode()
        go_on.set()
        if number == signal.SIGINT:
            assert process.returncode == 130 and "go on with --resume" in said
        result = deshift("eval", *command, "--resume")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == [f"n{n}" for n in range(5)]
    assert {row["answer"] for row in rows} == {"Fine."}


@pytest.mark.slow
def test_a_server_is_started_on_a_checkpoint_without_vectors(
    deshift: Deshift, checkpoint: Path, suite: Path, tmp_path: Path
) -> None:
    """Without its default policy, which steers by vectors and so would never be ready."""
    command: list[str | Path] = ["eval", "--serve", checkpoint, "--dtype", "float32"]
    command += ["--suite", suite, "--max-tokens", "2", "--logs", tmp_path]
    wanted = ["--condition", "base", "--condition", "sample:alpha=0.5"]
    result = deshift(*command, *wanted, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (
        len(json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["checkpoint"]) == 64
    )
    assert "10 requests, 0 of them" in result.output


def test_another_number_format_or_setting_is_another_run() -> None:
    """A run could be gone on with in another dtype, and its answers mixed in silence."""

    def setup(dtype: str = "float32", *settings: tuple[str, str], url: str | None = None) -> Any:
        demo = url is None
        return Place(url, demo, None, settings, dtype, Path("logs")).setup()

    rows, decoder = ("max_rows", "4"), ("decoder", "eager")
    setups = [setup(), setup("bfloat16"), setup("float32", rows), setup("float32", rows, decoder)]
    assert len(set(setups)) == 4
    assert setup("float32", decoder, rows) == setups[-1]
    assert setup(url="http://127.0.0.1:9") is None
