"""The ways by which operators change a tenant's alpha: API, command and the console's form."""

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

import httpx

from server.bench.fleet import AUTHOR, TENANT
from server.bench.target import BenchError
from server.config import PREFIX
from server.control import Author, Control

REASON = AUTHOR.reason


@dataclass(frozen=True)
class Sent:
    """When a change left its operator, unix seconds, and the revision that it made."""

    at: float
    revision: int


class Way(Protocol):
    """Makes one change at a time; raises BenchError when it is refused."""

    @property
    def name(self) -> str: ...

    async def change(self, alpha: float) -> Sent: ...


@dataclass(frozen=True)
class ByApi:
    """`client`: of an admin listener, with the admin key."""

    client: httpx.AsyncClient
    name: str = "API"

    async def change(self, alpha: float) -> Sent:
        body = {"changes": {"alpha": alpha}, "reason": REASON}
        at = time.time()
        response = await self.client.patch(f"/admin/v1/tenants/{TENANT}/policy", json=body)
        _check(response, 200)
        return Sent(at, int(response.json()["revision"]))


@dataclass(frozen=True)
class ByCommand:
    """What `deshift policy set` does, in this process, which is running already."""

    control: Control
    name: str = "command"

    async def change(self, alpha: float) -> Sent:
        author = Author(AUTHOR.by, REASON, "command")
        at = time.time()
        held = await self.control.tenant(TENANT)
        policy = held.document.policy.model_copy(update={"alpha": alpha})
        return Sent(at, await self.control.set_policy(TENANT, policy, held.revision, author))


@dataclass(frozen=True)
class ByProcess:
    """`deshift policy set` as typed in a shell: a new process, which takes seconds to load."""

    store_url: str
    name: str = "deshift policy set"

    async def change(self, alpha: float) -> Sent:
        command = ["policy", "set", TENANT, "--alpha", str(alpha), "--reason", REASON, "--json"]
        env = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        env[f"{PREFIX}ADMIN_STORE"] = self.store_url
        at = time.time()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.cli", *command),
            env=env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        if process.returncode:
            raise BenchError(f"deshift policy set: {errors.decode(errors='replace')[-300:]}")
        return Sent(at, int(json.loads(output)["revision"]))


@dataclass(frozen=True)
class ByConsole:
    """The tenant's page: its form is read, and sent back with another alpha; `sign_in` first.

    The time counts from the sending; `client` is of an admin listener, without a key.
    """

    client: httpx.AsyncClient
    name: str = "console"

    async def sign_in(self, admin_key: str) -> None:
        _check(await self.client.post("/sign-in", data={"key": admin_key}), 303)

    async def change(self, alpha: float) -> Sent:
        page = await self.client.get(f"/tenants/{TENANT}")
        _check(page, 200)
        path = f"/tenants/{TENANT}/policy"
        form = {**form_fields(page.text, path), "alpha": str(alpha), "reason": REASON}
        at = time.time()
        response = await self.client.post(path, data=form)
        _check(response, 303)
        query = parse_qs(urlsplit(response.headers["location"]).query)
        if query.get("done") != ["policy"]:
            raise BenchError(f"the console's form changed nothing: {response.headers['location']}")
        return Sent(at, int(query["revision"][0]))


def form_fields(page: str, path: str) -> dict[str, str]:
    """What a browser would send for the form of `page` whose action is `path` (and a fragment).

    Raises BenchError where there is no such form.
    """
    reader = _FormReader(path)
    reader.feed(page)
    if not reader.fields:
        raise BenchError(f"the page has no form for {path}")
    return reader.fields


class _FormReader(HTMLParser):
    """Inputs, and the selected options; the page's policy form has no other fields."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self._path = path
        self._is_inside = False
        self._select = ""
        self._option: str | None = None  # name of the select whose option's text comes next

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._is_inside = found.get("action", "").partition("#")[0] == self._path
        if not self._is_inside:
            return
        if tag == "input" and "name" in found:
            self.fields[found["name"]] = found.get("value", "")
        elif tag == "select":
            self._select = found["name"]
        elif tag == "option" and "selected" in found and self._select:
            if "value" in found:
                self.fields[self._select] = found["value"]
            else:
                self._option = self._select

    def handle_data(self, data: str) -> None:
        if self._option is not None:
            self.fields[self._option] = data.strip()
            self._option = None

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._is_inside = False
        elif tag == "select":
            self._select = ""


def _check(response: httpx.Response, status: int) -> None:
    if response.status_code != status:
        raise BenchError(
            f"{response.request.method} {response.request.url.path}: {response.status_code}, "
            f"expected {status}"
        )
