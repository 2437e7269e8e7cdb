"""What the pictures are of: two replicas of the demonstration with tenants, over a Redis, and a
Prometheus with the deployed configuration and rules that scrapes them. All on this machine.
"""

import asyncio
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from deploy.grafana.drawing.results import Json, PictureError
from server.bench.fleet import redis_server
from server.bench.servers import Checkpoint, deshift_serve, of_demo
from server.bench.target import Target
from server.config import PREFIX, Settings
from server.control import Author, Control
from server.documents import PolicyFields
from server.process import child_server, free_port
from steering.stores import opened_store
from steering.stores.base import resolve

DEPLOYED = Path(__file__).parents[2] / "prometheus"
OPERATOR = "alice"
TOGGLED = "acme"
PICTURES = {"alpha": 0.2, "alpha_max": 1.0, "schedule": "incremental"}
POLICIES: dict[str, Json] = {
    TOGGLED: {"mode": "dataset", **PICTURES},
    "beta": {"mode": "sample", **PICTURES},
    "gamma": {"mode": "off", "requests_per_minute": 12},
}
REPLICAS = ("deshift-1", "deshift-2")
SCRAPE_S = 2
_AUTHOR = Author(OPERATOR, "pilot", "command")


@dataclass(frozen=True)
class Site:
    """keys: by tenant. admin_key: the operator's. prometheus: its base URL."""

    replicas: tuple[Target, ...]
    keys: dict[str, str] = field(repr=False)
    admin_key: str = field(repr=False)
    prometheus: str

    def set_alpha(self, alpha: float, reason: str) -> None:
        """Of one tenant, live, by the admin API. Raises PictureError."""
        response = httpx.patch(
            f"{self.replicas[0].admin_url}/admin/v1/tenants/{TOGGLED}/policy",
            json={"changes": {"alpha": alpha}, "reason": reason},
            headers={"authorization": f"Bearer {self.admin_key}"},
            timeout=30,
        )
        if response.status_code != 200:
            raise PictureError(f"alpha could not be set: {response.status_code} {response.text}")


@contextmanager
def running(folder: Path) -> Iterator[Site]:
    """folder: for data and logs. Raises BenchError, ChildError, SteeringError."""
    with ExitStack() as stack:
        demo = of_demo()
        folder.mkdir(parents=True, exist_ok=True)
        url = stack.enter_context(redis_server(folder, folder / "redis.log"))
        keys = asyncio.run(_filled(url, demo))
        admin_key = secrets.token_urlsafe(24)
        environment = {
            **demo.env,
            f"{PREFIX}STORE": url,
            f"{PREFIX}ADMIN_STORE": url,
            f"{PREFIX}ADMIN_KEYS": f"{OPERATOR}:{admin_key}",
            f"{PREFIX}CLIENT_OVERRIDE": "none",
            f"{PREFIX}PROBE_SHARE": "0.5",  # a run of minutes shows where the traffic lies
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(REPLICAS))),
        }
        replicas = tuple(
            stack.enter_context(
                deshift_serve(
                    name,
                    demo.model,
                    folder,
                    "bfloat16",
                    {**environment, f"{PREFIX}REPLICA": name},
                )
            )
            for name in REPLICAS
        )
        prometheus = stack.enter_context(_prometheus(folder, replicas))
        yield Site(replicas, keys, admin_key, prometheus)


async def _filled(url: str, demo: Checkpoint) -> dict[str, str]:
    """The demonstration's vectors and the tenants; returns the tenants' keys."""
    settings = Settings.from_env(demo.env)
    alias = settings.vector_alias
    async with opened_store(url) as store, opened_store(settings.store_url) as own:
        vectors = await own.get_vectors(await resolve(own, alias))
        control = Control(store)
        vector_id = await store.put_vectors(vectors.to_bytes())
        await control.activate(alias, vector_id, _AUTHOR)
        for name, policy in POLICIES.items():
            fields = PolicyFields.model_validate({"vector_alias": alias, **policy})
            await control.create_tenant(name, fields, _AUTHOR)
        return {name: (await control.create_key(name, "web", _AUTHOR)).text for name in POLICIES}


@contextmanager
def _prometheus(folder: Path, replicas: tuple[Target, ...]) -> Iterator[str]:
    """With the deployed files but for the targets and how often it looks."""
    program = shutil.which("prometheus")
    if program is None:
        raise PictureError("the pictures need the program prometheus in PATH")
    made = folder / "prometheus"
    shutil.copytree(DEPLOYED, made)
    config = yaml.safe_load((made / "prometheus.yml").read_text())
    for interval in ("scrape_interval", "scrape_timeout", "evaluation_interval"):
        config["global"][interval] = f"{SCRAPE_S}s"
    del config["scrape_configs"][0]["static_configs"]
    (made / "prometheus.yml").write_text(yaml.safe_dump(config))
    targets = [replica.admin_url.removeprefix("http://") for replica in replicas]
    (made / "targets" / "replicas.yml").write_text(json.dumps([{"targets": targets}]))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        *(program, f"--config.file={made / 'prometheus.yml'}"),
        f"--web.listen-address={url.removeprefix('http://')}",
        f"--storage.tsdb.path={folder / 'prometheus-data'}",
        "--enable-feature=exemplar-storage",
    ]
    with child_server(command, ready_url=f"{url}/-/ready", log=folder / "prometheus.log"):
        yield url
