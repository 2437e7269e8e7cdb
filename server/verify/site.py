"""The server that is verified: a URL, or one that is started here when its model has been checked
in this process.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.bench import machine, servers
from server.bench.target import BenchError, Target
from server.config import PREFIX, Settings
from server.process import ChildError, free_port
from server.verify.check import Check, VerifyError
from server.verify.local import verify_model
from steering.errors import NotFoundError
from steering.models import load_model
from steering.stores import opened_store
from steering.stores.base import resolve
from steering.vectors import ShiftVectors

NAME = "verify"
LONGEST_ANSWER_S = 600.0
UNKNOWN_DTYPE = "unknown"  # judged as a half
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Site:
    """admin_url: of the admin listener, "" where nobody knows it. is_own: nobody else asks it.
    max_dose: the policy's cap. checkpoint: its digest, where the server was started here."""

    url: str
    api_key: str
    admin_url: str
    dtype: str
    max_dose: float
    is_own: bool
    checkpoint: str | None = None

    def client(self) -> httpx.AsyncClient:
        return _client(self.url, self.api_key)

    def admin_client(self) -> httpx.AsyncClient:
        """Without a key: what is read is open."""
        return _client(self.admin_url, "")


@dataclass(frozen=True)
class Directory:
    """A model directory (or None: the demonstration's), and how it is to be served."""

    model: Path | None
    settings: Sequence[tuple[str, str]]
    dtype: str


def in_process(directory: Directory, progress: Progress) -> tuple[list[Check], "ToServe"]:
    """The checks of the model; its weights are let go when this returns.

    Raises VerifyError, SteeringError, ConfigError.
    """
    to_serve = _to_serve(directory)
    settings = to_serve.settings
    progress("loading the model")
    loaded = load_model(
        str(to_serve.checkpoint.model), dtype=settings.dtype, device=settings.device
    )
    vectors = asyncio.run(_vectors(settings))
    if vectors is not None:
        vectors.check(loaded.identity)
    dtype = loaded.identity.dtype
    checks = verify_model(loaded, settings, vectors, progress)
    return checks, ToServe(to_serve.checkpoint, settings, to_serve.env, dtype)


@dataclass(frozen=True)
class ToServe:
    checkpoint: servers.Checkpoint
    settings: Settings
    env: dict[str, str]
    dtype: str


def start(stack: ExitStack, to_serve: ToServe, logs: Path) -> Site:
    """A server on free loopback ports until `stack` ends. Raises VerifyError."""
    settings, admin_port = to_serve.settings, free_port()
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    model = to_serve.checkpoint.model
    try:
        target: Target = stack.enter_context(
            servers.deshift_serve(
                NAME,
                model,
                logs,
                to_serve.dtype,
                to_serve.env,
                admin_port=admin_port,
                api_key=key,
            )
        )
    except ChildError as error:
        raise VerifyError(str(error)) from None
    return Site(
        target.url,
        key,
        f"http://127.0.0.1:{admin_port}",
        to_serve.dtype,
        settings.max_relative_dose,
        is_own=True,
        checkpoint=machine.checkpoint_digest(model),
    )


def running(
    url: str, api_key: str, admin_url: str | None, max_dose: float | None, dtype: str
) -> Site:
    """Somebody else's server; dtype `auto`: unknown. Raises VerifyError for what is no URL."""
    return Site(
        _checked(url.rstrip("/").removesuffix("/v1"), "--url"),
        api_key,
        _checked(admin_url.rstrip("/"), "--admin-url") if admin_url else "",
        UNKNOWN_DTYPE if dtype == "auto" else dtype,
        math.inf if max_dose is None else max_dose,
        is_own=False,
    )


def _to_serve(directory: Directory) -> ToServe:
    try:
        checkpoint = servers.checkpoint(directory.model, directory.model is None, None)
    except BenchError as error:
        raise VerifyError(str(error)) from None
    assert checkpoint is not None, "a directory or the demonstration"
    env = dict(checkpoint.env)
    env |= {f"{PREFIX}{name.upper()}": value for name, value in directory.settings}
    overrides: dict[str, Any] = {"model": str(checkpoint.model), "dtype": directory.dtype}
    return ToServe(checkpoint, Settings.from_env(env, overrides), env, directory.dtype)


async def _vectors(settings: Settings) -> ShiftVectors | None:
    """Of the settings' alias; None where the store has none. Raises SteeringError."""
    async with opened_store(settings.store_url) as store:
        try:
            return await store.get_vectors(await resolve(store, settings.vector_alias))
        except NotFoundError:
            return None


def _checked(url: str, option: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise VerifyError(f"{option} must be http(s)://HOST[:PORT], without credentials in it")
    return url


def _client(url: str, api_key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(LONGEST_ANSWER_S, connect=10.0),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )
