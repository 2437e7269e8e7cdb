"""The model families that the engine can serve, and all that differs between them.

A listed family passes the conformance suite (tests/server/engine). Any other is taken as its
processor and its model describe themselves, and must be checked against the bare model before it
serves. Does not run the decoder (runner.py) nor the processor (inputs.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from server.engine.types import EngineError, ImageInput, Prompt
from steering.layers import text_config


@dataclass(frozen=True)
class Family:
    """One architecture: what its vision tower takes, its positions and its masks.

    image_tensors: the processor's outputs that the vision tower takes; empty for an unlisted
    family, where all outputs but the text's are taken. vision_types: which towers; empty: the
    family has one of its own. has_mrope: positions have three axes, and a picture advances them by
    its longer side. has_bidirectional_images: the tokens of a block (`image_blocks`) see each
    other, not only those before; in a sliding-window layer still within the window.
    has_sliding_layers: its config's `layer_types` may say `sliding_attention`, a mask of its own.
    is_known: passes the conformance suite; if not, check it against the bare model first.
    """

    name: str
    model_type: str
    image_tensors: tuple[str, ...] = ()
    vision_types: tuple[str, ...] = ()
    has_mrope: bool = False
    has_bidirectional_images: bool = False
    has_sliding_layers: bool = False
    is_known: bool = True


_CLIP = ("clip_vision_model", "clip")
_TILES = ("pixel_values", "pixel_attention_mask")
_GRID = ("pixel_values", "image_grid_thw")

FAMILIES = (
    Family("LLaVA-1.5", "llava", ("pixel_values",), _CLIP),
    Family("LLaVA-NeXT", "llava_next", ("pixel_values", "image_sizes"), _CLIP),
    Family("Idefics3", "idefics3", _TILES),
    Family("SmolVLM", "smolvlm", _TILES),
    Family("Qwen2-VL", "qwen2_vl", _GRID, has_mrope=True),
    Family("Qwen2.5-VL", "qwen2_5_vl", _GRID, has_mrope=True),
    Family(
        "Gemma 3",
        "gemma3",
        ("pixel_values",),
        ("siglip_vision_model",),
        has_bidirectional_images=True,
        has_sliding_layers=True,
    ),
)


def family_of(model: Any) -> Family:
    """The model's family. Raises EngineError, with the reason, where it cannot be served."""
    model_type = model.config.model_type
    for family in FAMILIES:
        if family.model_type == model_type:
            vision_type = model.config.vision_config.model_type
            if family.vision_types and vision_type not in family.vision_types:
                raise EngineError(
                    f"{family.name} with a {vision_type!r} vision tower is not served"
                )
            break
    else:
        family = _unlisted(model)
    _check_attention(family, model)
    return family


def _unlisted(model: Any) -> Family:
    """What can be known of a family that is not listed."""
    model_type = model.config.model_type
    if not hasattr(model, "get_image_features") or _placeholder(model) is None:
        served = ", ".join(family.name for family in FAMILIES)
        raise EngineError(
            f"model type {model_type!r} is not served, because its pictures do not become tokens "
            f"of the prompt; served are: {served}"
        )
    return Family(
        name=model_type,
        model_type=model_type,
        has_mrope=hasattr(model.base_model, "get_rope_index"),
        has_sliding_layers=True,
        is_known=False,
    )


def _check_attention(family: Family, model: Any) -> None:
    """Refuse attention that no mask made here expresses; a short self-check would not see it."""
    text = text_config(model)
    layer_types = set(getattr(text, "layer_types", None) or ())
    has_window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    is_sliding = bool(has_window) or "sliding_attention" in layer_types
    if is_sliding and not (family.has_sliding_layers and layer_types):
        # Without `layer_types` nothing says which layers slide.
        raise EngineError(f"{family.name} with sliding-window attention is not served")
    if other := layer_types - {"full_attention", "sliding_attention"}:
        kinds = ", ".join(sorted(other))
        raise EngineError(f"{family.name} with layers of type {kinds} is not served")
    if getattr(text, "use_bidirectional_attention", None):
        raise EngineError(f"{family.name} with text that sees later text is not served")


def image_token_id(model: Any) -> int:
    """The token that stands for one image feature."""
    token_id = _placeholder(model)
    assert token_id is not None, "family_of refuses a model without one"
    return token_id


def _placeholder(model: Any) -> int | None:
    names = ("image_token_id", "image_token_index")
    found = (getattr(model.config, name, None) for name in names)
    return next((token_id for token_id in found if token_id is not None), None)


def positions(
    family: Family, model: Any, token_ids: Sequence[int], images: Sequence[ImageInput]
) -> tuple[Tensor, int]:
    """Rotary positions of a prompt (P, T), and the position of its first generated token.

    P is 3 for M-RoPE, else 1. Reads the configuration only, so that it may run beside the engine
    thread.
    """
    plain = torch.arange(len(token_ids))
    if not family.has_mrope:
        return plain[None], len(token_ids)
    if not images:
        return plain.expand(3, -1), len(token_ids)
    tokens = torch.tensor([token_ids])
    ids, deltas = model.base_model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == image_token_id(model)).int(),
        image_grid_thw=torch.cat([image.tensors["image_grid_thw"] for image in images]),
    )
    return ids[:, 0], len(token_ids) + int(deltas[0, 0])


def image_blocks(model: Any, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of placeholders, in order: what sees itself in both directions
    where the family `has_bidirectional_images`.

    A picture that is cut into crops is several blocks.
    """
    placeholder = image_token_id(model)
    runs = groupby(range(len(token_ids)), key=lambda i: token_ids[i] == placeholder)
    blocks = [list(places) for is_image, places in runs if is_image]
    return [(places[0], places[-1] + 1) for places in blocks]


def bidirectional_blocks(family: Family, model: Any, prompt: Prompt) -> tuple[tuple[int, int], ...]:
    """[start, end) of each run of the prompt's tokens that see each other both ways, in order;
    empty where the family has none."""
    if not family.has_bidirectional_images:
        return ()
    return tuple(image_blocks(model, prompt.token_ids))


def encode_image(model: Any, image: ImageInput) -> Tensor:
    """Vision tower and projector on one picture: (num_features, D), the model's dtype and device.

    Call on the engine thread. Raises EngineError when features and placeholders differ in number.
    """

    def placed(tensor: Tensor) -> Tensor:
        dtype = model.dtype if tensor.is_floating_point() else None
        return tensor.to(model.device, dtype)

    tensors = {name: placed(tensor) for name, tensor in image.tensors.items()}
    output = model.get_image_features(**tensors, return_dict=True)
    parts = getattr(output, "pooler_output", output)
    if isinstance(parts, Tensor):
        parts = [parts]
    features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).to(model.dtype)
    if len(features) != image.num_features:
        raise EngineError(
            f"{image.num_features} image placeholders but {len(features)} image features"
        )
    return features


def images_between(prompt: Prompt, start: int, end: int) -> list[ImageInput]:
    """The pictures whose features tokens [start, end) need, in order."""
    return [image for image in prompt.images if image.start < end and image.end > start]


def embed(
    model: Any, prompt: Prompt, features: Mapping[str, Tensor], start: int, end: int
) -> Tensor:
    """Embeddings of tokens [start, end), (1, end - start, D), pictures in their placeholders.

    features: by digest, (num_features, D) of each of `images_between(prompt, start, end)`; a
    picture that lies partly outside gives only what belongs to the placeholders inside.
    """
    device = model.device
    placeholder = image_token_id(model)
    # A placeholder may lie outside the vocabulary; its embedding is overwritten.
    ids = [0 if token == placeholder else token for token in prompt.token_ids[start:end]]
    embeds: Tensor = model.get_input_embeddings()(torch.tensor(ids, device=device))  # (T, D)
    for image in images_between(prompt, start, end):
        places = [i for i in range(image.start, image.end) if prompt.token_ids[i] == placeholder]
        inside = [(n, i - start) for n, i in enumerate(places) if start <= i < end]
        if inside:
            first, last = inside[0][0], inside[-1][0]
            index = torch.tensor([i for _, i in inside], device=device)
            rows = features[image.digest][first : last + 1].to(embeds)
            embeds = embeds.index_copy(0, index, rows)
    return embeds[None]
