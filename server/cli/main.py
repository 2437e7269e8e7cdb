"""The root of the `deshift` command: puts the groups together and words their errors.

A subcommand imports what is heavy when it runs, so that `--help` and `vectors list` are quick.
"""

import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from server.cli.audit import audit
from server.cli.bench import bench
from server.cli.calibrate import calibrate
from server.cli.demo import demo
from server.cli.evaluate import evaluate
from server.cli.extract import extract
from server.cli.keys import keys
from server.cli.kill import kill
from server.cli.memory import with_huge_pages
from server.cli.policy import policy
from server.cli.replicas import replicas
from server.cli.report import report
from server.cli.serve import serve
from server.cli.tenants import tenants
from server.cli.vectors import vectors
from server.cli.verify import verify
from server.engine.types import EngineError
from server.errors import ServerError
from steering.errors import SteeringError


class _Root(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """What this project raises on purpose is one line on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except (SteeringError, ServerError, EngineError) as error:
            typer.echo(f"deshift: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve vision-language models with the safety of their own language model.",
)
app.command()(serve)
app.command()(extract)
app.add_typer(vectors, name="vectors")
app.add_typer(tenants, name="tenants")
app.add_typer(keys, name="keys")
app.add_typer(policy, name="policy")
app.add_typer(audit, name="audit")
app.command()(kill)
app.command()(replicas)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(report)
app.command()(verify)
app.command()(demo)


def run() -> None:
    """The `deshift` command."""
    if sys.argv[1:2] == ["serve"]:
        with_huge_pages()
    # As Ctrl-C: servers that a command has started end with it, and a container's first process is
    # not ended by a signal that nobody handles. A server that listens handles it itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
