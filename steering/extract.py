"""Anchors + model -> `ShiftVectors`: the dataset-level shift, measured in the unsteered model.

Each anchor is run twice, with the corrupted image and without an image, and the two hidden
states of the last prompt token are subtracted. Sums are kept, not states, so memory does not
grow with the anchor set unless a basis is asked for. Does not choose alpha.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steering.anchors import Anchor, AnchorSet, Label
from steering.corruption import Corruption, corrupt
from steering.errors import ModelError, PlanError
from steering.hooks import record
from steering.layers import decoder_layers
from steering.models import LoadedModel
from steering.ops import pairwise_cosine_of_sum
from steering.processors import writes_its_own_bos
from steering.vectors import Manifest, ShiftVectors

# The size that LLaVA-1.5's vision tower takes without resizing, and a multiple of Qwen2-VL's 28.
# Towers of a fixed size see the same corrupted image whatever it is; those of dynamic
# resolution make as many image tokens of it as of an ordinary small picture (144 in Qwen2-VL).
DEFAULT_IMAGE_SIZE = (336, 336)


def extract(
    loaded: LoadedModel,
    anchors: AnchorSet,
    *,
    corruption: Corruption = "blank",
    image_size: tuple[int, int] = DEFAULT_IMAGE_SIZE,
    batch_size: int = 8,
    basis_rank: int = 0,
    on_progress: Callable[[int], object] = lambda _num_done: None,
) -> ShiftVectors:
    """Measure the shift vectors of a model; the batch size changes the speed, not the result.

    image_size (width, height) of the corrupted image; basis_rank k keeps every prompt's shift
    (N, L, D) in memory; on_progress is called with the number of anchors done since the last
    call. Raises ModelError, PlanError, and VectorError where the states are not finite.
    """
    if corruption == "mean-colour":
        raise PlanError("mean-colour needs a request's image; choose blank, noise or gray")
    if batch_size < 1 or min(image_size) < 1 or not 0 <= basis_rank <= len(anchors):
        raise PlanError(
            f"batch size {batch_size} and image size {image_size} must be above zero, and the "
            f"basis rank {basis_rank} at most the number of anchors, {len(anchors)}"
        )
    image = corrupt(Image.new("RGB", image_size, "white"), corruption)
    sums = _Sums(loaded.identity.num_layers, loaded.identity.hidden_size, keep=basis_rank > 0)
    _add_all(sums, loaded, anchors, image, batch_size, on_progress)
    basis, singular_values = sums.basis(basis_rank)
    return ShiftVectors(
        manifest=Manifest(
            model=loaded.identity,
            corruption=corruption,
            image_size=f"{image_size[0]}x{image_size[1]}",
            anchor_set=anchors.name,
            anchor_set_digest=anchors.digest,
            num_anchors=len(anchors),
            versions=tuple((name, version(name)) for name in ("deshift", "torch", "transformers")),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        mean=sums.mean(),
        hidden_norm=sums.hidden_norm(),
        consistency=sums.consistency(),
        basis=basis,
        singular_values=singular_values,
        refusal_direction=sums.refusal_direction(),
        text_mean=sums.text_mean(),
    )


def _add_all(
    sums: "_Sums",
    loaded: LoadedModel,
    anchors: AnchorSet,
    image: Image.Image,
    batch_size: int,
    on_progress: Callable[[int], object],
) -> None:
    """Run every anchor with the image and without one, and add what the states were."""
    for start in range(0, len(anchors), batch_size):
        batch = anchors.anchors[start : start + batch_size]
        texts = [anchor.text for anchor in batch]
        try:
            with_image = last_hidden(loaded.model, loaded.processor, texts, image)
            text_only = last_hidden(loaded.model, loaded.processor, texts, None)
        except torch.OutOfMemoryError as error:
            raise ModelError(f"out of memory at batch size {batch_size}; lower it") from error
        sums.add(batch, with_image.cpu(), text_only.cpu())
        on_progress(len(batch))


@torch.inference_mode()
def last_hidden(
    model: Any, processor: Any, texts: Sequence[str], image: Image.Image | None
) -> Tensor:
    """h_l of the last prompt token of each text, (L, B, D) float32, on the model's device.

    Each text is one user turn through the model's own chat template, with `image` before it or
    without an image.
    """
    inputs = prompt_inputs(model, processor, texts, image)
    if "image_grid_thw" not in inputs:  # else the model itself makes M-RoPE positions of it
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
    with record(decoder_layers(model)) as recorder:
        model.base_model(**inputs, use_cache=False)
    return recorder.last_hidden()


def prompt_inputs(
    model: Any, processor: Any, texts: Sequence[str], image: Image.Image | None
) -> Any:
    """The model's keyword arguments for prompts as `last_hidden` takes them.

    Left-padded, so that the last position is every prompt's last token.
    """
    image_parts = [] if image is None else [{"type": "image"}]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*image_parts, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for text in texts
    ]
    inputs = processor(
        text=prompts,
        images=None if image is None else [[image] for _ in texts],
        padding=True,
        padding_side="left",
        add_special_tokens=not writes_its_own_bos(processor, prompts[0]),
        return_tensors="pt",
    ).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


class _Sums:
    """Running sums over prompts, in float64 so that the order of prompts does not show."""

    def __init__(self, num_layers: int, hidden_size: int, *, keep: bool) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self._num = 0
        self._shift = zeros(num_layers, hidden_size)
        self._unit = zeros(num_layers, hidden_size)
        self._unit_square = zeros(num_layers)
        self._text: dict[Label, Tensor] = {
            "harmful": zeros(num_layers, hidden_size),
            "harmless": zeros(num_layers, hidden_size),
        }
        self._num_text: dict[Label, int] = {"harmful": 0, "harmless": 0}
        self._norms: list[Tensor] = []
        self._shifts: list[Tensor] | None = [] if keep else None

    def add(self, batch: Sequence[Anchor], with_image: Tensor, text_only: Tensor) -> None:
        """with_image, text_only (L, B, D) float32."""
        shifts = with_image - text_only
        units = torch.nn.functional.normalize(shifts.double(), dim=-1)
        self._num += len(batch)
        self._shift += shifts.double().sum(dim=1)
        self._unit += units.sum(dim=1)
        self._unit_square += units.square().sum(dim=(1, 2))
        self._norms.append(with_image.norm(dim=-1))
        for row, anchor in enumerate(batch):
            self._text[anchor.label] += text_only[:, row].double()
            self._num_text[anchor.label] += 1
        if self._shifts is not None:
            self._shifts.append(shifts)

    def mean(self) -> Tensor:
        return (self._shift / self._num).float()

    def hidden_norm(self) -> Tensor:
        return torch.cat(self._norms, dim=1).median(dim=1).values

    def consistency(self) -> Tensor:
        return pairwise_cosine_of_sum(self._unit, self._unit_square, self._num).float()

    def refusal_direction(self) -> Tensor | None:
        """None for an anchor set of one label."""
        if not all(self._num_text.values()):
            return None
        harmful, harmless = (self._text[k] / self._num_text[k] for k in self._text)
        return (harmful - harmless).float()

    def text_mean(self) -> Tensor:
        return (torch.stack([*self._text.values()]).sum(dim=0) / self._num).float()

    def basis(self, rank: int) -> tuple[Tensor | None, Tensor | None]:
        """(L, k, D) right singular vectors of the uncentred shifts and (L, k) singular values.

        A singular vector's sign is free; the largest coordinate is made positive.
        """
        if self._shifts is None:
            return None, None
        per_layer = torch.cat(self._shifts, dim=1)  # (L, N, D)
        vectors, values = [], []
        for shifts in per_layer:
            _, singular, right = torch.linalg.svd(shifts, full_matrices=False)
            if len(right) < rank:
                raise PlanError(f"basis rank {rank} is above the hidden size, {len(right)}")
            top = right[:rank]
            peak = top.gather(1, top.abs().argmax(dim=1, keepdim=True))
            vectors.append(top * peak.sign())
            values.append(singular[:rank])
        return torch.stack(vectors), torch.stack(values)
