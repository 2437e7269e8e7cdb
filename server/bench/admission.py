"""What many tenants cost a replica, in this process: admitting a request, taking up a change."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.bench.fleet import keys_text
from server.bench.summary import Spread
from server.bench.target import BenchError
from server.directory import TenantDirectory
from server.documents import KEYS_PREFIX, TENANT_PREFIX, PolicyFields, TenantDocument, text_of
from server.policy import decide
from steering.stores.base import Changes, Document

_EPOCH = "bench"


@dataclass(frozen=True)
class _Vectors:
    id: str = "0" * 64


@dataclass(frozen=True)
class Admission:
    """Seconds. admit: key -> tenant -> policy -> plan, of a request with a picture; take_up: one
    changed policy, from what the store says to in force."""

    num_tenants: int
    admit: Spread
    take_up: Spread


def measure(policy: PolicyFields, num_tenants: int, num_calls: int = 2000) -> Admission:
    """Requests and changes go through the tenants in turn."""
    directory = TenantDirectory(policy)
    keys = {f"tenant-{n}": secrets.token_urlsafe(32) for n in range(num_tenants)}
    documents = [
        Document(key, text, 1)
        for name, key_text in keys.items()
        for key, text in (
            (TENANT_PREFIX + name, text_of(TenantDocument(policy=policy))),
            (KEYS_PREFIX + name, keys_text(key_text)),
        )
    ]
    directory.apply(Changes(_EPOCH, 1, tuple(documents)), is_whole=True)
    names, vectors = list(keys), _Vectors()

    def admit(call: int) -> None:
        name, now = names[call % num_tenants], time.time()
        principal = directory.authenticate(keys[name], now)
        if principal is None or principal.tenant != name:
            raise BenchError(f"the key of {name} was not recognised")
        found = directory.policy(name, now)
        decide(found, None, True, vectors, kill=directory.kill, unit=principal.key_id)

    def take_up(call: int) -> None:
        name, revision = names[call % num_tenants], call + 2
        alphas = (policy.alpha / 2, policy.alpha)
        changed = policy.model_copy(update={"alpha": alphas[call % 2]})
        text = text_of(TenantDocument(policy=changed))
        directory.apply(
            Changes(_EPOCH, revision, (Document(TENANT_PREFIX + name, text, revision),))
        )

    return Admission(num_tenants, _timed(admit, num_calls), _timed(take_up, num_calls))


def _timed(call: Callable[[int], None], num_calls: int) -> Spread:
    times = []
    for number in range(num_calls):
        start = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - start)
    spread = Spread.of(times)
    assert spread is not None, "num_calls is above 0"
    return spread
