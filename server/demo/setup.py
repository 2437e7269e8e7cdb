"""What the demonstration serves: the model, its shipped vectors in a store, its settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from server.demo.cases import MODEL_NAME
from steering.demo.assemble import assemble
from steering.stores import open_store

ALIAS = "demo"


@dataclass(frozen=True)
class Recommended:
    """The strength and schedule that were chosen for the demonstration model."""

    alpha: float
    schedule: str


def recommended() -> Recommended:
    values = json.loads((resources.files("steering.demo") / "recommended.json").read_text())
    return Recommended(float(values["alpha"]), str(values["schedule"]))


def prepare(cache: Path) -> Mapping[str, str]:
    """Build or check the model, keep and activate its vectors; return the server's variables.

    Everything lies within `cache`. Raises SteeringError where a download fails, a digest differs
    or the store cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    model = assemble(cache / "demo-model")
    url = f"sqlite:///{(cache / 'demo.db').absolute()}"
    store = open_store(url)
    try:
        vectors = (resources.files("steering.demo") / "vectors.safetensors").read_bytes()
        store.set_alias(ALIAS, store.put_vectors(vectors))
    finally:
        store.close()
    chosen = recommended()
    return {
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
