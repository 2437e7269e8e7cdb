"""Vector sets and aliases as operators see them: where a set comes from, what it does per layer.

Does not cover which set is in force on this replica (server/vectors.py).
"""

import asyncio
from collections import OrderedDict

from server.admin.protocol import AliasView, LayerView, VectorView
from server.admin.show import layer_views
from server.control import Control
from steering.errors import NotFoundError, VectorError
from steering.stores.base import ALIAS_PREFIX, VectorRecord, alias_target

CAPACITY = 256  # sets whose layers are remembered; one takes a few kB


class VectorShelf:
    """Remembers what was computed of a set: what an id names never changes."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._layers: OrderedDict[str, list[LayerView]] = OrderedDict()

    async def views(self) -> list[VectorView]:
        """Every set of the store, oldest first. Raises StoreError."""
        records = await self._control.store.list_vectors()
        aliases: dict[str, list[str]] = {}
        for alias in await alias_views(self._control):
            aliases.setdefault(alias.vector, []).append(alias.name)
        return [await self._view(record, aliases.get(record.id, [])) for record in records]

    async def _view(self, record: VectorRecord, aliases: list[str]) -> VectorView:
        layers, problem = None, None
        try:
            layers = await self._layers_of(record.id)
        except (VectorError, NotFoundError) as error:  # the others are shown all the same
            problem = str(error)
        return VectorView(
            id=record.id,
            created_at=record.created_at,
            size_bytes=record.size_bytes,
            aliases=aliases,
            manifest=record.manifest.as_dict(),
            layers=layers,
            problem=problem,
        )

    async def _layers_of(self, vector_id: str) -> list[LayerView]:
        known = self._layers.get(vector_id)
        if known is None:
            vectors = await self._control.store.get_vectors(vector_id)
            known = self._layers[vector_id] = await asyncio.to_thread(layer_views, vectors)
            if len(self._layers) > CAPACITY:
                self._layers.popitem(last=False)
        self._layers.move_to_end(vector_id)
        return known


async def alias_views(control: Control) -> list[AliasView]:
    """By name. Raises StoreError."""
    names = sorted((await control.state()).aliases)
    documents = await control.store.get([ALIAS_PREFIX + name for name in names])
    return [
        AliasView(
            name=key.removeprefix(ALIAS_PREFIX),
            vector=alias_target(document),
            revision=document.revision,
        )
        for key, document in documents.items()
    ]
