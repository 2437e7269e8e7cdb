"""Ending tasks for certain."""

import asyncio
from typing import Any

AGAIN_S = 1.0


async def ended(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks and wait for their ends, whatever they raise.

    Again and again: Python 3.11's asyncio.wait_for, which redis-py uses, loses a cancellation that
    comes as it is done, and its task went on for ever.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
