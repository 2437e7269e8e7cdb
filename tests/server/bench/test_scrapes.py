"""Scenario `scrapes`: real listeners, tenants and /metrics; a scripted engine."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from server.bench import scrapes
from server.bench.effort import Effort
from server.bench.fleet import Fleet
from server.bench.load import Served
from server.bench.prompts import Prompts
from server.bench.scrapes import Scrapes, tables_of
from server.bench.summary import Interval, Spread
from server.bench.target import BenchError
from server.cli.bench import bench
from server.engine.types import EngineRequest
from server.process import free_port
from tests.server.bench.scripted_fleet import needs_redis, scripted_fleet
from tests.server.fakes import Step, says

NUM_TENANTS = 3
GAP_S = 0.005
app = typer.Typer()
app.command()(bench)


def slowly(request: EngineRequest) -> Iterator[Step]:
    """Eight words, a gap before each."""
    for step in says(*(f"word{number} " for number in range(8)))(request):
        time.sleep(GAP_S)
        yield step


async def measured(found: Fleet, steps: list[str]) -> Scrapes:
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        return await scrapes.measure(
            found,
            Served(client, found.targets[0]),
            Prompts(Image.new("RGB", (48, 32), "teal")),
            Effort(streams=[2], rounds=2, max_tokens=6),
            steps.append,
        )


def text_of_metrics(found: Fleet) -> str:
    response = httpx.get(f"{found.admin_urls[0]}/metrics", trust_env=False)
    response.raise_for_status()
    return response.text


@needs_redis
def test_every_tenant_has_traffic_in_its_modes_before_the_first_scrape(tmp_path: Path) -> None:
    steps: list[str] = []
    with scripted_fleet(tmp_path, ["replica-A"], NUM_TENANTS, slowly) as found:
        result = asyncio.run(measured(found, steps))
        text = text_of_metrics(found)
    assert result.num_failed == 0, result.first_error
    for number in range(NUM_TENANTS):
        for mode in ("sample", "off"):  # the policy's own is sample, too
            assert f'tenant="tenant-{number}",mode="{mode}"' in text, text
    assert steps.count("traffic of every tenant") == 3 * NUM_TENANTS
    assert steps.count("with scrapes") == steps.count("without") == 3
    assert result.num_tenants == NUM_TENANTS and result.num_streams == 2
    assert result.num_lines > 100 and result.num_bytes > 10 * result.num_lines
    assert result.idle is not None and result.idle.n == scrapes.NUM_IDLE
    assert result.beside is not None and result.beside.n >= 3  # one of each half at least
    assert result.quiet is not None and result.quiet.median >= GAP_S / 2
    assert result.slower is not None and result.slower.n == 2
    assert result.worst is not None and result.worst.low > 0


@needs_redis
def test_a_replica_without_metrics_is_named(tmp_path: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with scripted_fleet(tmp_path, ["replica-A"], 1) as found:
        broken = replace(found, admin_urls=(gone,))
        with pytest.raises(BenchError, match=f"{gone}/metrics: ConnectError"):
            asyncio.run(measured(broken, []))


def test_the_tables_hold_what_was_measured() -> None:
    result = Scrapes(
        num_tenants=200,
        num_lines=14_045,
        num_bytes=1_638_400,
        first_s=0.0316,
        idle=Spread(0.016, 0.014, 0.019, 0.025, 40),
        beside=None,
        num_streams=4,
        quiet=Spread(0.020, 0.019, 0.021, 0.030, 900),
        scraped=Spread(0.021, 0.019, 0.022, 0.050, 900),
        slower=Interval(1.01, 0.99, 1.03, 0.97, 6),
        worst=Interval(1.5, 1.2, 1.9, 0.97, 6),
        num_failed=0,
        first_error="",
    )
    tables = tables_of(result)
    rows = [list(zip(*(column.cells for column in table.columns), strict=True)) for table in tables]
    assert rows == [
        [("200", "14045", "1600", "31.6", "16.0 (14.0-19.0) / 25.0", "-")],
        [
            ("4", "deshift", "20.0 / 30.0", "21.0 / 50.0", "1.010 (0.990-1.030)")
            + ("1.500 (1.200-1.900)", "6")
        ],
    ]


def test_what_it_cannot_measure_is_said() -> None:
    arguments = ["--scenario", "scrapes", "--url", "x=http://127.0.0.1:9"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "scrapes measures replicas and nothing else" in " ".join(result.output.split())
