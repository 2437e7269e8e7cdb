"""A server's checks in order, its counters around them, and what steering costs at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from PIL import Image
from rich.table import Table

from server.bench.prompts import Prompts
from server.bench.target import BenchError, Target
from server.verify import overhead
from server.verify.access import Override
from server.verify.check import Check, FailedError, Finding, SkippedError, check
from server.verify.client import Asker, connect
from server.verify.counters import Counters, counted, scrape
from server.verify.overhead import Overhead
from server.verify.remote import WOULD_ALLOW, Remote
from server.verify.site import UNKNOWN_DTYPE, Site

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Findings:
    """ready: what /ready said; tables: of the overhead."""

    checks: list[Check]
    dtype: str
    ready: Mapping[str, Any]
    tables: list[Table]


async def verify_server(
    site: Site,
    model: str | None,
    *,
    client_override: Override | None,
    rounds: int,
    max_overhead: float | None,
    progress: Progress,
) -> Findings:
    """Raises VerifyError where there is nothing to verify."""
    async with site.client() as client, site.admin_client() as admin:
        asker, ready = await connect(client, model)
        before = await scrape(admin) if site.admin_url else None
        dtype = site.dtype
        if before is not None and dtype == UNKNOWN_DTYPE:
            dtype = before.label("deshift_replica_info", "dtype") or dtype
        remote = Remote(asker, dtype, max_dose=site.max_dose, expected_override=client_override)
        checks = await remote.run(progress)
        after = await scrape(admin) if before is not None else None
        checks.append(check("counters", lambda: _counters(site, before, after, asker)))
        measured: Overhead | str = "not asked for: --rounds 0"
        if rounds:
            target = Target("server", site.url, model=asker.model, api_key=site.api_key)
            measured = await _overhead(client, target, asker, remote, rounds, progress)
        checks.append(check("overhead", lambda: _cost(measured, max_overhead)))
    tables = [] if isinstance(measured, str) else measured.tables
    return Findings(checks, dtype, ready, tables)


def _counters(site: Site, before: Counters | None, after: Counters | None, asker: Asker) -> Finding:
    if before is None or after is None:
        raise SkippedError("nobody said where the admin listener is: --admin-url")
    return counted(before, after, asker, is_alone=site.is_own)


async def _overhead(
    client: Any, target: Target, asker: Asker, remote: Remote, rounds: int, progress: Progress
) -> Overhead | str:
    """Or why it was not measured."""
    access = remote.access
    if not access.may_unsteer:
        return WOULD_ALLOW
    with (resources.files("server.demo") / "photo.jpg").open("rb") as file:
        prompts = Prompts(Image.open(file).convert("RGB"), asker.start)
    try:
        return await overhead.measure(
            client,
            target,
            prompts,
            rounds=rounds,
            has_sample=access.has_sample,
            progress=progress,
        )
    except BenchError as error:
        return str(error)


def _cost(measured: Overhead | str, max_overhead: float | None) -> Finding:
    if not isinstance(measured, str):
        return overhead.judged(measured, max_overhead)
    if max_overhead is not None:
        raise FailedError(f"--max-overhead was given, and nothing was measured: {measured}")
    raise SkippedError(measured)
