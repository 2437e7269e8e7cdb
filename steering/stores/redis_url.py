"""A Redis URL -> a client: plain, TLS, or by Sentinel. Connects to nothing.

    redis://user:password@host:port/db?option=value
    rediss://...                                      the same over TLS
    redis+sentinel://user:password@host:port,host2:port/service?option=value
    rediss+sentinel://...                             TLS to the Sentinels and to Redis

Options are redis-py's (ssl_ca_certs, ssl_certfile, ssl_keyfile, db...); for the Sentinels' own
credentials there are sentinel_username and sentinel_password.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from steering.errors import StoreError

CONNECT_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 2.0
HEALTH_CHECK_S = 10  # a connection that was idle for longer is tried before it is used
_SENTINEL = "+sentinel"
_SENTINEL_PORT = 26379


@dataclass(frozen=True)
class RedisClient:
    """place: scheme, hosts and path of the URL, for messages: no credentials, no options."""

    redis: Redis
    place: str
    sentinel: Sentinel | None = None

    async def close(self) -> None:
        await self.redis.aclose(close_connection_pool=True)
        if self.sentinel is not None:
            await self.sentinel.aclose()


def redis_client(url: str) -> RedisClient:
    """Raises StoreError for a URL that cannot be read; its text never holds the password."""
    place = without_credentials(url)
    try:
        scheme, _, rest = url.partition("://")
        if "@" in rest.partition("?")[2]:  # see `without_credentials`
            raise ValueError
        if scheme.endswith(_SENTINEL):
            return _by_sentinel(scheme.removesuffix(_SENTINEL), rest, place)
        host = urlsplit(url)
        if not host.hostname or (host.path.strip("/") and not host.path.strip("/").isdecimal()):
            raise ValueError
        options = _options(url) | {"ssl": scheme == "rediss"}
        return RedisClient(Redis(**options), place)
    except (ValueError, TypeError):
        # Not the library's own text: it may quote a part of the password.
        raise StoreError(
            f"store {place}: not a URL of the form redis://user:password@host:port/db?option=value "
            "or redis+sentinel://host:port,host2:port/service (rediss for TLS); special characters "
            "in the password and an @ in options must be percent-encoded, and options be ones that "
            "redis-py knows"
        ) from None


def without_credentials(url: str) -> str:
    """A URL as it may be shown: without user, password and options."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url if "@" not in url else url.rpartition("@")[2]
    front, _, options = rest.partition("?")
    if "@" in options:  # a password may hold the ?, and its beginning pass for a host and a port
        return f"{scheme}://..."
    hosts, slash, path = front.rpartition("@")[2].partition("/")
    return f"{scheme}://{hosts}{slash}{path}"


def _by_sentinel(scheme: str, rest: str, place: str) -> RedisClient:
    authority, _, query = rest.partition("?")
    address, _, service = authority.rpartition("@")[2].partition("/")
    credentials = authority.rpartition("@")[0]
    if not service or "/" in service or not address:
        raise ValueError
    names = [_address(part) for part in address.split(",")]
    options = _options(f"{scheme}://{credentials}{'@' if credentials else ''}redis?{query}")
    del options["host"]
    own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    if scheme == "rediss":
        options["ssl"] = True
    shared = {k: v for k, v in options.items() if k not in ("username", "password", "db")}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        names, sentinel_kwargs=shared | own, **options
    )
    return RedisClient(sentinel.master_for(service), place, sentinel)


def _options(url: str) -> dict[str, Any]:
    """What the URL says, with this store's bounds on waiting.

    A connection that turns out to be closed, as all are after a restart of the server, is made
    anew once. What was sent on it may be sent twice by that, which every command of the store
    bears but a commit; and that one watches keys, so the library leaves it to the store. After a
    timeout nothing is tried again: the caller has waited long enough.
    """
    defaults: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_S,
    }
    given: dict[str, Any] = {**parse_url(url)}
    for name in ("connection_class", "ssl"):  # the URL's scheme alone decides about TLS
        given.pop(name, None)
    own = {"retry": Retry(NoBackoff(), 1, (ConnectionError,)), "protocol": 2, "driver_info": None}
    return defaults | given | own


def _address(text: str) -> tuple[str, int]:
    parsed = urlsplit(f"//{text}")
    if not parsed.hostname:
        raise ValueError
    return parsed.hostname, parsed.port or _SENTINEL_PORT
