"""How much a tenant may ask of one replica: requests per minute, and requests at once.

Does not cover the queue of the whole server (routes/chat.py) nor who asks (middleware.py).
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.errors import RateLimitError
from server.policy import Policy

CONCURRENCY_RETRY_S = 1.0  # when an answer ends, nobody knows


class TenantLimits:
    """Counts by tenant, over a moving minute and at this moment. Event loop only.

    A changed limit holds for the next request; a changed rate begins with an empty minute.
    """

    def __init__(self, rate: type[RateLimitItem] = RateLimitItemPerMinute) -> None:
        self._rate = rate  # tests count over a second
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    def num_running(self, tenant: str) -> int:
        return self._running[tenant]

    @contextmanager
    def admitted(self, policy: Policy) -> Iterator[None]:
        """Count one request of the policy's tenant, until the block is left. A request that is
        refused counts for nothing. Raises RateLimitError.
        """
        tenant = policy.tenant
        if policy.concurrency is not None and self._running[tenant] >= policy.concurrency:
            raise RateLimitError(
                f"{policy.concurrency} requests of this tenant are running, which is its limit",
                CONCURRENCY_RETRY_S,
            )
        self._count_in_window(policy)
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    def _count_in_window(self, policy: Policy) -> None:
        if policy.requests_per_minute is None:
            return
        item = self._rate(policy.requests_per_minute)
        if self._limiter.hit(item, policy.tenant):
            return
        has_room_at = self._limiter.get_window_stats(item, policy.tenant).reset_time
        raise RateLimitError(
            f"this tenant's limit of {policy.requests_per_minute} requests a minute is reached",
            has_room_at - time.time(),
        )
