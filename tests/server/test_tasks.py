"""A task ends also when a library loses its cancellation."""

import asyncio

import pytest

from server.tasks import ended

pytestmark = pytest.mark.anyio


async def test_a_task_that_lost_a_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With Redis, a replica that was stopped while it wrote a command never ended."""
    monkeypatch.setattr("server.tasks.AGAIN_S", 0.01)
    lost = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost.append(1)
        await asyncio.sleep(60)

    async def failing() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ZeroDivisionError

    tasks = [asyncio.create_task(each) for each in (stubborn(), failing())]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await ended(*tasks)
    assert lost and tasks[0].cancelled()
    assert isinstance(tasks[1].exception(), ZeroDivisionError)


async def test_there_may_be_nothing_to_end() -> None:
    await ended()
