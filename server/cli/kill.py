"""`deshift kill`: one switch over all tenants, by the store or on single replicas without it."""

import asyncio
from typing import Annotated

import typer

from server.cli.control import AdminStoreOption, ByOption, RevisionOption, author, operate
from server.cli.display import cell
from server.cli.options import JsonOption, console, print_json
from server.cli.remote_kill import admin_key, checked_urls, set_on_replicas
from server.control import Control
from server.documents import KillAction
from steering.errors import ConflictError, ReadOnlyError, StoreError

MEANING: dict[KillAction, str] = {
    "none": "every tenant's own policy is in force",
    "unsteered": "nobody is steered: pictures are answered without protection",
    "reject": "every request with a picture is refused",
}

_WITHOUT_STORE = "deshift kill ACTION --reason TEXT --replica http://HOST:8001, for each replica"


def kill(
    action: Annotated[
        KillAction | None,
        typer.Argument(
            metavar="ACTION",
            help="unsteered: nobody is steered, pictures are answered without protection. "
            "reject: every request with a picture is refused. "
            "none: back to every tenant's own policy. Without it: show the switch.",
        ),
    ] = None,
    reason: Annotated[
        str | None,
        typer.Option(help="Why, in one line; needed for every change.", metavar="TEXT"),
    ] = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(
            help="Not in the store but on this replica alone, by its admin listener, until it is "
            "`none` there again: for when the store is down. Can be given several times.",
            metavar="URL",
        ),
    ] = None,
    key_from_env: Annotated[
        bool,
        typer.Option(
            "--admin-key-from-env",
            help="With --replica: take the admin key from DESHIFT_ADMIN_KEY, do not ask for it.",
        ),
    ] = False,
    revision: RevisionOption = None,
    by: ByOption = None,
    store: AdminStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show or set the kill switch: it overrides all tenants, whose policies are kept."""
    if action is None:
        if reason is not None or replica:
            raise typer.BadParameter("say which: unsteered, reject or none")
        _show(store, as_json)
        return
    if reason is None:
        raise typer.BadParameter("a change needs --reason TEXT")
    if replica:
        _set_on_replicas(replica, action, reason, key_from_env, as_json)
        return
    who = author(by, reason)

    async def change(control: Control) -> tuple[KillAction, int]:
        before = (await control.state()).kill
        return before, await control.set_kill(action, who, revision)

    try:
        before, done = operate(store, change)
    except (ConflictError, ReadOnlyError):
        raise
    except StoreError as error:
        raise StoreError(f"{error}; without the store: {_WITHOUT_STORE}") from None
    if as_json:
        print_json({"before": before, "kill": action, "revision": done})
        return
    was = "was so already" if before == action else f"was {before}"
    console().print(cell(f"kill switch: {action} ({was}), revision {done}", "bold"))
    console().print(MEANING[action])


def _show(store: str | None, as_json: bool) -> None:
    state = operate(store, Control.state)
    if as_json:
        print_json({"kill": state.kill, "revision": state.kill_revision})
        return
    console().print(cell(f"kill switch: {state.kill}, revision {state.kill_revision}", "bold"))
    console().print(MEANING[state.kill])
    for problem in state.unreadable.values():
        typer.echo(cell(problem).plain, err=True)


def _set_on_replicas(
    urls: list[str], action: KillAction, reason: str, key_from_env: bool, as_json: bool
) -> None:
    """Exit code 1 when one of them did not do it; the others have all the same."""
    checked, key = checked_urls(urls), admin_key(key_from_env)
    told = author("operator", reason).reason.strip()  # the replica knows who by the key
    problems = asyncio.run(set_on_replicas(checked, key, action, told))
    if as_json:
        print_json(
            [
                {"replica": url, "kill": action, "done": problem is None, "problem": problem}
                for url, problem in problems.items()
            ]
        )
    else:
        for url, problem in problems.items():
            said = f"NOT DONE: {problem}" if problem else f"kill switch {action}, on this replica"
            console().print(cell(f"{url}: {said}", "bold red" if problem else ""))
        console().print(MEANING[action])
    if any(problems.values()):
        raise typer.Exit(1)
