"""`deshift bench` from its command line against scripted servers."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server.cli.bench import bench
from tests.server.bench.fake_server import Script, fake_server
from tests.tiny_models import TinyModel

app = typer.Typer()
app.command()(bench)
runner = CliRunner(env={"COLUMNS": "200"})


def test_one_command_compares_servers_and_steering_and_writes_everything(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    other = Script(accepts=frozenset({"generation_config"}), refusal_status=422)
    with fake_server(Script()) as ours, fake_server(other) as theirs:
        result = runner.invoke(
            app,
            ["--url", f"ours={ours}/v1", "--url", f"theirs={theirs}", "--steering", "ours=off,0.25"]
            + ["--streams", "1,2", "--rounds", "2", "--max-tokens", "4", "--json", str(written)]
            + ["--api-key", "theirs=secret-key"],
        )
    assert result.exit_code == 0, result.output
    assert "ours off" in result.output and "ours 0.25" in result.output
    assert "Ratio to ours off" in result.output
    report = json.loads(written.read_text())
    assert [target["name"] for target in report["targets"]] == ["ours off", "ours 0.25", "theirs"]
    assert report["targets"][1]["extra"] == {"steering": {"mode": "dataset", "alpha": 0.25}}
    assert [target["dialect"] for target in report["targets"]] == ["ignore_eos"] * 2 + [
        "generation_config"
    ]
    assert len(report["cells"]) == 6 and len(report["comparisons"]) == 4
    assert report["cells"][0]["steering"] == ["mode=off"]
    assert len(report["bursts"]) == 12
    assert report["machine"]["packages"]["torch"]
    assert "secret-key" not in json.dumps(report["targets"])


def test_a_failed_chat_makes_the_command_fail() -> None:
    with fake_server(Script(fail=True)) as url:
        result = runner.invoke(app, ["--url", f"x={url}", "--streams", "1", "--rounds", "1"])
    assert result.exit_code == 1
    assert "1 failed: 503" in result.output


def test_mistakes_are_named() -> None:
    for arguments, words in [
        ([], "nothing to measure"),
        (["--url", "x=http://127.0.0.1:9", "--streams", "1,0"], "write for example 1,4,16"),
        (["--url", "http://127.0.0.1:9"], "write NAME=VALUE"),
        (["--url", "x=http://127.0.0.1:9", "--steering", "y=off"], "names no server: y"),
        (["--url", "x=http://127.0.0.1:9", "--steering", "x=on"], "'on' is not off, dataset"),
        (["--url", "x=http://127.0.0.1:9", "--model", "y=m"], "y is none of the servers: x"),
        (["--url", "x=http://127.0.0.1:9"], "ConnectError"),
    ]:
        result = runner.invoke(app, arguments)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), result.output


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
        ["--serve", str(model), "--transformers-serve", str(model), "--dtype", "float32"]
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
    assert list(report["settings"]["checkpoints"]) == [str(model)]
