"""`deshift bench` from its command line against scripted servers."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server.cli.bench import bench
from tests.server.bench.fake_server import Script, fake_server
from tests.server.engine.conftest import wait_until
from tests.tiny_models import TinyModel

app = typer.Typer()
app.command()(bench)
runner = CliRunner(env={"COLUMNS": "200"})


def test_one_command_compares_servers_and_steering_and_writes_everything(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    other = Script(accepts=frozenset({"generation_config"}), refusal_status=422)
    with fake_server(Script(shift_ms=100)) as ours, fake_server(other) as theirs:
        result = runner.invoke(
            app,
            ["--url", f"ours={ours}/v1", "--url", f"theirs={theirs}"]
            + ["--steering", "ours=off,0.25,sample-warm", "--api-key", "theirs=secret-key"]
            + ["--streams", "1,2", "--rounds", "2", "--max-tokens", "4", "--json", str(written)]
            + ["--pause", "0.01"],
        )
    assert result.exit_code == 0, result.output
    assert "0.01 s of rest before each change of server" in " ".join(result.output.split())
    names = ["ours off", "ours 0.25", "ours sample-warm", "theirs"]
    assert all(name in result.output for name in names)
    assert "Ratio to ours off" in result.output
    assert "What steering costs a chat" in result.output
    report = json.loads(written.read_text())
    assert [target["name"] for target in report["targets"]] == names
    assert report["targets"][1]["extra"] == {"steering": {"mode": "dataset", "alpha": 0.25}}
    assert [target["dialect"] for target in report["targets"]] == ["ignore_eos"] * 3 + [
        "generation_config"
    ]
    assert len(report["cells"]) == 8 and len(report["comparisons"]) == 6
    assert report["cells"][0]["steering"] == ["mode=off"]
    by_name = {cell["target"]: cell for cell in report["cells"] if cell["num_streams"] == 1}
    shift = {
        name: cell["shift_ms"] and cell["shift_ms"]["median"] for name, cell in by_name.items()
    }
    assert shift == {"ours off": 0, "ours 0.25": 0, "ours sample-warm": 100, "theirs": None}
    more = report["comparisons"][1]["time_to_first_token_more_s"]
    assert report["comparisons"][1]["target"] == "ours sample-warm" and 0.08 < more["median"] < 0.3
    assert len(report["bursts"]) == 16
    assert report["machine"]["packages"]["torch"] and report["machine"]["load_average_after"]
    assert report["settings"]["pause_s"] == 0.01
    assert "secret-key" not in json.dumps(report["targets"])


@pytest.mark.parametrize(
    ("scenario", "title", "columns", "part", "figure"),
    [
        (
            "stalls",
            "while long prompts arrive",
            ["p99 with / median alone", "rounds", "at once"],
            "stalls",
            "worst",
        ),
        (
            "second-turn",
            "two questions about one picture",
            ["second / first", "conversations"],
            "second_turn",
            "ratio",
        ),
    ],
)
def test_a_scenario_has_its_own_table_and_part(
    scenario: str, title: str, columns: list[str], part: str, figure: str, tmp_path: Path
) -> None:
    written = tmp_path / "bench.json"
    with fake_server(Script(gap_s=0.01)) as url:
        result = runner.invoke(
            app,
            ["--scenario", scenario, "--url", f"ours={url}", "--steering", "ours=off,dataset"]
            + ["--streams", "2", "--rounds", "1", "--max-tokens", "24", "--json", str(written)]
            + ["--pause", "0", "--arrivals", "3"],
        )
    assert result.exit_code == 0, result.output
    assert title in " ".join(result.output.split())
    assert all(column in result.output for column in columns), result.output
    rows = json.loads(written.read_text())[part]
    assert [row["target"] for row in rows] == ["ours off", "ours dataset"]
    assert all(row[figure]["median"] > 0 for row in rows)
    assert part != "stalls" or [row["arrivals_at_once"] for row in rows] == [3, 3]


def test_a_failed_chat_makes_the_command_fail() -> None:
    with fake_server(Script(fail=True)) as url:
        result = runner.invoke(
            app, ["--url", f"x={url}", "--streams", "1", "--rounds", "1", "--pause", "0"]
        )
    assert result.exit_code == 1
    assert "1 failed: 503" in result.output


def test_mistakes_are_named() -> None:
    for arguments, words in [
        ([], "nothing to measure"),
        (["--url", "x=http://127.0.0.1:9", "--streams", "1,0"], "write for example 1,4,16"),
        (["--url", "http://127.0.0.1:9"], "write NAME=VALUE"),
        (["--url", "x=http://127.0.0.1:9", "--steering", "y=off"], "names no server: y"),
        (["--url", "x=http://127.0.0.1:9", "--steering", "x=on"], "'on' is not off, dataset"),
        (["--url", "x=http://127.0.0.1:9", "--scenario", "speed"], "is not one of: throughput"),
        (["--url", "x=http://127.0.0.1:9", "--dtype", "int4"], "is not one of: bfloat16"),
        (["--url", "x=http://127.0.0.1:9", "--baseline", "y"], "--baseline y is none of: x"),
        (["--url", "x=http://127.0.0.1:9", "--plain-sample"], "need a checkpoint"),
        (["--url", "x=http://127.0.0.1:9", "--generate"], "--generate needs a checkpoint"),
        (["--demo", "--shape", "llava-0.5b"], "give one"),
        (["--shape", "llava-70b"], "llava-70b is not one of: llava-0.5b, llava-1.5-7b"),
        (["--url", "x=http://127.0.0.1:9", "--model", "y=m"], "y is none of the servers: x"),
        (["--url", "x=http://127.0.0.1:9"], "ConnectError"),
    ]:
        result = runner.invoke(app, arguments)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), result.output


def test_memory_is_measured_of_started_servers_only() -> None:
    with fake_server(Script()) as url:
        result = runner.invoke(app, ["--url", f"x={url}", "--scenario", "memory"])
    assert result.exit_code == 1
    assert "x is a URL: use --serve, --demo or --shape" in " ".join(result.output.split())


@pytest.mark.slow
def test_transformers_serve_is_measured_beside_us_on_the_same_checkpoint(
    tiny_llava: TinyModel, tmp_path: Path
) -> None:
    """Both really run, and both produce exactly the tokens that were asked for."""
    model = tmp_path / "model"
    tiny_llava.save(model)
    written = tmp_path / "bench.json"
    result = runner.invoke(
        app,
        ["--serve", str(model), "--transformers-serve", "--dtype", "float32"]
        + ["--streams", "1,2", "--rounds", "1", "--max-tokens", "8", "--json", str(written)]
        + ["--logs", str(tmp_path)],
        env={"DESHIFT_STEERING_MODE": "off", "DESHIFT_CACHE": str(tmp_path)},
    )
    assert result.exit_code == 0, result.output
    report = json.loads(written.read_text())
    assert [(t["name"], t["dialect"]) for t in report["targets"]] == [
        ("deshift", "ignore_eos"),
        ("transformers", "generation_config"),
    ]
    for cell in report["cells"]:
        assert cell["counted_by"] == ["usage"]
        assert (cell["tokens_per_chat"]["low"], cell["tokens_per_chat"]["high"]) == (8, 8)
    prompts = [cell["prompt_tokens"]["median"] for cell in report["cells"]]
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3]
    assert len(report["settings"]["checkpoint"]) == 64
    assert set(report["footprints"]) == {"deshift", "transformers"}


@pytest.mark.slow
def test_the_papers_way_is_at_sample_level_whatever_the_policy_says(
    tiny_llava: TinyModel, tmp_path: Path
) -> None:
    """It was the dataset level's cost, unnoticed, once the demonstration's store had a policy."""
    tiny_llava.save(tmp_path / "model")
    written = tmp_path / "bench.json"
    result = runner.invoke(
        app,
        ["--serve", str(tmp_path / "model"), "--plain-sample", "--dtype", "float32"]
        + ["--steering", "deshift=off,sample-warm", "--streams", "1", "--rounds", "2"]
        + ["--max-tokens", "8", "--json", str(written), "--logs", str(tmp_path)],
        env={
            "DESHIFT_STEERING_MODE": "off",
            "DESHIFT_CLIENT_OVERRIDE": "any",
            "DESHIFT_CACHE": str(tmp_path),
        },
    )
    assert result.exit_code == 0, result.output
    modes = defaultdict(set)
    for burst in json.loads(written.read_text())["bursts"]:
        for record in burst["records"]:
            modes[burst["target"]].add(record["steering"].partition(";")[0])
    assert modes == {
        "deshift off": {"mode=off"},
        "deshift sample-warm": {"mode=sample"},
        "deshift plain-sample": {"mode=sample"},
    }


@pytest.mark.slow
def test_servers_end_with_a_bench_that_is_told_to(tiny_llava: TinyModel, tmp_path: Path) -> None:
    """A bench that SIGTERM ended had left its servers running."""
    tiny_llava.save(tmp_path / "model")
    command = [sys.executable, "-m", "server.cli", "bench", "--serve", str(tmp_path / "model")]
    command += ["--dtype", "float32", "--rounds", "100000", "--logs", str(tmp_path)]
    env = {**os.environ, "DESHIFT_STEERING_MODE": "off", "DESHIFT_CACHE": str(tmp_path)}

    def children(pid: int) -> list[int]:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "deshift.log"
        wait_until(lambda: log.exists() and log.stat().st_size > 0, timeout_s=60)
        [server] = children(process.pid)
        process.terminate()
        process.wait(60)
    assert not Path(f"/proc/{server}").exists()
