"""`deshift policy`: what a tenant's requests get, and what changed since a revision."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

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
from server.cli.display import cell, lasting, moment, shown, table
from server.cli.options import JsonOption, console, print_json
from server.cli.policy_options import changed, fields_in, with_policy_options
from server.control import Control, TenantState
from server.documents import TENANT_PREFIX, PolicyFields, TenantDocument, Until, parse
from server.errors import InvalidRequestError, NoSuchTenantError

_PAGE = 50  # commits that are looked through at a time

policy = typer.Typer(no_args_is_help=True, help="Policies of tenants.")


@policy.command()
def show(
    tenant: TenantArgument, store: AdminStoreOption = None, as_json: JsonOption = False
) -> None:
    """Show the policy that is in force."""
    held = operate(store, lambda control: control.tenant(tenant))
    now = time.time()
    if as_json:
        print_json(policy_as_json(held, now))
        return
    console().print(policy_table(held, now))


@policy.command("set")
@with_policy_options
def set_policy(
    tenant: TenantArgument,
    reason: ReasonOption,
    given: dict[str, str],
    lasts: Annotated[
        float | None,
        typer.Option(
            "--for",
            parser=duration,
            help="Fall back to what is in force now after that time: 30m.",
            metavar="DURATION",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSON with fields of a policy, or with them as `policy`, as `deshift calibrate` "
            "writes it; other options win.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    permanent: Annotated[
        bool,
        typer.Option(
            "--permanent",
            help="Where a temporary policy is in force: let it stay, with what is changed; "
            "with --for, fall back to it.",
        ),
    ] = False,
    revision: RevisionOption = None,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is given and nothing else; requests that come from then on get it."""
    wishes: dict[str, Any] = (fields_in(file) if file else {}) | given
    if not wishes and not permanent:
        raise typer.BadParameter("say what to change, for example --alpha 0.8")
    who, now = author(by, reason), time.time()

    async def change(control: Control) -> tuple[TenantState, PolicyFields, int]:
        held = await control.tenant(tenant)
        if not permanent:
            _check_lasting(held, now)
        wanted = changed(held.document.in_force(now), wishes)
        expected = held.revision if revision is None else revision
        return held, wanted, await control.set_policy(tenant, wanted, expected, who, lasts)

    held, wanted, done = operate(store, change)
    changes = _changes(held.document.in_force(now), wanted)
    if as_json:
        told = {"tenant": tenant, "revision_before": held.revision, "revision": done}
        print_json({**told, "for_s": lasts, "changes": changes})
        return
    printer = console()
    if done == held.revision:
        printer.print(cell(f"nothing to change: {tenant} stays at revision {done}"))
        return
    printer.print(cell(f"policy of {tenant}: revision {held.revision} -> {done}"))
    if changes:
        printer.print(_changes_table(changes, "before", "after"))
    if lasts is not None:
        printer.print(f"for {lasting(lasts)}, then back to what was in force before")


@policy.command()
def diff(
    tenant: TenantArgument,
    revision: Annotated[
        int, typer.Argument(help="An earlier revision.", min=1, metavar="REVISION")
    ],
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the policy as it was at a revision with the one that is in force now."""

    async def both(control: Control) -> tuple[TenantDocument, TenantState]:
        return await _document_at(control, tenant, revision), await control.tenant(tenant)

    then, held = operate(store, both)
    changes = _changes(then.policy, held.document.in_force(time.time()))
    if as_json:
        print_json({"tenant": tenant, "from": revision, "to": held.revision, "changes": changes})
    elif changes:
        headings = f"revision {revision}", f"now (revision {held.revision})"
        console().print(_changes_table(changes, *headings))
    else:
        console().print(cell(f"{tenant} has the same policy now as at revision {revision}"))


def policy_table(tenant: TenantState, now: float) -> Table:
    """The policy in force and, where it is temporary, the one that comes then."""
    until = running_until(tenant, now)
    rows = table(f"policy of {tenant.name}", f"revision {tenant.revision}")
    current = tenant.document.in_force(now).model_dump()
    if until is None:
        for name, value in current.items():
            rows.add_row(cell(name), cell(shown(value)))
        return rows
    rows.add_column(f"from {moment(until.at)} (in {lasting(until.at - now)})")
    for name, value in current.items():
        after = getattr(until.then, name)
        style = "" if value == after else "bold"
        rows.add_row(cell(name, style), cell(shown(value), style), cell(shown(after), style))
    return rows


def policy_as_json(tenant: TenantState, now: float) -> dict[str, Any]:
    """policy: in force now; until: where it is temporary, its end and what comes then."""
    until = running_until(tenant, now)
    return {
        "tenant": tenant.name,
        "revision": tenant.revision,
        "created_at": tenant.document.created_at,
        "policy": tenant.document.in_force(now).model_dump(),
        "until": None if until is None else until.model_dump(),
    }


def running_until(tenant: TenantState, now: float) -> Until | None:
    """The end of the policy in force, if it has one."""
    until = tenant.document.until
    return until if until is not None and now < until.at else None


def _check_lasting(tenant: TenantState, now: float) -> None:
    """A change would otherwise make a temporary policy last, unnoticed. Raises
    InvalidRequestError."""
    until = running_until(tenant, now)
    if until is not None:
        raise InvalidRequestError(
            f"the policy of {tenant.name!r} is temporary until {moment(until.at)}: end it with "
            f"`deshift audit revert {tenant.revision}`, or build on it with --permanent"
        )


async def _document_at(control: Control, tenant: str, revision: int) -> TenantDocument:
    """As the newest commit up to `revision` left it. Raises NoSuchTenantError."""
    key, before = TENANT_PREFIX + tenant, revision + 1
    newest = await control.audit(1)
    if not newest or newest[0].revision < revision:
        raise NoSuchTenantError(f"there is no revision {revision} yet")
    while entries := await control.audit(_PAGE, before, tenant):
        for entry in entries:
            for change in entry.changes:
                if change.key == key and change.after is not None:
                    return parse(TenantDocument, key, json.dumps(change.after))
                if change.key == key:
                    raise NoSuchTenantError(f"{tenant!r} was deleted at revision {entry.revision}")
        before = entries[-1].revision
    raise NoSuchTenantError(f"there was no tenant {tenant[:80]!r} at revision {revision}")


def _changes(before: PolicyFields, after: PolicyFields) -> dict[str, list[Any]]:
    """Each field that differs, with both values."""
    old, new = before.model_dump(), after.model_dump()
    return {name: [old[name], new[name]] for name in old if old[name] != new[name]}


def _changes_table(changes: dict[str, list[Any]], before: str, after: str) -> Table:
    rows = table("field", before, after)
    for name, (old, new) in changes.items():
        rows.add_row(cell(name), cell(shown(old)), cell(shown(new), "bold"))
    return rows
