"""`deshift audit`: who changed what, when and why; and taking a change back."""

from dataclasses import asdict
from typing import Annotated

import typer

from server.cli.control import AdminStoreOption, ByOption, ReasonOption, author, operate
from server.cli.display import cell, change_lines, moment, table
from server.cli.options import JsonOption, console, print_json
from server.control import AuditEntry

audit = typer.Typer(
    invoke_without_command=True, help="Every change: who, when, what and why; reverting one."
)


@audit.callback()
def show(
    context: typer.Context,
    tenant: Annotated[
        str | None, typer.Option(help="Changes of its policy and keys only.", metavar="NAME")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 20,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the newest changes."""
    if context.invoked_subcommand is not None:
        return
    entries = operate(store, lambda control: control.audit(limit, tenant=tenant))
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    if not entries:
        console().print("no changes yet")
        return
    rows = table("revision", "when", "who", "what", "why")
    rows.show_lines = True
    for entry in entries:
        rows.add_row(*map(cell, _row(entry)))
    console().print(rows)


@audit.command()
def revert(
    revision: Annotated[
        int, typer.Argument(help="Of the change that is taken back.", min=1, metavar="REVISION")
    ],
    reason: ReasonOption,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring back what a change replaced, unless it was changed again since."""
    who = author(by, reason)
    done = operate(store, lambda control: control.revert(revision, who))
    if as_json:
        print_json({"reverted": revision, "revision": done})
    else:
        console().print(cell(f"revision {revision} is taken back by revision {done}"))


def _row(entry: AuditEntry) -> tuple[object, ...]:
    changes = [line for change in entry.changes for line in change_lines(change)]
    return (
        entry.revision,
        moment(entry.at).replace(" ", "\n"),
        f"{entry.by}\nby {entry.via}",
        "\n".join([entry.action, *changes]),
        entry.reason,
    )
