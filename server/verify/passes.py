"""The engine's passes over one prompt with a picture, and the bare model's: what each steered pass
was given and what came out. Does not judge (local.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from server.engine.batch import Batch, Chunk, Decoder, Rows, stacked_bases
from server.engine.cache import PromptCache
from server.engine.families import Family, bidirectional_blocks, embed, encode_image, family_of
from server.engine.inputs import InputBuilder
from server.engine.slab import KVShape, Slab
from server.engine.types import Prompt
from steering.extract import last_hidden
from steering.hooks import Injection, steer
from steering.layers import decoder_layers
from steering.methods import RowSteering
from steering.models import LoadedModel


class BareModel:
    """transformers' own model under the project's hooks; the engine's code has no part in it."""

    def __init__(self, loaded: LoadedModel, question: str, image: Image.Image) -> None:
        self._model, self._processor = loaded.model, loaded.processor
        self._question, self._image = question, image

    def states(
        self, steering: RowSteering | None = None, image: Image.Image | None = None
    ) -> Tensor:
        """h_l of the last prompt token after every layer, (L, D) float32; `image` another one."""
        with steer(decoder_layers(self._model)) as injector:
            if steering is not None:
                injector.injection = _injection(self._model, steering)
            picture = self._image if image is None else image
            return self._last(picture)

    def text_only(self) -> Tensor:
        """The same of the question without a picture."""
        return self._last(None)

    def _last(self, image: Image.Image | None) -> Tensor:
        return last_hidden(self._model, self._processor, [self._question], image)[:, 0]


def _injection(model: Any, steering: RowSteering) -> Injection:
    delta, device = steering.delta, model.device
    return Injection(
        deltas=None if delta is None else delta.to(device, model.dtype)[:, None],
        token=-1,
        bases=stacked_bases([steering.basis], device),
    )


@dataclass(frozen=True)
class Pass:
    """states (L, D) float32: what each layer's reader was given at the steered token. logits (V,).
    kv: of the prompt's tokens before the last, where the pass was a whole prompt's."""

    states: Tensor
    logits: Tensor
    kv: Tensor | None = None


class EnginePasses:
    """Takes the model over where the decoder does: run the bare model before.

    All methods run inside `torch.inference_mode()`. `build` makes the decoder, when the prompt has
    been embedded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        question: str,
        image: Image.Image,
        build: Callable[[], Decoder],
    ) -> None:
        self._model: Any = loaded.model
        self._family: Family = family_of(self._model)
        inputs = InputBuilder(self._family, self._model, loaded.processor)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        self.prompt: Prompt = inputs.build([{"role": "user", "content": content}], [image]).prompt
        self._shape = KVShape.of(self._model)
        features = {each.digest: encode_image(self._model, each) for each in self.prompt.images}
        self._embeds = embed(self._model, self.prompt, features, 0, len(self.prompt))[0]
        self.decoder = build()
        self._cache = PromptCache(self._shape, len(self.prompt))
        self.decoder.run(Batch(chunks=(self._chunk(self._cache, 0, len(self.prompt) - 1),)))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and products."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def whole(self, steering: RowSteering | None = None) -> Pass:
        """The whole prompt at once, into a cache of its own."""
        cache = PromptCache(self._shape, len(self.prompt))
        chunk = self._chunk(cache, 0, len(self.prompt), steering)
        traced = self._pass(Batch(chunks=(chunk,)))
        return replace(traced, kv=cache.kv[..., : len(self.prompt) - 1, :].clone())

    def prefill(self, steering: RowSteering | None = None) -> Pass:
        """The prompt's last token, on its cache."""
        length = len(self.prompt)
        return self._pass(Batch(chunks=(self._chunk(self._cache, length - 1, length, steering),)))

    def decode(self, steering: RowSteering | None = None) -> Pass:
        """The first answer token of a row; any token will do: the prompt's last one."""
        steering = steering or RowSteering()
        length, device = len(self.prompt), self._embeds.device
        slab = Slab(self._shape, length + 1)
        slab.put(0, self._cache.kv)
        axes = 3 if self._family.has_mrope else 1
        rows = Rows(
            embeds=self._embeds[-1:],
            positions=torch.tensor([[self.prompt.next_position]], device=device).expand(axes, -1),
            slab=slab,
            lengths=torch.tensor([length], device=device),
            longest=length,
        )
        delta = steering.delta
        deltas = None if delta is None else delta.to(device, self.decoder.steering_dtype)[:, None]
        bases = stacked_bases([steering.basis], device)
        return self._pass(Batch(slabs=(rows,), deltas=deltas, bases=bases))

    def _pass(self, batch: Batch) -> Pass:
        states, output = self.decoder.trace(batch)
        return Pass(states[:, 0], self.decoder.logits(output.hidden)[0])

    def _chunk(
        self, cache: PromptCache, start: int, end: int, steering: RowSteering | None = None
    ) -> Chunk:
        steering = steering or RowSteering()
        return Chunk(
            embeds=self._embeds[start:end],
            positions=self.prompt.position_ids[:, start:end].to(self._embeds.device),
            cache=cache,
            start=start,
            end=end,
            delta=steering.delta,
            basis=steering.basis,
            pictures=bidirectional_blocks(self._family, self._model, self.prompt),
        )


def at_layer(steering: RowSteering, layer: int) -> RowSteering:
    """The part of it that `layer` alone subtracts."""

    def only(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        kept = torch.zeros_like(table)
        kept[layer] = table[layer]
        return kept

    return RowSteering(delta=only(steering.delta), basis=only(steering.basis))
