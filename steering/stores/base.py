"""What every store offers. A store keeps bytes that were verified; it never edits them."""

from dataclasses import dataclass
from typing import Protocol

from steering.errors import NotFoundError
from steering.vectors import Manifest, ShiftVectors


@dataclass(frozen=True)
class VectorRecord:
    """One stored vector set, without its tensors. `created_at` is the manifest's."""

    id: str
    manifest: Manifest
    size_bytes: int

    @property
    def created_at(self) -> str:
        return self.manifest.created_at


class Store(Protocol):
    """Vector sets by id, aliases to them. Safe from several threads; immutable vector sets.

    Every method raises StoreError when the store cannot be read or written.
    """

    def put_vectors(self, data: bytes) -> str:
        """Verify and keep a vector set; return its id. Keeping it again changes nothing.

        Raises VectorError for bytes that are not an intact vector set.
        """
        ...

    def get_vectors(self, vector_id: str) -> ShiftVectors:
        """A vector set, its bytes verified against the id. Raises NotFoundError, VectorError."""
        ...

    def list_vectors(self) -> list[VectorRecord]:
        """Every vector set, oldest first."""
        ...

    def aliases(self) -> dict[str, str]:
        """Alias name to vector id."""
        ...

    def set_alias(self, name: str, vector_id: str) -> None:
        """Point an alias to a vector set, atomically. Raises NotFoundError for an unknown id."""
        ...

    def close(self) -> None:
        """Release what is held; a closed store is not used again."""
        ...


def resolve(store: Store, name: str) -> str:
    """The id that an alias, an id or an unambiguous start of an id (8 digits or more) names.

    Raises NotFoundError, naming what there is.
    """
    aliases = store.aliases()
    if name in aliases:
        return aliases[name]
    ids = [record.id for record in store.list_vectors()]
    found = [id_ for id_ in ids if id_ == name or (len(name) >= 8 and id_.startswith(name))]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(aliases)) or "none"
    problem = "names several vector sets" if found else "is neither an alias nor a vector set"
    raise NotFoundError(f"{name!r} {problem}; aliases: {known}; vector sets: {len(ids)}")


def record_of(data: bytes) -> VectorRecord:
    """Verify bytes and describe them. Raises VectorError."""
    vectors = ShiftVectors.from_bytes(data)
    return VectorRecord(vectors.id, vectors.manifest, len(data))


def unknown_id(vector_id: str) -> NotFoundError:
    return NotFoundError(f"the store has no vector set {vector_id!r}")
