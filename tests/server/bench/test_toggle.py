"""Scenario `toggle`: its figures, the ways of changing, and a run on real listeners and a Redis."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from server.bench import admission, fleet, toggle
from server.bench.effort import Effort
from server.bench.fleet import Fleet
from server.bench.load import Served
from server.bench.prompts import Prompts
from server.bench.store_cost import StoreCost
from server.bench.stream import StreamRecord
from server.bench.target import BenchError
from server.bench.toggle_figures import Asked, Change, Latency, Toggle, figures_of, tables_of
from server.bench.ways import form_fields
from server.cli.bench import bench
from server.process import free_port
from tests.server.bench.scripted_fleet import ADMIN_KEY, POLICY, needs_redis, scripted_fleet
from tests.tiny_models import TinyModel

app = typer.Typer()
app.command()(bench)


def change(revision: int, *, sent: float, committed: float, applied: tuple[float, ...]) -> Change:
    return Change("API", revision, sent, committed, applied)


def asked(replica: int, at: float, *revisions: int | None) -> Asked:
    return Asked(replica, at, StreamRecord(revisions=revisions))


def test_a_change_is_in_force_when_the_last_replica_has_it() -> None:
    made = change(7, sent=10.0, committed=10.25, applied=(10.5, 11.0))
    assert (made.from_sent_s, made.from_commit_s) == (1.0, 0.75)


def test_the_99th_percentile_of_200_leaves_out_two() -> None:
    found = Latency.of([float(n) for n in range(1, 201)])
    assert found == Latency(median=100.5, p99=198.0, maximum=200.0, n=200)
    assert Latency.of([]) is None


def test_an_answer_of_two_revisions_or_of_none_is_mixed() -> None:
    assert not asked(0, 1.0, 7).is_mixed
    assert asked(0, 1.0, 7, 8).is_mixed
    assert asked(0, 1.0, 7, None).is_mixed
    assert asked(0, 1.0).is_mixed


def test_an_answer_is_behind_only_what_its_own_replica_had_in_force() -> None:
    changes = [
        change(7, sent=0.0, committed=0.0, applied=(1.0, 3.0)),
        change(8, sent=4.0, committed=4.0, applied=(5.0, 6.0)),
    ]
    assert asked(0, 2.0, 6).is_behind(changes)
    assert not asked(1, 2.0, 6).is_behind(changes)
    assert not asked(0, 4.5, 8).is_behind(changes)  # admitted after it was sent
    assert asked(1, 6.5, 7).is_behind(changes)


def test_a_form_is_sent_back_as_a_browser_would() -> None:
    page = """
    <form action="/sign-out"><input name="csrf" value="other"></form>
    <form method="post" action="/tenants/a/policy#policy">
    <input type="hidden" name="csrf" value="t"><input name="revision" value="4">
    <select name="mode"><option>off</option>
    <option selected>data&amp;set</option></select>
    <select name="lasts"><option value="" selected>no end</option></select></form>
    <form action="/tenants/a/delete"><input name="revision" value="9"></form>"""
    found = {"csrf": "t", "revision": "4", "mode": "data&set", "lasts": ""}
    assert form_fields(page, "/tenants/a/policy") == found
    with pytest.raises(BenchError, match="no form for /tenants/b/policy"):
        form_fields(page, "/tenants/b/policy")


def test_admission_goes_through_every_tenants_key_and_policy() -> None:
    found = admission.measure(POLICY, num_tenants=5, num_calls=20)
    assert (found.num_tenants, found.admit.n, found.take_up.n) == (5, 20, 20)
    assert 0 < found.admit.median < 0.01


def test_the_tables_hold_what_was_measured() -> None:
    """The processes' changes are not among all, since most of their time is Python's start."""
    quick = change(7, sent=0.0, committed=0.010, applied=(0.020, 0.030))
    slow = replace(quick, way="deshift policy set", sent_at=-5.0)
    there = admission.measure(POLICY, num_tenants=2, num_calls=3)
    result = Toggle(
        changes=(quick, replace(quick, way="console", sent_at=-0.01)),
        processes=(slow,),
        num_streams=8,
        load_s=61.2,
        num_answered=90,
        num_failed=3,
        first_error="503: no room",
        num_mixed=2,
        num_behind=1,
        store_costs=(StoreCost(2, 20, 12.5, 2345.6),),
        admissions=(there,),
    )
    tables = tables_of(result)
    rows = [list(zip(*(column.cells for column in table.columns), strict=True)) for table in tables]
    assert rows[0] == [
        ("1", "API", "30.0 / 30.0 / 30.0", "20.0 / 20.0 / 20.0"),
        ("1", "console", "40.0 / 40.0 / 40.0", "20.0 / 20.0 / 20.0"),
        ("2", "all", "35.0 / 40.0 / 40.0", "20.0 / 20.0 / 20.0"),
        ("1", "deshift policy set", "5030.0 / 5030.0 / 5030.0", "20.0 / 20.0 / 20.0"),
    ]
    assert rows[1] == [("8", "61", "90", "3: 503: no room", "2", "1")]
    assert rows[2][0][0] == "2" and rows[2][0][3:] == ("12.5", "2346")
    figures = figures_of(result)
    assert figures["in_force"]["all"]["from_sent_s"]["maximum"] == pytest.approx(0.04)
    assert len(figures["changes"]) == 2 and json.dumps(figures)


async def measured(found: Fleet, num_processes: int = 1) -> Toggle:
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        return await toggle.measure(
            found,
            [Served(client, target) for target in found.targets],
            Prompts(Image.new("RGB", (48, 32), "teal")),
            Effort(streams=[2], max_tokens=8, num_changes=6),
            lambda _: None,
            num_tenants=10,
            num_processes=num_processes,
            num_counted=3,
        )


@needs_redis
@pytest.mark.slow
def test_every_way_changes_both_replicas_under_load(tmp_path: Path) -> None:
    with scripted_fleet(tmp_path) as found:
        result = asyncio.run(measured(found))
    assert [len(made) for made in result.by_way.values()] == [2, 2, 2, 6, 1]
    assert list(result.by_way) == ["API", "command", "console", "all", "deshift policy set"]
    revisions = [made.revision for made in (*result.changes, *result.processes)]
    assert revisions == list(range(revisions[0], revisions[0] + 7))
    for made in (*result.changes, *result.processes):
        assert made.sent_at < made.committed_at < min(made.applied_at) <= max(made.applied_at)
        assert len(made.applied_at) == 2
    assert result.num_answered > 2
    assert (result.num_failed, result.num_mixed, result.num_behind) == (0, 0, 0), result.first_error
    assert [cost.num_tenants for cost in result.store_costs] == [1, 11]
    assert all(cost.commands > 5 and cost.sent_bytes > 100 for cost in result.store_costs)


@needs_redis
def test_a_replica_that_is_gone_ends_the_run_with_a_message(tmp_path: Path) -> None:
    with scripted_fleet(tmp_path) as found:
        gone = (found.admin_urls[0], f"http://127.0.0.1:{free_port()}")
        broken = replace(found, admin_urls=gone)
        with pytest.raises(BenchError, match="the fleet does not answer: ConnectError"):
            asyncio.run(measured(broken, num_processes=0))


@needs_redis
def test_requests_that_are_refused_are_counted_as_dropped(tmp_path: Path) -> None:
    with scripted_fleet(tmp_path) as found:
        wrong = tuple(replace(target, api_key="dsk-unknown") for target in found.targets)
        result = asyncio.run(measured(replace(found, targets=wrong), num_processes=0))
    assert result.num_answered == 0 and result.num_failed >= 2
    assert result.first_error.startswith("401") and not result.processes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --serve, --demo or --shape"),
        (["--url", "x=http://127.0.0.1:9"], "measures replicas and nothing else"),
    ],
)
def test_what_it_cannot_measure_is_said(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["--scenario", "toggle", *arguments])
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_without_redis_server_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="needs the program redis-server in PATH"):
        fleet.redis_server(tmp_path, tmp_path / "log").__enter__()


@needs_redis
@pytest.mark.slow
def test_the_command_starts_replicas_and_reports(tiny_llava: TinyModel, tmp_path: Path) -> None:
    tiny_llava.save(tmp_path / "model")
    written = tmp_path / "bench.json"
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        app,
        ["--scenario", "toggle", "--serve", str(tmp_path / "model"), "--dtype", "float32"]
        + ["--changes", "3", "--streams", "2", "--max-tokens", "8", "--json", str(written)]
        + ["--logs", str(tmp_path)],
        env={"DESHIFT_STEERING_MODE": "sample", "DESHIFT_CACHE": str(tmp_path)},
    )
    assert result.exit_code == 0, result.output
    assert "A tenant's alpha in force on every replica" in " ".join(result.output.split())
    text = written.read_text()
    assert "dsk-" not in text and ADMIN_KEY not in text
    report = json.loads(text)
    assert report["toggle"]["in_force"]["all"]["from_sent_s"]["n"] == 3
    assert report["settings"]["changes"] == 3
    assert [target["name"] for target in report["targets"]] == ["replica A", "replica B"]
