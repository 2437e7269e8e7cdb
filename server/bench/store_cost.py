"""What Redis does for a change: its own counts before and after, replicas' reads included."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from redis.asyncio import Redis


@dataclass(frozen=True)
class StoreCost:
    """Of one change, on average: commands that Redis ran, and bytes that it sent, to everybody.

    The replicas' reads and heartbeats of that time are in it.
    """

    num_tenants: int
    num_changes: int
    commands: float
    sent_bytes: float


async def store_cost(
    url: str, num_tenants: int, num_changes: int, change: Callable[[], Awaitable[object]]
) -> StoreCost:
    """Call `change` so often, and count. Raises RedisError."""
    async with Redis.from_url(url) as client:
        before = await client.info("stats")
        for _ in range(num_changes):
            await change()
        after = await client.info("stats")
    commands, sent = (
        (after[name] - before[name]) / num_changes
        for name in ("total_commands_processed", "total_net_output_bytes")
    )
    return StoreCost(num_tenants, num_changes, commands, sent)
