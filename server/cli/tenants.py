"""`deshift tenants`: who is served under a policy of its own."""

import time
from typing import Annotated

import typer

from server.cli.control import (
    AdminStoreOption,
    ByOption,
    ReasonOption,
    RevisionOption,
    author,
    operate,
)
from server.cli.display import cell, moment, table
from server.cli.keys import keys_as_json, keys_table
from server.cli.options import JsonOption, console, print_json
from server.cli.policy import policy_as_json, policy_table, running_until
from server.cli.policy_options import changed, with_policy_options
from server.control import Control, StoreState, TenantState
from server.documents import PolicyFields, TenantDocument

tenants = typer.Typer(no_args_is_help=True, help="Tenants, each with a policy and API keys.")

DEFAULTS = PolicyFields.model_validate({})
TenantArgument = Annotated[str, typer.Argument(help="The tenant's name.", metavar="NAME")]


@tenants.command("list")
def list_tenants(store: AdminStoreOption = None, as_json: JsonOption = False) -> None:
    """List every tenant with what is in force for it."""
    state = operate(store, Control.state)
    now = time.time()
    ordered = [state.tenants[name] for name in sorted(state.tenants)]
    if as_json:
        print_json(
            {
                "revision": state.revision,
                "kill": state.kill,
                "tenants": [_as_json(tenant, now) for tenant in ordered],
                "unreadable": dict(state.unreadable),
            }
        )
        return
    printer = console()
    if ordered:
        rows = table("tenant", "mode", "alpha", "until", "override", "on error", "keys", "revision")
        for tenant in ordered:
            rows.add_row(*map(cell, _row(tenant, now)))
        printer.print(rows)
    else:
        printer.print("no tenants yet: deshift tenants create makes one")
    _warn(state)


@tenants.command()
def show(name: TenantArgument, store: AdminStoreOption = None, as_json: JsonOption = False) -> None:
    """Show a tenant's policy and its keys."""
    tenant = operate(store, lambda control: control.tenant(name))
    now = time.time()
    if as_json:
        print_json(_as_json(tenant, now))
        return
    printer = console()
    printer.print(policy_table(tenant, now))
    printer.print(keys_table(tenant, now) if tenant.keys else "no keys")


@tenants.command()
@with_policy_options
def create(
    name: TenantArgument,
    reason: ReasonOption,
    given: dict[str, str],
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a tenant; what no option says is a policy's default."""
    who, policy = author(by, reason), changed(DEFAULTS, given)
    revision = operate(store, lambda control: control.create_tenant(name, policy, who))
    if as_json:
        print_json({"tenant": name, "revision": revision, "policy": policy.model_dump()})
        return
    printer = console()
    made = TenantState(name, TenantDocument(policy=policy), revision)
    printer.print(policy_table(made, time.time()))
    printer.print(cell(f"its first key: deshift keys create {name} KEY_ID --reason ..."))


@tenants.command()
def delete(
    name: TenantArgument,
    reason: ReasonOption,
    revision: RevisionOption = None,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a tenant, its policy and its keys; `deshift audit revert` brings them back."""
    who = author(by, reason)
    done = operate(store, lambda control: control.delete_tenant(name, revision, who))
    if as_json:
        print_json({"tenant": name, "revision": done})
    else:
        console().print(cell(f"tenant {name} and its keys are deleted, revision {done}"))


def _row(tenant: TenantState, now: float) -> tuple[object, ...]:
    policy = tenant.document.in_force(now)
    until = running_until(tenant, now)
    num_valid = sum(key.is_valid(now) for key in tenant.keys)
    return (
        tenant.name,
        policy.mode,
        f"{policy.alpha:g}",
        "" if until is None else f"{moment(until.at)}, then {until.then.alpha:g}",
        policy.client_override,
        policy.on_error,
        num_valid,
        tenant.revision,
    )


def _as_json(tenant: TenantState, now: float) -> dict[str, object]:
    keys = {"keys": keys_as_json(tenant, now), "keys_revision": tenant.keys_revision}
    return {**policy_as_json(tenant, now), **keys}


def _warn(state: StoreState) -> None:
    if state.kill != "none":
        typer.echo(f"the kill switch is on: {state.kill} (deshift kill)", err=True)
    for problem in state.unreadable.values():
        typer.echo(cell(problem).plain, err=True)
