"""API keys of tenants: made, ended, kept as digests."""

import hashlib
import math
import secrets
from dataclasses import dataclass

from server.control.state import TenantState
from server.documents import KeyRecord, check_name
from server.errors import ExistsError, InvalidRequestError, NoSuchTenantError

MAX_KEYS = 100  # of one tenant
KEY_START = "dsk-"


@dataclass(frozen=True)
class NewKey:
    """`text` is the key itself: shown once, kept nowhere."""

    text: str
    record: KeyRecord
    revision: int


def new_key(key_id: str, expires_in_s: float | None, now: float) -> tuple[str, KeyRecord]:
    """A key's text, and what is kept of it. Raises InvalidRequestError."""
    checked(key_id, "key")
    if expires_in_s is not None and not 0 < expires_in_s < math.inf:
        raise InvalidRequestError("expires_in_s must be a time above 0", param="expires_in_s")
    text = KEY_START + secrets.token_urlsafe(32)
    return text, KeyRecord(
        id=key_id,
        digest=key_digest(text),
        created_at=now,
        expires_at=None if expires_in_s is None else now + expires_in_s,
    )


def ending(
    tenant: str, keys: tuple[KeyRecord, ...], key_id: str, now: float, in_s: float = 0.0
) -> tuple[KeyRecord, ...]:
    """The keys, with one that ends in `in_s` seconds, if it does not before; with 0 it is revoked.

    Raises NoSuchTenantError.
    """
    if key_id not in {key.id for key in keys}:
        raise NoSuchTenantError(f"the tenant {tenant!r} has no key {key_id[:80]!r}")
    return tuple(_ending(key, now, in_s) if key.id == key_id else key for key in keys)


def _ending(key: KeyRecord, now: float, in_s: float) -> KeyRecord:
    if in_s > 0:
        end = now + in_s
        return key.model_copy(update={"expires_at": end}) if key.is_valid(end) else key
    end_now = now if key.is_valid(now) else key.expires_at
    return key.model_copy(update={"expires_at": end_now, "is_revoked": True})


def key_digest(text: str) -> str:
    """What is kept of a key. A plain hash will do: keys are random and long."""
    return hashlib.sha256(text.encode()).hexdigest()


def without_oldest(keys: tuple[KeyRecord, ...], now: float) -> tuple[KeyRecord, ...]:
    """Where there are too many, without those whose time was over first."""
    over = sorted((key.expires_at or 0, key.id) for key in keys if not key.is_valid(now))
    dropped = {key_id for _, key_id in over[: max(0, len(keys) - MAX_KEYS)]}
    return tuple(key for key in keys if key.id not in dropped)


def with_new(held: TenantState, record: KeyRecord) -> tuple[KeyRecord, ...]:
    if record.id in {key.id for key in held.keys}:
        raise ExistsError(f"the tenant {held.name!r} has a key {record.id!r} already")
    return (*held.keys, record)


def checked(name: str, what: str) -> None:
    """Of an operator's new name. Raises InvalidRequestError."""
    try:
        check_name(name)
    except ValueError as error:
        raise InvalidRequestError(f"{what}: {error}", param=what) from None
