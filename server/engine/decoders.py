"""Which decoder runs the model: this project's own pass, or the model's own modules."""

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

DecoderChoice = Literal["auto", "eager", "fused", "compiled"]


def build_decoder(choice: DecoderChoice, model: Any, life: ExitStack) -> Decoder:
    """The decoder of `choice`; `auto` is fused where `can_fuse`, else eager.

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
    return CompiledDecoder(model) if choice == "compiled" else FusedDecoder(model)
