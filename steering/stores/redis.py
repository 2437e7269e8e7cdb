"""A store in Redis, for a fleet: any number of replicas and operators share it.

Keys, all under `deshift:` (deploy/redis/users.acl says who may do what with them):

    epoch              names this data; set by the first commit
    revision           of the newest commit
    documents          hash: key -> "<revision> <value>", or "<revision>" for a deleted one
    changed            sorted set: document key by the revision that wrote it last
    audit              stream: one entry <revision>-0 a commit {at, entry, token}
    vector:<id>        a vector set's bytes
    manifests, order   hash: id -> {"manifest", "size_bytes"}; sorted set: id by time of arrival
    replica:<name>     a replica's status, with a time to live
    changes            the channel on which a commit is told

A commit is one transaction, so readers see all of it or nothing; what it takes to see the changes
since a revision depends on their number only. Readers use no transactions: a Redis that is full
refuses those, and must still be read.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio.client import PubSub
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import NoPermissionError, RedisError, ResponseError, WatchError

from steering.errors import ReadOnlyError, StoreError, VectorError
from steering.stores.base import (
    AuditRecord,
    Changes,
    Document,
    VectorRecord,
    check_expected,
    record_of,
    unknown_id,
)
from steering.stores.redis_url import redis_client
from steering.vectors import Manifest, ShiftVectors

PREFIX = "deshift:"
EPOCH = PREFIX + "epoch"
REVISION = PREFIX + "revision"
DOCUMENTS = PREFIX + "documents"
CHANGED = PREFIX + "changed"
AUDIT = PREFIX + "audit"
MANIFESTS = PREFIX + "manifests"
ORDER = PREFIX + "order"
CHANNEL = PREFIX + "changes"
VECTOR = PREFIX + "vector:"
REPLICA = PREFIX + "replica:"
# How long, and how often, commits and reads that others' commits overtake are begun anew.
_COMMIT_S = 10.0
_NUM_READS = 50
_READ_AGAIN_S = 0.01
# A listener asks after this silence, and gives up when no answer comes: 2.5 s in all.
_IDLE_S = 1.0
_ANSWER_S = 1.5


class RedisStore:
    """A client with its connections; makes none before the first call.

    Raises StoreError for a URL that cannot be read.
    """

    def __init__(self, url: str) -> None:
        self._client = redis_client(url)
        self._redis: Any = self._client.redis  # its types leave open bytes, text or None
        self.place = self._client.place

    async def put_vectors(self, data: bytes) -> str:
        record = await asyncio.to_thread(record_of, data)
        about = {"manifest": record.manifest.as_dict(), "size_bytes": record.size_bytes}
        with self._explained(writes=True):
            arrival = await self._now(self._redis)
            async with self._redis.pipeline(transaction=True) as pipe:
                # Bytes that were damaged since are mended by the same set, put again.
                pipe.set(VECTOR + record.id, data)
                pipe.hset(MANIFESTS, record.id, json.dumps(about))
                pipe.zadd(ORDER, {record.id: arrival}, nx=True)
                await pipe.execute()
        return record.id

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        with self._explained():
            data = await self._redis.get(VECTOR + vector_id)
        if data is None:
            raise unknown_id(vector_id)
        try:
            return await asyncio.to_thread(ShiftVectors.from_bytes, data, vector_id)
        except VectorError as error:
            raise VectorError(f"store {self.place}: {error}") from error

    async def list_vectors(self) -> list[VectorRecord]:
        with self._explained():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.zrange(ORDER, 0, -1)  # first: a set that arrives in between is in the other
                pipe.hgetall(MANIFESTS)
                order, manifests = await pipe.execute()
        return [self._record(vector_id.decode(), manifests.get(vector_id)) for vector_id in order]

    async def changes(self, since: int = 0) -> Changes:
        with self._explained():
            for _ in range(_NUM_READS):
                async with self._redis.pipeline(transaction=False) as pipe:
                    pipe.mget(EPOCH, REVISION)
                    pipe.zrangebyscore(CHANGED, f"({since}", "+inf")
                    pipe.mget(EPOCH, REVISION)
                    newest, changed, still_newest = await pipe.execute()
                epoch, revision = (newest[0] or b"").decode(), int(newest[1] or 0)
                found = await self._documents([key.decode() for key in changed])
                # A later commit may have written one of them in between, and others with it.
                is_whole = len(found) == len(changed) and all(d.revision <= revision for d in found)
                if is_whole and newest == still_newest:
                    return Changes(epoch, revision, tuple(found))
                await asyncio.sleep(_READ_AGAIN_S)
        raise StoreError(f"store {self.place}: documents are lost, or change without a pause")

    async def get(self, keys: Sequence[str]) -> dict[str, Document]:
        with self._explained():
            found = await self._documents(keys)
        return {document.key: document for document in found if document.value is not None}

    async def commit(
        self, writes: Mapping[str, str | None], expected: Mapping[str, int], audit: str
    ) -> int:
        """As the protocol says; a StoreError leaves open whether the commit was made, since the
        answer may be what was lost."""
        token = uuid.uuid4().hex  # tells this commit from another one of the same revision
        tried = 0
        deadline = time.monotonic() + _COMMIT_S
        with self._explained(writes=True):
            while time.monotonic() < deadline:
                if tried and await self._is_made(tried, token):
                    return tried
                async with self._redis.pipeline(transaction=True) as pipe:
                    try:
                        await pipe.watch(REVISION, EPOCH)
                        tried = int(await pipe.get(REVISION) or 0) + 1
                        check_expected(expected, await self._revisions(pipe, expected))
                        at = await self._now(pipe) / 1e6
                        await self._write(pipe, tried, writes, {"at": at, "entry": audit}, token)
                        return tried
                    except WatchError:  # somebody else's commit, or the connection is lost
                        continue
        raise StoreError(f"store {self.place}: others' commits came first for too long")

    async def audit(self, limit: int, before: int | None = None) -> list[AuditRecord]:
        if limit < 1 or (before is not None and before <= 1):
            return []
        newest = "+" if before is None else str(before - 1)
        with self._explained():
            found = await self._redis.xrevrange(AUDIT, max=newest, min="-", count=limit)
        return [
            AuditRecord(
                int(stream_id.partition(b"-")[0]), float(entry[b"at"]), entry[b"entry"].decode()
            )
            for stream_id, entry in found
        ]

    async def heartbeat(self, replica: str, status: str, ttl_s: float) -> None:
        with self._explained(writes=True):
            if status:
                await self._redis.set(REPLICA + replica, status, px=max(1, round(ttl_s * 1000)))
            else:
                await self._redis.delete(REPLICA + replica)

    async def replicas(self) -> dict[str, str]:
        with self._explained():
            keys = sorted([key async for key in self._redis.scan_iter(f"{REPLICA}*", count=1000)])
            values = await self._redis.mget(keys) if keys else []
        return {
            key.decode().removeprefix(REPLICA): value.decode()
            for key, value in zip(keys, values, strict=True)
            if value is not None
        }

    async def wakeups(self) -> AsyncIterator[None]:
        with self._explained():
            async with self._redis.pubsub() as listener:
                await listener.subscribe(CHANNEL)
                is_listening = False
                while True:
                    heard = await self._heard(listener)
                    if heard == "subscribe" and is_listening:
                        # The library did so by itself: messages, and more, may have been lost.
                        raise StoreError(f"store {self.place}: the connection was lost")
                    is_listening |= heard == "subscribe"
                    if heard is not None:
                        yield

    async def close(self) -> None:
        with self._explained():
            await self._client.close()

    async def _heard(self, listener: PubSub) -> str | None:
        """What kind of message came; None for silence of a server that is still there."""
        message = await listener.get_message(timeout=_IDLE_S)
        if message is None:
            await listener.ping()
            message = await listener.get_message(timeout=_ANSWER_S)
            if message is None:
                raise StoreError(f"store {self.place}: no answer for {_IDLE_S + _ANSWER_S:g} s")
        kind = str(message["type"])
        return None if kind == "pong" else kind

    async def _now(self, client: Any) -> int:
        """The server's wall time in microseconds: replicas' and operators' clocks may differ."""
        seconds, microseconds = await client.time()
        return int(seconds) * 10**6 + int(microseconds)

    async def _documents(self, keys: Sequence[str]) -> list[Document]:
        """Those that were ever written, deleted ones included."""
        texts = await self._redis.hmget(DOCUMENTS, list(keys)) if keys else []
        return [
            self._document(key, text)
            for key, text in zip(keys, texts, strict=True)
            if text is not None
        ]

    def _document(self, key: str, text: bytes) -> Document:
        revision, separator, value = text.partition(b" ")
        try:
            return Document(key, value.decode() if separator else None, int(revision))
        except ValueError:
            raise StoreError(f"store {self.place}: the document {key!r} is damaged") from None

    async def _revisions(self, pipe: Any, expected: Mapping[str, int]) -> dict[str, int]:
        """Of the expected documents, 0 where one does not exist, while the pipe watches."""
        texts = await pipe.hmget(DOCUMENTS, list(expected)) if expected else []
        documents = (
            self._document(key, text)
            for key, text in zip(expected, texts, strict=True)
            if text is not None
        )
        return dict.fromkeys(expected, 0) | {
            each.key: each.revision for each in documents if each.value is not None
        }

    async def _write(
        self,
        pipe: Any,
        revision: int,
        writes: Mapping[str, str | None],
        record: Mapping[str, Any],
        token: str,
    ) -> None:
        """Raises WatchError when somebody else has committed since the pipe began to watch."""
        pipe.multi()
        pipe.set(EPOCH, uuid.uuid4().hex, nx=True)
        pipe.incr(REVISION)
        if writes:
            texts = {
                key: f"{revision}" if value is None else f"{revision} {value}"
                for key, value in writes.items()
            }
            pipe.hset(DOCUMENTS, mapping=texts)
            pipe.zadd(CHANGED, dict.fromkeys(writes, revision))
        pipe.xadd(AUDIT, {**record, "token": token}, id=f"{revision}-0")
        pipe.publish(CHANNEL, str(revision))
        await pipe.execute()

    async def _is_made(self, revision: int, token: str) -> bool:
        entries = await self._redis.xrange(AUDIT, min=str(revision), max=str(revision))
        return any(entry.get(b"token") == token.encode() for _, entry in entries)

    def _record(self, vector_id: str, text: bytes | None) -> VectorRecord:
        try:
            about = json.loads(text or b"")
            manifest = Manifest.from_dict(about["manifest"])
            return VectorRecord(vector_id, manifest, int(about["size_bytes"]))
        except (ValueError, TypeError, KeyError, VectorError) as error:
            raise StoreError(
                f"store {self.place}: the manifest of {vector_id[:12]} is damaged: {error}"
            ) from error

    @contextmanager
    def _explained(self, writes: bool = False) -> Iterator[None]:
        try:
            yield
        except MasterNotFoundError:
            # Its text lists clients with all their options.
            raise StoreError(f"store {self.place}: no Sentinel names a master") from None
        except (RedisError, OSError) as error:
            # A pipeline's error begins with the command and its arguments, documents among them,
            # and has the server's words as a tuple.
            told = str(error).rpartition("caused error: ")[2].strip("(),\"'")
            text = told or type(error).__name__
            is_refused = isinstance(error, NoPermissionError) and writes
            kind = ReadOnlyError if is_refused else StoreError
            quoted = error if not isinstance(error, ResponseError) else None
            raise kind(f"store {self.place}: {text}") from quoted
