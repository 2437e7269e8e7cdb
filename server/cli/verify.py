"""`deshift verify`: does steering really do here what it says?"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from server.cli import server_options
from server.cli.options import console, pairs
from server.errors import ConfigError

if TYPE_CHECKING:  # what they import takes seconds
    from server.verify.check import Check
    from server.verify.server import Findings
    from server.verify.site import Site

ROUNDS_OF_AN_INTERVAL = 6  # of 95 %


def verify(
    url: server_options.Url = None,
    serve: Annotated[
        Path | None,
        typer.Option(
            help="A model directory: looked at in this process, then served, with the "
            "environment's settings.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The same with the demonstration model.")
    ] = False,
    setting: server_options.Setting = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of a started server; of a running one, if known.")
    ] = "auto",
    model: server_options.Model = None,
    api_key_env: server_options.ApiKeyEnv = None,
    admin_url: Annotated[
        str | None, typer.Option(help="The server's admin listener, for its counters.")
    ] = None,
    client_override: Annotated[
        Literal["none", "strengthen", "any"] | None,
        typer.Option(help="Fail unless requests may change the steering just so far."),
    ] = None,
    max_relative_dose: Annotated[
        float | None,
        typer.Option(help="The cap of a running server's policy.", min=0.0),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of the overhead table; 0 leaves it out.")
    ] = ROUNDS_OF_AN_INTERVAL,
    max_overhead: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Fail where dataset level surely costs more than this share of time to first "
            "token or decode step: 0.05.",
            metavar="SHARE",
        ),
    ] = None,
    json_path: server_options.JsonPath = None,
    logs: server_options.Logs = Path(".deshift/verify"),
) -> None:
    """Check that steering does what the server says, and end with 0 only if nothing failed.

    A model directory: every layer moves by alpha w Delta, as on the bare model; every spelling of
    alpha 0 gives equal logits; earlier prompt tokens stay as they were.

    A server, by HTTP and log-probabilities: the first request is steered, steering changes
    something and nothing at alpha 0, rows of a batch do not leak, the prefix cache is clean;
    header, body and chunks agree; overrides, dose and counters. What the policy forbids to ask is
    skipped with the reason. Tolerances: 3 times the noise of equal requests in this run, at least
    1e-4 in float32 and 0.05 in the halves. About a hundred short requests.

    The overhead table informs; --max-overhead makes it a check.
    """
    if sum((url is not None, demo, serve is not None)) != 1:
        raise typer.BadParameter("give one of --url, --serve and --demo")
    if url is None and (api_key_env or admin_url or max_relative_dose is not None):
        raise typer.BadParameter("--api-key-env, --admin-url, --max-relative-dose go with --url")
    if url is not None and setting:
        raise typer.BadParameter("--setting is for a server that is started here")
    if max_overhead is not None and rounds < ROUNDS_OF_AN_INTERVAL:
        raise typer.BadParameter(f"--max-overhead needs --rounds {ROUNDS_OF_AN_INTERVAL} or more")
    screen = console()
    run = _Run(screen, model, client_override, rounds, max_overhead)
    with ExitStack() as stack:
        if url is not None:
            from server.verify.site import running

            key = _key(api_key_env)
            site = running(url, key, admin_url, max_relative_dose, dtype)
        else:
            site = run.started(stack, serve, pairs(setting, "--setting"), dtype, logs)
        findings = asyncio.run(run.of_server(site))
    run.checked(findings.checks, f"The server at {site.url}, over HTTP")
    for drawn in findings.tables:
        screen.print(drawn)
    run.finish(json_path, site, findings)


@dataclass
class _Run:
    """The parts of one run. checks: all so far."""

    screen: Console
    model: str | None
    client_override: Literal["none", "strengthen", "any"] | None
    rounds: int
    max_overhead: float | None
    checks: "list[Check]" = field(default_factory=list)

    def started(
        self,
        stack: ExitStack,
        serve: Path | None,
        settings: list[tuple[str, str]],
        dtype: str,
        logs: Path,
    ) -> "Site":
        """The model's own checks, then its server."""
        from server.verify.site import Directory, in_process, start

        with self._progress() as progress:
            directory = Directory(serve, settings, dtype)
            checks, to_serve = in_process(directory, progress)
        self.checked(checks, "The model with its vectors, in this process")
        self.screen.print(f"Starting the server (its log: {logs}/verify.log)", markup=False)
        return start(stack, to_serve, logs)

    async def of_server(self, site: "Site") -> "Findings":
        from server.verify.server import verify_server

        with self._progress() as progress:
            return await verify_server(
                site,
                self.model,
                client_override=self.client_override,
                rounds=self.rounds,
                max_overhead=self.max_overhead,
                progress=progress,
            )

    def checked(self, checks: "list[Check]", title: str) -> None:
        from server.verify.report import table

        self.checks += checks
        self.screen.print(table(checks, title))

    def finish(self, json_path: Path | None, site: "Site", findings: "Findings") -> None:
        """Write the file; leave with 1 unless it is verified."""
        from server.bench import machine
        from server.verify.check import is_verified
        from server.verify.report import as_json

        if json_path is not None:
            told = {
                "url": site.url,
                "dtype": findings.dtype,
                "checkpoint": site.checkpoint,
                "ready": findings.ready,
                "machine": machine.describe(),
            }
            json_path.write_text(as_json(self.checks, told))
        count = {status: 0 for status in ("ok", "failed", "skipped")}
        for check in self.checks:
            count[check.status] += 1
        self.screen.print(", ".join(f"{number} {status}" for status, number in count.items()))
        if not is_verified(self.checks):
            raise typer.Exit(1)

    @contextmanager
    def _progress(self) -> "Iterator[Callable[[str], None]]":
        with self.screen.status("") as status:
            yield lambda what: status.update(what)


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"--api-key-env: the environment has no {variable}")
    return key
