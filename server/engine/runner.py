"""One step's forward pass: prompts' chunks and every row's next token, together.

Owns the model, the caches and the steering table. Does not decide what runs (scheduler.py), how
the layers are computed (fused.py, eager.py) nor which token is taken (sampling.py).
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from server.engine.batch import Batch, Chunk, Decoder, Output, Rows, Shift, stacked_bases
from server.engine.cache import PromptCache, RowCache
from server.engine.costs import Costs
from server.engine.families import Family, bidirectional_blocks, embed, encode_image, images_between
from server.engine.measured import take_measured
from server.engine.prefix import PrefixCache, blocks_of
from server.engine.scheduler import PrefillChunk
from server.engine.sequences import ActiveRequest, PromptState, Sequence
from server.engine.slab import KVShape, Slab
from server.engine.stats import Counters
from server.engine.types import EngineError, ImageInput
from server.engine.vision import SHARED_NAMESPACE, VisionCache
from steering.corruption import MEANINGLESS


class SteeringFaultError(EngineError):
    """Steering did not have its turn as planned; the engine must not go on."""


class ShiftFailedError(EngineError):
    """A request's own shift cannot be measured; `on_error` decides what becomes of it."""


class Runner:
    """All methods run on the engine thread, inside `torch.inference_mode()`."""

    def __init__(
        self,
        family: Family,
        model: Any,
        decoder: Decoder,
        counters: Counters,
        max_len: int,
        max_rows: int,
        max_tokens: int,
        prefix: PrefixCache,
        vision: VisionCache,
    ) -> None:
        self._family = family
        self._model = model
        self._decoder = decoder
        self._counters = counters
        self._device: torch.device = model.device
        self.costs = Costs(self._device, counters)
        self._shape = KVShape.of(model)
        self._rows: RowCache[Sequence] = RowCache(self._shape, max_len, max_rows, max_tokens)
        self.prefix = prefix
        self.vision = vision
        # What the rows subtract at each layer, ready-made: (L, rows, D), None when nothing, and the
        # bases (L, rows, k, D) of those that project. Rewritten only when rows join, move or
        # leave, so a decode step pays one subtraction a layer.
        self._deltas: Tensor | None = None
        self._bases: Tensor | None = None
        self._order: list[Sequence] = []
        self._slabs: list[tuple[Slab, list[Sequence]]] = []

    def admit(self, active: ActiveRequest) -> None:
        """Make its prompts' caches and fill them with what the prefix cache has."""
        for state in active.prompts:
            state.cache = PromptCache(self._shape, len(state.prompt))
            state.blocks = list(blocks_of(state.prompt, active.request.namespace))
            state.num_cached = self.prefix.load(state.blocks, state.cache.kv, state.asker)
            state.num_done = state.num_cached

    def embed(self, chunk: PrefillChunk) -> None:
        """Before a prompt's first chunk: embed what is left of it, pictures included.

        Raises ShiftFailedError where that fails for a prompt of the pair.
        """
        state, active = chunk.state, chunk.active
        if state.embeds is not None:
            return
        if state.role == "own":
            self._embed(state, active, chunk.start)
            return
        try:
            with self.costs.timed(active.book_shift):
                self._embed(state, active, chunk.start)
        except Exception as error:  # boundary: pictures of the pair fall under on_error
            raise ShiftFailedError(f"the {state.role} prompt cannot be embedded") from error

    def arrange(self, rows: Seq[Sequence]) -> list[Sequence]:
        """Make room for every row's next token; the rows in the order in which `run` takes them."""
        self._slabs = self._rows.arrange({row: row.kv_len for row in rows})
        order = [row for _, slab_rows in self._slabs for row in slab_rows]
        if order != self._order:
            self._order = order
            self._deltas = self._steering_table(order)
            self._bases = stacked_bases([row.active.basis for row in order], self._device)
        return order

    def run(
        self,
        chunks: Seq[PrefillChunk],
        rows: Seq[Sequence],
        probes: Seq[ActiveRequest] = (),
    ) -> Tensor:
        """Run a step; logits (F + B, V) float32: of the own prompts that end here, in the chunks'
        order, then of every row. `rows`: all, as `arrange` returned them, or none.

        A request that measures its shift here has it in `delta` afterwards, and in `doses` what it
        came to; one whose gate is read here its `opening`; they may be no numbers. So may the
        `projection` of those in `probes`, whose own prompts' last tokens run once more, unsteered.
        """
        with self.costs.timed(lambda seconds: self.costs.book_pass(chunks, rows, probes, seconds)):
            batch = self._batch(chunks, rows, probes)
            output = self._checked(batch)
            take_measured(batch, output, chunks, probes)
            for chunk in chunks:
                self._keep(chunk)
            hidden = output.hidden
            # Nothing to look at when no prompt has ended and no row runs.
            logits = self._decoder.logits(hidden) if len(hidden) else hidden
        self.costs.book_injection(chunks, rows, output)
        return logits

    def _checked(self, batch: Batch) -> Output:
        output = self._decoder.run(batch)
        if output.fired != self._decoder.num_layers * output.forwards:
            raise SteeringFaultError(
                f"steering had its turn {output.fired} times in {output.forwards} passes over "
                f"{self._decoder.num_layers} layers"
            )
        return output

    def join(self, active: ActiveRequest) -> None:
        """Copy a prefilled prompt into a row for each of its sequences."""
        assert active.own.cache is not None
        for row in active.sequences:
            self._rows.join(row, active.own.cache)
        active.release(keeps_last=active.is_probed)

    def leave(self, row: Sequence, is_clean: bool) -> None:
        """Free a row; not clean: its states are not numbers."""
        self._rows.leave(row, is_clean)
        self._order, self._slabs = [], []  # what the cache holds has moved, or has been dropped

    def _embed(self, state: PromptState, active: ActiveRequest, start: int) -> None:
        is_shared = state.role == "corrupted" and active.request.plan.corruption in MEANINGLESS
        namespace = SHARED_NAMESPACE if is_shared else active.request.namespace
        end = len(state.prompt)

        def encode(image: ImageInput) -> Tensor:
            with self.costs.timed(self._counters.vision_encode_s.observe):
                return encode_image(self._model, image)

        features = {
            image.digest: self.vision.features(image, namespace, encode)
            for image in images_between(state.prompt, start, end)
        }
        state.embeds = embed(self._model, state.prompt, features, start, end)[0]
        state.embeds_start = start

    def _batch(
        self, chunks: Seq[PrefillChunk], rows: Seq[Sequence], probes: Seq[ActiveRequest]
    ) -> Batch:
        at = {id(chunk.state): number for number, chunk in enumerate(chunks)}
        parts = [self._chunk(chunk, at) for chunk in chunks]
        return Batch(
            chunks=(*parts, *(self._probe(active) for active in probes)),
            slabs=self._row_tokens() if rows else (),
            deltas=self._deltas if rows else None,
            bases=self._bases if rows else None,
        )

    def _chunk(self, chunk: PrefillChunk, at: dict[int, int]) -> Chunk:
        """`at`: the index in the batch of each prompt's chunk."""
        active = chunk.active
        part = self._part(chunk.state, chunk.start, chunk.end)
        if not chunk.is_last:
            return part
        if not chunk.ends_prefill:
            return replace(part, wants_states=active.request.probe or active.gate is not None)
        if not active.measures_shift:
            return replace(part, delta=active.delta, basis=active.basis, wants_hidden=True)
        corrupted, text_only, _ = (at[id(prompt)] for prompt in active.prompts)
        directions = active.request.steering.directions
        shift = Shift(active.request.plan, corrupted, text_only, directions)
        return replace(part, shift=shift, wants_hidden=True)

    def _probe(self, active: ActiveRequest) -> Chunk:
        """The own prompt's last token, on its own cache: what lies before it was never steered."""
        length = active.prompt_len
        return replace(self._part(active.own, length - 1, length), wants_states=True)

    def _part(self, state: PromptState, start: int, end: int) -> Chunk:
        """Tokens of a prompt, not steered."""
        assert state.cache is not None and state.embeds is not None
        offset = state.embeds_start
        return Chunk(
            embeds=state.embeds[start - offset : end - offset],
            positions=state.prompt.position_ids[:, start:end].to(self._device),
            cache=state.cache,
            start=start,
            end=end,
            pictures=bidirectional_blocks(self._family, self._model, state.prompt),
            wants_hidden=False,
        )

    def _row_tokens(self) -> tuple[Rows, ...]:
        """The newest token of every row, slab by slab."""
        numbers = [(row.token_ids[-1], row.rope_position, row.kv_len) for row in self._order]
        token_ids, positions, lengths = torch.tensor(numbers, device=self._device).T
        positions = positions.expand(3 if self._family.has_mrope else 1, -1)
        embeds = self._model.get_input_embeddings()(token_ids)
        slabs, end = [], 0
        for slab, rows in self._slabs:
            first, end = end, end + len(rows)
            slabs.append(
                Rows(
                    embeds=embeds[first:end],
                    positions=positions[:, first:end],
                    slab=slab,
                    lengths=lengths[first:end],
                    longest=max(row.kv_len for row in rows),
                )
            )
        return tuple(slabs)

    def _steering_table(self, rows: Seq[Sequence]) -> Tensor | None:
        """(L, rows, D) of the decoder's steering dtype; zero for rows that are not steered."""
        steered = {row: row.active.delta for row in rows if row.active.delta is not None}
        if not steered:
            return None
        # A vector set's shift comes from the host, a request's own from the device.
        deltas = {row: delta.to(self._device) for row, delta in steered.items()}
        zero = torch.zeros_like(next(iter(deltas.values())))
        table = torch.stack([deltas.get(row, zero) for row in rows], dim=1)
        return table.to(self._decoder.steering_dtype)

    def _keep(self, chunk: PrefillChunk) -> None:
        """What lies before a prompt's last token may serve others; kept chunk by chunk, so that
        no step pays for a long prompt at once."""
        state = chunk.state
        assert state.cache is not None
        self.prefix.store(state.blocks, state.cache.kv, chunk.end)
