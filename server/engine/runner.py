"""The forward passes: prefill of one prompt's chunk, decode of all rows, both under the hooks.

Owns the model, the row cache and the steering table. Does not decide what runs (scheduler.py)
nor which token is taken (sampling.py).
"""

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from server.engine.cache import KVShape, PromptCache, RowCache
from server.engine.families import Family, embed
from server.engine.scheduler import PrefillChunk, RowMove
from server.engine.sequences import ActiveRequest, Sequence
from server.engine.types import EngineError
from steering.hooks import Injection, Injector
from steering.layers import text_config


class SteeringFaultError(EngineError):
    """The hooks did not do what was planned; the engine must not go on."""


class Runner:
    """All methods run on the engine thread, inside `torch.inference_mode()`."""

    def __init__(self, family: Family, model: Any, injector: Injector, max_rows: int) -> None:
        self._family = family
        self._model = model
        self._decoder = model.get_decoder()
        self._injector = injector
        self._shape = KVShape.of(model)
        self._rows = RowCache(self._shape)
        # What each row subtracts at each layer, ready-made: (L, rows, D). Rewritten only when a
        # row joins, moves or leaves, so a decode step pays one subtraction a layer.
        hidden_size = text_config(model).hidden_size
        self._table = torch.zeros(
            injector.num_layers, max_rows, hidden_size, dtype=model.dtype, device=model.device
        )

    def prefill(self, chunk: PrefillChunk) -> Tensor | None:
        """Run a chunk of one prompt; after the last one return the logits, (1, V) float32.

        The prompt's last token alone is steered, so the chunk that holds it is the only one.
        """
        active = chunk.active
        if active.prompt_cache is None:
            self._begin_prompt(active)
        assert active.prompt_cache is not None and active.embeds is not None
        active.prompt_cache.begin(chunk.start)
        positions = active.request.inputs.position_ids[:, chunk.start : chunk.end]
        delta = active.request.delta
        injection = None
        if delta is not None and chunk.is_last:
            steps = delta.to(self._table).unsqueeze(1)  # (L, 1, D)
            injection = Injection(steps, token=chunk.end - chunk.start - 1)
        hidden = self._forward(
            active.embeds[:, chunk.start : chunk.end],
            positions.to(self._model.device).unsqueeze(1),  # (P, 1, T)
            _causal(chunk.start, chunk.end, self._model.device),
            active.prompt_cache,
            injection,
            [active],
        )
        return self._logits(hidden) if chunk.is_last else None

    def join(self, active: ActiveRequest, first_row: int, num_rows: int, length: int) -> None:
        """Copy a prefilled prompt into a row for each of its sequences.

        num_rows, length: what all admitted requests may come to need.
        """
        assert active.prompt_cache is not None
        self._rows.fit(num_rows, length)
        for row in range(first_row, first_row + len(active.sequences)):
            self._rows.insert(row, active.prompt_cache)
            self._table[:, row] = 0.0 if active.request.delta is None else active.request.delta
        active.prompt_cache = active.embeds = None

    def move(self, move: RowMove, length: int) -> None:
        """Follow the scheduler: a row of `length` tokens has moved into a gap."""
        self._rows.move(move.source, move.target, length)
        self._table[:, move.target] = self._table[:, move.source]

    def scrub(self, row: int) -> None:
        """Clear a row whose states are not numbers."""
        self._rows.scrub(row)

    def release(self) -> None:
        """Give the rows' memory back; no row is running."""
        self._rows.release()

    def decode(self, rows: Seq[Sequence]) -> Tensor:
        """One token further for every row: logits (B, V) float32."""
        device = self._model.device
        token_ids = torch.tensor([row.token_ids[-1] for row in rows], device=device)
        positions = torch.tensor([row.rope_position for row in rows], device=device)
        mask = self._rows.begin(torch.tensor([row.kv_len for row in rows], device=device))
        is_steered = any(row.active.request.delta is not None for row in rows)
        injection = Injection(self._table[:, : len(rows)], token=0) if is_steered else None
        embeds = self._model.get_input_embeddings()(token_ids[:, None])
        num_axes = 3 if self._family.has_mrope else 1
        hidden = self._forward(
            embeds,
            positions.expand(num_axes, -1)[..., None],  # (P, B, 1)
            mask,
            self._rows,
            injection,
            [row.active for row in rows],
        )
        return self._logits(hidden)

    def _begin_prompt(self, active: ActiveRequest) -> None:
        """Embed the prompt, pictures included, and make its cache."""
        inputs = active.request.inputs
        device = self._model.device
        active.embeds = embed(
            self._model,
            torch.tensor([inputs.token_ids], device=device),
            {name: tensor.to(device) for name, tensor in inputs.image_tensors.items()},
        )
        active.prompt_cache = PromptCache(self._shape, active.prompt_len)

    def _forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: PromptCache | RowCache,
        injection: Injection | None,
        actives: list[ActiveRequest],
    ) -> Tensor:
        """Run the decoder on embeds (B, T, D), positions (P, B, T); its last states (B, T, D)."""
        self._injector.take()  # of a pass that broke midway
        self._injector.injection = injection
        try:
            output = self._decoder(
                inputs_embeds=embeds,
                position_ids=positions if len(positions) > 1 else positions[0],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            self._injector.injection = None
        fired, inject_s = self._injector.take()
        if fired != self._injector.num_layers:
            raise SteeringFaultError(
                f"{fired} steering hooks fired in a pass over {self._injector.num_layers} layers"
            )
        for active in {id(active): active for active in actives}.values():
            active.inject_s += inject_s
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden[:, -1])
        return logits.float()


def _causal(start: int, end: int, device: torch.device) -> Tensor:
    """(1, 1, end - start, end): token i of the chunk sees all tokens up to start + i."""
    queries = torch.arange(start, end, device=device)[:, None]
    return (torch.arange(end, device=device) <= queries)[None, None]
