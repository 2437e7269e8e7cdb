"""The language model run by its own modules under the steering hooks: the reference decoder.

One forward for every chunk and one for the rows of every slab. Serves families that fused.py does
not know, and is what tests compare it with.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from server.engine.batch import Batch, Chunk, Output, stacked_bases
from server.engine.cache import PromptCache
from server.engine.slab import Slab
from steering.hooks import Injection, Injector, record, record_inputs
from steering.layers import decoder_layers, text_config
from steering.methods import sample_delta


class EagerDecoder:
    """Works inside `steering.hooks.steer`, whose injector it is given."""

    def __init__(self, model: Any, injector: Injector) -> None:
        self._model = model
        self._decoder = model.get_decoder()
        self._layers = decoder_layers(model)
        self._injector = injector
        self.steering_dtype = model.dtype
        self.num_layers = len(self._layers)
        config = text_config(model)
        # One mask for each kind of layer; a model of one kind takes the mask itself.
        self._layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
        self._window: int = getattr(config, "sliding_window", None) or 0

    def run(self, batch: Batch) -> Output:
        self._injector.take()  # of a pass that broke midway
        shifts: dict[int, tuple[Tensor, Tensor]] = {}
        hidden: list[Tensor] = []
        wanted = {number for number, chunk in enumerate(batch.chunks) if chunk.wants_states}
        measured = {
            i for c in batch.chunks if c.shift for i in (c.shift.corrupted, c.shift.text_only)
        }
        states: dict[int, Tensor] = {}
        for number, chunk in enumerate(batch.chunks):
            delta, shift = chunk.delta, chunk.shift
            if shift is not None:
                corrupted, text_only = states[shift.corrupted], states[shift.text_only]
                delta = sample_delta(shift.plan, corrupted, text_only, shift.directions)
                shifts[number] = (delta, delta.norm(dim=-1) / corrupted.norm(dim=-1))
            if number in measured | wanted:
                with record(self._layers) as recorder:
                    last = self._run_chunk(chunk, delta)
                states[number] = recorder.last_hidden()[:, 0]
            else:
                last = self._run_chunk(chunk, delta)
            if chunk.wants_hidden:
                hidden.append(last)
        for part in _slabs(batch):
            hidden.append(self._run_rows(part))
        fired, injected = self._injector.take()
        return Output(
            hidden=torch.cat(hidden) if hidden else batch.chunks[0].embeds[:0],
            shifts=shifts,
            states={number: states[number] for number in wanted},
            fired=fired,
            forwards=len(batch.chunks) + len(batch.slabs),
            injected=injected,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits.float()

    def trace(self, batch: Batch) -> tuple[Tensor, Output]:
        seen: list[Tensor] = []
        outputs: list[Output] = []
        readers = [*self._layers[1:], self._decoder.norm]
        with record_inputs(readers) as recorder:
            for part in _parts(batch):
                outputs.append(self.run(part))
                seen.append(recorder.last_hidden())
        output = Output(
            hidden=torch.cat([part.hidden for part in outputs]),
            fired=sum(part.fired for part in outputs),
            forwards=len(outputs),
        )
        return torch.cat(seen, dim=1), output

    def _run_chunk(self, chunk: Chunk, delta: Tensor | None) -> Tensor:
        """The normed state of its last token, (1, D)."""
        chunk.cache.begin(chunk.start)
        embeds, injection = chunk.embeds, None
        if delta is not None or chunk.basis is not None:
            injection = Injection(
                None if delta is None else delta.to(embeds.device, embeds.dtype)[:, None],
                token=len(chunk) - 1,
                bases=stacked_bases([chunk.basis], embeds.device),
            )
        queries = torch.arange(chunk.start, chunk.end, device=chunk.embeds.device)
        keys = torch.arange(chunk.end, device=chunk.embeds.device)
        pictures = torch.zeros(len(queries), len(keys), dtype=torch.bool, device=keys.device)
        for first, end in chunk.pictures:
            inside = (queries >= first) & (queries < end)
            pictures |= inside[:, None] & (keys >= first) & (keys < end)
        masks = self._masks(queries[None, :, None], keys, pictures)
        positions = chunk.positions[:, None]  # (P, 1, T)
        return self._forward(embeds[None], positions, masks, chunk.cache, injection)[0, -1:]

    def _run_rows(self, batch: Batch) -> Tensor:
        """Of one slab; the normed states, (B, D)."""
        (rows,) = batch.slabs
        rows.slab.begin(rows.lengths, rows.longest)
        injection = None
        if batch.deltas is not None or batch.bases is not None:
            injection = Injection(batch.deltas, token=0, bases=batch.bases)
        keys = torch.arange(rows.slab.width, device=rows.lengths.device)
        masks = self._masks(rows.lengths[:, None, None], keys, None)
        positions = rows.positions[..., None]  # (P, B, 1)
        return self._forward(rows.embeds[:, None], positions, masks, rows.slab, injection)[:, 0]

    def _masks(self, queries: Tensor, keys: Tensor, pictures: Tensor | None) -> Any:
        """Bool masks (B, 1, T, S), True where a token may be seen: one, or one a layer type."""
        causal = keys <= queries
        masks = {}
        for layer_type in self._layer_types or ["full_attention"]:
            seen = causal if pictures is None else causal | pictures
            if layer_type == "sliding_attention":
                seen = seen & (keys > queries - self._window)
            masks[layer_type] = seen[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        masks: Any,
        cache: PromptCache | Slab,
        injection: Injection | None,
    ) -> Tensor:
        """embeds (B, T, D), positions (P, B, T) -> normed last states (B, T, D)."""
        self._injector.injection = injection
        try:
            output = self._decoder(
                inputs_embeds=embeds,
                position_ids=positions if len(positions) > 1 else positions[0],
                attention_mask=masks,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            self._injector.injection = None
        hidden: Tensor = output.last_hidden_state
        return hidden


def _slabs(batch: Batch) -> Iterator[Batch]:
    """The rows of each slab with what they subtract."""
    first = 0
    for rows in batch.slabs:
        end = first + len(rows.embeds)
        yield Batch(
            slabs=(rows,),
            deltas=None if batch.deltas is None else batch.deltas[:, first:end],
            bases=None if batch.bases is None else batch.bases[:, first:end],
        )
        first = end


def _parts(batch: Batch) -> list[Batch]:
    """Every chunk and the rows of every slab apart."""
    return [*(Batch(chunks=(chunk,)) for chunk in batch.chunks), *_slabs(batch)]
