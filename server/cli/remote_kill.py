"""The kill switch of single replicas, by their admin listeners; needs no store."""

import asyncio
import os
import ssl
import sys
from collections.abc import Sequence

import httpx
import typer

from server.config import ADMIN_KEY
from server.documents import KillAction
from server.errors import ConfigError, InvalidRequestError

PATH = "/admin/v1/kill"
TIMEOUT_S = 5.0
MAX_MESSAGE_LEN = 300


def admin_key(from_env: bool) -> str:
    """From the environment, or typed unseen. Raises ConfigError, which never shows it."""
    if from_env:
        key = os.environ.get(ADMIN_KEY, "")
    elif sys.stdin.isatty():
        key = typer.prompt("admin key", hide_input=True, err=True)
    else:
        raise ConfigError(f"no admin key: give --admin-key-from-env and set {ADMIN_KEY}")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        where = ADMIN_KEY if from_env else "the admin key"
        raise ConfigError(f"{where} must be printable ASCII without spaces, and not empty")
    return key


def checked_urls(urls: Sequence[str]) -> list[str]:
    """Without a final slash, each once. Raises InvalidRequestError."""
    for text in urls:
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL:
            url = httpx.URL()
        is_plain = not (url.userinfo or url.query or url.fragment) and url.path in ("", "/")
        if url.scheme not in ("http", "https") or not url.host or not is_plain:
            raise InvalidRequestError(
                "a replica is the address of its admin listener, such as http://10.0.0.7:8001"
            )
    return list(dict.fromkeys(url.rstrip("/") for url in urls))


async def set_on_replicas(
    urls: Sequence[str], key: str, action: KillAction, reason: str
) -> dict[str, str | None]:
    """All at once; what went wrong, by URL: None where the replica has done it."""
    headers = {"authorization": f"Bearer {key}"}
    body = {"action": action, "reason": reason, "scope": "replica"}
    # No proxy of the environment, no redirect: the key goes to the replica and to nobody else.
    async with httpx.AsyncClient(
        headers=headers,
        timeout=TIMEOUT_S,
        trust_env=False,
        verify=ssl.create_default_context(),
    ) as client:

        async def put(url: str) -> str | None:
            try:
                response = await client.put(url + PATH, json=body)
            except httpx.HTTPError as error:
                return f"cannot be reached: {error or type(error).__name__}"
            return None if response.is_success else _refusal(response)

        return dict(zip(urls, await asyncio.gather(*map(put, urls)), strict=True))


def _refusal(response: httpx.Response) -> str:
    """The status, with the server's own words where the body has them."""
    try:
        words = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        words = response.reason_phrase
    return f"answered {response.status_code}: {words[:MAX_MESSAGE_LEN]}"
