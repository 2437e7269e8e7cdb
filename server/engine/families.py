"""The model families that the engine can serve, and what differs between them.

A family is listed only when it passes the conformance suite (tests/server/engine).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engine.types import EngineError
from steering.layers import text_config


@dataclass(frozen=True)
class Family:
    """One architecture: which processor outputs its vision tower takes, and its positions."""

    name: str
    model_type: str
    image_tensors: tuple[str, ...]
    has_mrope: bool = False
    vision_types: tuple[str, ...] = ()  # which towers; empty: the family has one of its own


FAMILIES = (
    Family("LLaVA-1.5", "llava", ("pixel_values",), vision_types=("clip_vision_model", "clip")),
    Family("Qwen2-VL", "qwen2_vl", ("pixel_values", "image_grid_thw"), has_mrope=True),
)


def family_of(model: Any) -> Family:
    """The model's family. Raises EngineError, naming those served, for any other."""
    model_type = model.config.model_type
    served = ", ".join(family.name for family in FAMILIES)
    for family in FAMILIES:
        if family.model_type == model_type:
            break
    else:
        raise EngineError(f"model type {model_type!r} is not served; served are: {served}")
    vision_type = model.config.vision_config.model_type
    if family.vision_types and vision_type not in family.vision_types:
        raise EngineError(f"{family.name} with a {vision_type!r} vision tower is not served")
    text = text_config(model)
    layer_types = set(getattr(text, "layer_types", None) or ())
    has_window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if layer_types - {"full_attention"} or has_window:
        # The masks made here let every token see all before it.
        raise EngineError(f"{family.name} with sliding-window attention is not served")
    return family


def embed(model: Any, token_ids: Tensor, image_tensors: dict[str, Tensor]) -> Tensor:
    """Token embeddings with the picture's features in the placeholders: (1, T) -> (1, T, D).

    Runs the vision tower. Raises EngineError when features and placeholders differ in number.
    """
    embeds: Tensor = model.get_input_embeddings()(token_ids)
    if not image_tensors:
        return embeds
    output = model.model.get_image_features(**image_tensors, return_dict=True)
    features = torch.cat(list(output.pooler_output)).to(embeds.dtype)
    placeholders = token_ids == model.config.image_token_id
    if int(placeholders.sum()) != len(features):
        raise EngineError(
            f"{int(placeholders.sum())} image placeholders but {len(features)} image features"
        )
    return embeds.masked_scatter(placeholders[..., None], features)


def positions(
    family: Family, model: Any, token_ids: Tensor, processed: dict[str, Tensor]
) -> tuple[Tensor, int]:
    """Rotary positions of a prompt (P, T) and of its first generated token.

    P is 3 for M-RoPE, where a picture advances the position by its longer side, else 1.
    Reads the configuration only, so that it may run beside the engine thread.
    """
    num_tokens = token_ids.shape[1]
    if not family.has_mrope or "image_grid_thw" not in processed:
        return torch.arange(num_tokens)[None], num_tokens
    ids, deltas = model.model.get_rope_index(
        token_ids,
        mm_token_type_ids=processed["mm_token_type_ids"],
        image_grid_thw=processed["image_grid_thw"],
    )
    return ids[:, 0], num_tokens + int(deltas[0, 0])
