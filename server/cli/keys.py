"""`deshift keys`: the API keys of a tenant.

A new key is shown once. It is all that stands on standard output, so that it can be piped into
where it is kept; the rest is said on standard error.
"""

import time
from typing import Annotated

import typer
from rich.table import Table

from server.cli.control import (
    AdminStoreOption,
    ByOption,
    ReasonOption,
    RevisionOption,
    TenantArgument,
    author,
    duration,
    operate,
)
from server.cli.display import cell, lasting, moment, table
from server.cli.options import JsonOption, console, print_json
from server.control import NewKey, TenantState
from server.documents import KeyRecord

keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")

KeyArgument = Annotated[str, typer.Argument(help="The key's name.", metavar="KEY_ID")]


@keys.command("list")
def list_keys(
    tenant: TenantArgument, store: AdminStoreOption = None, as_json: JsonOption = False
) -> None:
    """List a tenant's keys, also those whose time is over; the keys themselves are not kept."""
    held = operate(store, lambda control: control.tenant(tenant))
    now = time.time()
    if as_json:
        print_json(keys_as_json(held, now))
    elif held.keys:
        printer = console()
        printer.print(keys_table(held, now))
        printer.print(f"revision {held.keys_revision}")
    else:
        console().print(cell(f"no keys yet: deshift keys create {tenant} KEY_ID makes one"))


@keys.command()
def create(
    tenant: TenantArgument,
    key_id: KeyArgument,
    reason: ReasonOption,
    expires: Annotated[
        float | None,
        typer.Option(parser=duration, help="How long it is good for: 30d.", metavar="DURATION"),
    ] = None,
    revision: RevisionOption = None,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once."""
    who = author(by, reason)
    made = operate(
        store, lambda control: control.create_key(tenant, key_id, who, expires, revision)
    )
    _print_new(tenant, made, as_json)


@keys.command()
def rotate(
    tenant: TenantArgument,
    key_id: KeyArgument,
    new_id: Annotated[str, typer.Argument(help="The new key's name.", metavar="NEW_ID")],
    overlap: Annotated[
        float,
        typer.Option(
            parser=duration, help="How long the old key stays good: 1h, 0s.", metavar="DURATION"
        ),
    ],
    reason: ReasonOption,
    revision: RevisionOption = None,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key in place of another and print it, this once."""
    who = author(by, reason)
    made = operate(
        store,
        lambda control: control.rotate_key(tenant, key_id, new_id, who, overlap, revision),
    )
    until = "no longer good" if overlap == 0 else f"good for {lasting(overlap)} more at most"
    typer.echo(f"the key {key_id} is {until}", err=True)
    _print_new(tenant, made, as_json)


@keys.command()
def revoke(
    tenant: TenantArgument,
    key_id: KeyArgument,
    reason: ReasonOption,
    revision: RevisionOption = None,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a key now."""
    who = author(by, reason)
    done = operate(store, lambda control: control.revoke_key(tenant, key_id, who, revision))
    if as_json:
        print_json({"tenant": tenant, "id": key_id, "revision": done})
    else:
        console().print(cell(f"the key {key_id} of {tenant} has ended, revision {done}"))


def keys_table(tenant: TenantState, now: float) -> Table:
    rows = table("key", "created", "expires", "state")
    for key in tenant.keys:
        state = _state(key, now)
        expires = "never" if key.expires_at is None else moment(key.expires_at)
        style = "dim" if state == "ended" else ""
        rows.add_row(
            *(cell(each, style) for each in (key.id, moment(key.created_at), expires, state))
        )
    return rows


def keys_as_json(tenant: TenantState, now: float) -> list[dict[str, object]]:
    """Without the digests, which are of no use to a reader."""
    return [
        {**key.model_dump(exclude={"digest"}), "is_valid": key.is_valid(now)} for key in tenant.keys
    ]


def _state(key: KeyRecord, now: float) -> str:
    if not key.is_valid(now):
        return "ended"
    return "good" if key.expires_at is None else f"good for {lasting(key.expires_at - now)}"


def _print_new(tenant: str, made: NewKey, as_json: bool) -> None:
    record = made.record
    end = "" if record.expires_at is None else f", good until {moment(record.expires_at)}"
    typer.echo(f"key {record.id} of {tenant}, revision {made.revision}{end}", err=True)
    typer.echo("It is shown this once, and kept nowhere:", err=True)
    if as_json:
        told = {"tenant": tenant, "id": record.id, "key": made.text}
        print_json({**told, "expires_at": record.expires_at, "revision": made.revision})
    else:
        typer.echo(made.text)
