"""What every store offers: immutable vector sets, and documents that change under revisions.

A store keeps bytes that were verified; it never edits them. What documents say is the writer's
business (the server's tenants, policies, aliases): to a store they are text.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from steering.errors import ConflictError, NotFoundError, StoreError
from steering.vectors import Manifest, ShiftVectors

ALIAS_PREFIX = "alias/"  # documents {"vector": id}, one for each alias


@dataclass(frozen=True)
class VectorRecord:
    """One stored vector set, without its tensors. `created_at` is the manifest's."""

    id: str
    manifest: Manifest
    size_bytes: int

    @property
    def created_at(self) -> str:
        return self.manifest.created_at


@dataclass(frozen=True)
class Document:
    """A text under a key, as the commit of that revision left it; value None: deleted by it."""

    key: str
    value: str | None
    revision: int


@dataclass(frozen=True)
class Changes:
    """What a store holds beyond a revision.

    epoch: names the store's data, given by its first commit and never changed: another one means
    other data (the store was emptied, or replaced), of which nothing known before is a part; "" for
    a store without a commit. revision: of the newest commit, 0 without one; documents: each one
    that a commit after `since` wrote, once, in its newest version, deleted ones included.
    """

    epoch: str
    revision: int
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class AuditRecord:
    """One commit: its revision, the store's wall time in seconds, and the writer's own text."""

    revision: int
    at: float
    entry: str


class Store(Protocol):
    """Vector sets by id, and documents with one revision that every commit counts up.

    One event loop uses an instance. Every method raises StoreError when the store cannot be read
    or written, ReadOnlyError where the credentials do not let it write.
    """

    async def put_vectors(self, data: bytes) -> str:
        """Verify and keep a vector set; return its id. Keeping it again changes nothing.

        Raises VectorError for bytes that are not an intact vector set.
        """
        ...

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        """A vector set, its bytes verified against the id. Raises NotFoundError, VectorError."""
        ...

    async def list_vectors(self) -> list[VectorRecord]:
        """Every vector set, oldest first."""
        ...

    async def changes(self, since: int = 0) -> Changes:
        """What was committed after revision `since`; with 0, every document."""
        ...

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        """Those of the named documents that exist, by key."""
        ...

    async def commit(
        self, writes: Mapping[str, str | None], expected: Mapping[str, int], audit: str
    ) -> int:
        """Write documents (None deletes), all or none, with one audit record; returns the revision.

        expected: the revision of documents as the writer saw them, 0 for one that does not exist.
        Raises ConflictError when one of them has another revision now, whoever else writes.
        """
        ...

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRecord]:
        """The newest commits first, at most `limit`, of revisions below `before`."""
        ...

    async def heartbeat(self, replica: str, status: str, ttl_s: float) -> None:
        """Keep a replica's status for `ttl_s` seconds; an empty status takes it away."""
        ...

    async def replicas(self) -> dict[str, str]:
        """The status of every replica whose heartbeat has not run out."""
        ...

    def wakeups(self) -> AsyncIterator[None]:
        """Yields once it listens, and soon after each commit of anybody: a hint to look at
        `changes`, which may be lost or come for nothing. Raises StoreError when it can no longer
        listen; call it anew then.
        """
        ...

    async def close(self) -> None:
        """Release what is held; a closed store is not used again."""
        ...


async def aliases(store: Store) -> dict[str, str]:
    """Alias name to vector id. Raises StoreError, also for an alias that cannot be read."""
    changes = await store.changes()
    return {
        document.key.removeprefix(ALIAS_PREFIX): alias_target(document)
        for document in changes.documents
        if document.key.startswith(ALIAS_PREFIX) and document.value is not None
    }


def alias_target(document: Document) -> str:
    """The vector id that an alias's document names. Raises StoreError."""
    try:
        target = json.loads(document.value or "")["vector"]
    except (ValueError, TypeError, KeyError):
        raise StoreError(f"the document {document.key!r} names no vector set") from None
    return str(target)


async def resolve(store: Store, name: str) -> str:
    """The id that an alias, an id or an unambiguous start of an id (8 digits or more) names.

    Raises NotFoundError, naming what there is.
    """
    known_aliases = await aliases(store)
    if name in known_aliases:
        return known_aliases[name]
    ids = [record.id for record in await store.list_vectors()]
    found = [id_ for id_ in ids if id_ == name or (len(name) >= 8 and id_.startswith(name))]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(known_aliases)) or "none"
    problem = "names several vector sets" if found else "is neither an alias nor a vector set"
    raise NotFoundError(f"{name!r} {problem}; aliases: {known}; vector sets: {len(ids)}")


def record_of(data: bytes) -> VectorRecord:
    """Verify bytes and describe them. Raises VectorError."""
    vectors = ShiftVectors.from_bytes(data)
    return VectorRecord(vectors.id, vectors.manifest, len(data))


def unknown_id(vector_id: str) -> NotFoundError:
    return NotFoundError(f"the store has no vector set {vector_id!r}")


def check_expected(expected: Mapping[str, int], actual: Mapping[str, int]) -> None:
    """Raises ConflictError unless every document has the revision that the writer saw."""
    changed = {key: actual[key] for key in expected if actual[key] != expected[key]}
    if changed:
        told = ", ".join(
            f"{key} is at revision {now}, not {expected[key]}" for key, now in changed.items()
        )
        raise ConflictError(f"changed by somebody else in the meantime: {told}", changed)
