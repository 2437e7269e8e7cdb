"""What the demonstration serves: the model, its shipped vectors in a store, its settings."""

import asyncio
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from server.config import PREFIX, Settings
from server.control import Author, Control, activate
from server.demo.cases import MODEL_NAME
from server.documents import DEFAULT_TENANT, PolicyFields
from server.errors import NoSuchTenantError
from server.policy import default_fields
from steering.demo.assemble import assemble
from steering.errors import ConflictError
from steering.stores import opened_store
from steering.stores.base import aliases

ALIAS = "demo"


@dataclass(frozen=True)
class Recommended:
    """The strength and schedule that were chosen for the demonstration model."""

    alpha: float
    schedule: str


def recommended() -> Recommended:
    values = json.loads((resources.files("steering.demo") / "recommended.json").read_text())
    return Recommended(float(values["alpha"]), str(values["schedule"]))


def cache_dir(caller: Mapping[str, str] = os.environ) -> Path:
    """Where things are made: the only one of the caller's settings that counts here."""
    return Settings.from_env({k: v for k, v in caller.items() if k == f"{PREFIX}CACHE"}).cache


def environment(
    variables: Mapping[str, str], caller: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The caller's environment with `variables` in place of its own settings.

    Those are meant for another server: an API key, say, or the revision of another model.
    """
    return {k: v for k, v in caller.items() if not k.startswith(PREFIX)} | dict(variables)


async def keep(url: str, vectors: bytes, alias: str, *, by: str) -> None:
    """Put a vector set into a store and point an alias to it. Raises SteeringError."""
    async with opened_store(url) as store:
        vector_id = await store.put_vectors(vectors)
        await activate(store, alias, vector_id, by=by, reason="set up with the vectors at hand")


async def put_back(url: str, policy: PolicyFields, *, by: str) -> None:
    """The policy of requests without a key as a tenant that operators see, whatever an earlier
    demonstration left of it. Raises SteeringError."""
    author = Author(by, "the demonstration begins", "setup")
    async with opened_store(url) as store:
        control = Control(store)
        try:
            await control.set_policy(DEFAULT_TENANT, policy, None, author)
        except NoSuchTenantError:
            await control.create_tenant(DEFAULT_TENANT, policy, author)


def prepare_for(settings: Settings) -> dict[str, object]:
    """Build or check the model and keep its vectors in the server's own store.

    Returns the settings to serve it by, without those that `settings` was given. Vectors that an
    operator has pointed the alias to stay. Raises SteeringError as `prepare` does.
    """
    model = assemble(settings.cache / "demo-model")
    chosen = recommended()
    found: dict[str, object] = {
        "served_model_name": MODEL_NAME,
        "vector_alias": ALIAS,
        "alpha": chosen.alpha,
        "schedule": chosen.schedule,
    }
    wanted = {k: v for k, v in found.items() if k not in settings.model_fields_set}
    alias = str(wanted.get("vector_alias", settings.vector_alias))
    asyncio.run(_keep_first(settings.admin_store or settings.store_url, alias))
    return {"model": str(model.absolute()), **wanted}


async def _keep_first(url: str, alias: str) -> None:
    async with opened_store(url) as store:
        vector_id = await store.put_vectors(_vectors())
        if alias in await aliases(store):
            return
        with suppress(ConflictError):  # another replica that starts now was faster
            await activate(store, alias, vector_id, by="deshift serve", reason="shipped vectors")


def _vectors() -> bytes:
    return (resources.files("steering.demo") / "vectors.safetensors").read_bytes()


def prepare(cache: Path) -> Mapping[str, str]:
    """Build or check the model, keep and activate its vectors; return the server's variables.

    Everything lies within `cache`. Raises SteeringError where a download fails, a digest differs
    or the store cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    model = assemble(cache / "demo-model")
    url = f"sqlite:///{(cache / 'demo.db').absolute()}"
    asyncio.run(keep(url, _vectors(), ALIAS, by="deshift demo"))
    chosen = recommended()
    variables = {
        "DESHIFT_CACHE": str(cache.absolute()),
        "DESHIFT_STORE": url,
        "DESHIFT_MODEL": str(model.absolute()),
        "DESHIFT_SERVED_MODEL_NAME": MODEL_NAME,
        "DESHIFT_VECTOR_ALIAS": ALIAS,
        "DESHIFT_STEERING_MODE": "dataset",
        "DESHIFT_ALPHA": str(chosen.alpha),
        "DESHIFT_SCHEDULE": chosen.schedule,
        "DESHIFT_CLIENT_OVERRIDE": "any",
    }
    asyncio.run(put_back(url, default_fields(Settings.from_env(variables)), by="deshift demo"))
    return variables
