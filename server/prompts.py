"""Conversation and pictures -> what the engine is asked. Blocking: for the thread pool.

Does not cover decoding pictures (media.py) nor who decides the plan (policy.py).
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from server.engine.api import Engine
from server.engine.types import EngineInputs, OnError, PairError
from steering.plan import SteeringPlan


def prepared(
    engine: Engine,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Image.Image],
    plan: SteeringPlan,
    on_error: OnError,
) -> tuple[EngineInputs, SteeringPlan]:
    """The engine's inputs, and the plan that can be followed with them.

    Without its pair of prompts a request goes on unsteered if `on_error` says so. Raises what
    Engine.prepare raises.
    """
    try:
        return engine.prepare(messages, images, plan.corruption_in_force), plan
    except PairError:
        if on_error == "reject":
            raise
    return engine.prepare(messages, images), plan.unsteered("shift-failed")
