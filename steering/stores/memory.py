"""A store in this process's memory, gone when it ends: for tests and trials."""

import threading

from steering.stores.base import VectorRecord, record_of, unknown_id
from steering.vectors import ShiftVectors


class MemoryStore:
    """Vector sets and aliases in dictionaries under one lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._vectors: dict[str, tuple[VectorRecord, bytes]] = {}
        self._aliases: dict[str, str] = {}

    def put_vectors(self, data: bytes) -> str:
        record = record_of(data)
        with self._lock:
            self._vectors.setdefault(record.id, (record, data))
        return record.id

    def get_vectors(self, vector_id: str) -> ShiftVectors:
        with self._lock:
            if vector_id not in self._vectors:
                raise unknown_id(vector_id)
            data = self._vectors[vector_id][1]
        return ShiftVectors.from_bytes(data, expected_id=vector_id)

    def list_vectors(self) -> list[VectorRecord]:
        with self._lock:
            return [record for record, _ in self._vectors.values()]

    def aliases(self) -> dict[str, str]:
        with self._lock:
            return dict(self._aliases)

    def set_alias(self, name: str, vector_id: str) -> None:
        with self._lock:
            if vector_id not in self._vectors:
                raise unknown_id(vector_id)
            self._aliases[name] = vector_id

    def close(self) -> None:
        return
