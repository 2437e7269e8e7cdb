"""Which decoder runs the model: this project's own pass, or the model's own modules."""

import logging
from contextlib import ExitStack
from typing import Any, Literal

from server.engine.batch import Decoder
from server.engine.compiled import CompiledDecoder
from server.engine.eager import EagerDecoder
from server.engine.fused import FusedDecoder, can_fuse
from server.engine.types import EngineError
from steering.hooks import steer
from steering.layers import decoder_layers
from steering.stopwatch import stopwatch_of

logger = logging.getLogger(__name__)

DecoderChoice = Literal["auto", "eager", "fused", "compiled"]


def build_decoder(choice: DecoderChoice, model: Any, life: ExitStack) -> Decoder:
    """The decoder of `choice`; `auto` is compiled where that can be, else fused where `can_fuse`,
    else eager.

    Hooks stay installed for `life`. A fused or compiled decoder takes the model's weights over.
    Raises EngineError where one of these is asked for and cannot be, ModelError where the layers
    are not those of the configuration.
    """
    if choice in ("fused", "compiled") and not can_fuse(model):
        name = type(model.get_decoder()).__name__
        raise EngineError(f"{name} cannot run {choice} here; choose decoder auto or eager")
    if choice == "eager" or not can_fuse(model):
        hooks = steer(decoder_layers(model), stopwatch_of(model.device))
        return EagerDecoder(model, life.enter_context(hooks))
    if choice == "fused":
        return FusedDecoder(model)
    try:
        return CompiledDecoder(model)
    except EngineError as error:
        if choice == "compiled":
            raise
        logger.info("decoder fused, not compiled: %s", error)
        return FusedDecoder(model)
