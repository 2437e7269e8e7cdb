"""Batches of random numbers, and the models that decoders are compared on."""

import copy
import math
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from server.engine.batch import Batch, Chunk, Rows, Shift, stacked_bases
from server.engine.cache import PromptCache
from server.engine.slab import KVShape, Slab
from steering.plan import Schedule
from tests.server.engine.conftest import built, sample_plan
from tests.tiny_models import build_tiny_llava

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Language models under LLaVA's tower, for what the tiny families do not have.
VARIANTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "Qwen2: biases of Q, K and V": (Qwen2Config, {}),
    "Mistral: wide heads that share one key": (
        MistralConfig,
        {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": None},
    ),
    "Llama: every bias, a key for each head": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "Llama 3: scaled positions, tied embeddings": (
        LlamaConfig,
        {"rope_parameters": SCALED_ROPE, "tie_word_embeddings": True},
    ),
}


@cache
def model_of(name: str) -> Any:
    """A tiny family's model or a variant, with norms and biases that are not all one or zero."""
    torch.manual_seed(0)
    if name in VARIANTS:
        config_class, changes = VARIANTS[name]
        config = copy.deepcopy(build_tiny_llava().model.config)
        config.text_config = config_class(**(SIZES | changes))
        config.tie_word_embeddings = bool(changes.get("tie_word_embeddings"))
        model = LlavaForConditionalGeneration(config).eval()
    else:
        model = copy.deepcopy(built(name).model)
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


class Batches:
    """Batches of random numbers, the same for a seed; made anew for each decoder, whose caches
    they fill."""

    def __init__(self, model: Any, seed: int) -> None:
        config = model.config.get_text_config()
        self._chance = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = KVShape.of(model)
        self._num_axes = 3 if hasattr(model.base_model, "get_rope_index") else 1
        self._sizes = config.num_hidden_layers, config.hidden_size
        self._dtype = model.dtype

    def all(self, with_pair: bool) -> list[Batch]:
        """The beginnings of six prompts; their ends beside rows of two slabs, with a pair and its
        shift and subspaces of several ranks among them; rows alone, unsteered, then some of them
        projected; a prompt of one token."""
        lengths = [self._chance.randrange(2, 30) for _ in range(6)]
        cuts = [self._chance.randrange(1, length) for length in lengths]
        prompts = [self._prompt(length) for length in lengths]
        begins = [self._chunk(p, 0, cut) for p, cut in zip(prompts, cuts, strict=True)]
        plan = sample_plan(0.7, Schedule.parse(self._chance.choice(["incremental", "range:1-2"])))
        directions = torch.nn.functional.normalize(self._delta(), dim=-1)
        along = directions if self._chance.random() < 0.5 else None
        steering: list[dict[str, Any]] = [
            {"delta": self._delta()},
            {"wants_hidden": False},
            {"wants_hidden": False},
            {"shift": Shift(plan, 1, 2, along)} if with_pair else {},
            {"basis": self._basis(2)},
            {"basis": self._basis(3)},
        ]
        ends = [
            self._chunk(prompt, cut, length, **how)
            for prompt, cut, length, how in zip(prompts, cuts, lengths, steering, strict=True)
        ]
        short = self._slab(64, [self._chance.randrange(1, 60) for _ in range(3)])
        long = self._slab(128, [self._chance.randrange(1, 120) for _ in range(2)])
        deltas = torch.stack([self._delta() for _ in range(5)], dim=1)
        deltas[:, 2] = 0.0
        bases = stacked_bases([None, None, self._basis(3), None, self._basis(1)], CPU)
        assert bases is not None
        deltas[:, 4] = 0.0
        both = {"deltas": deltas.to(self._dtype), "bases": bases}
        return [
            Batch(chunks=tuple(begins)),
            Batch(tuple(ends), (self._rows(*short), self._rows(*long)), **both),
            Batch(slabs=(self._rows(*short, at=1), self._rows(*long, at=1))),
            Batch(slabs=(self._rows(*short, at=2), self._rows(*long, at=2)), bases=bases),
            Batch(chunks=(self._chunk(self._prompt(1), 0, 1, delta=self._delta()),)),
        ]

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)

    def _delta(self) -> Tensor:
        return 0.5 * self._random(*self._sizes)

    def _basis(self, rank: int) -> Tensor:
        """Of 0.8 times the whole of a subspace."""
        num_layers, size = self._sizes
        return math.sqrt(0.8) * torch.linalg.qr(self._random(num_layers, size, rank)).Q.mT

    def _prompt(self, length: int) -> tuple[Tensor, Tensor, PromptCache]:
        embeds = self._random(length, self._sizes[1]).to(self._dtype)
        return embeds, self._positions(length), PromptCache(self._shape, length)

    def _positions(self, length: int) -> Tensor:
        steps = torch.randint(0, 3, (self._num_axes, length), generator=self._generator)
        return steps.cumsum(dim=-1)

    def _chunk(
        self, prompt: tuple[Tensor, Tensor, PromptCache], start: int, end: int, **how: Any
    ) -> Chunk:
        embeds, positions, cache = prompt
        return Chunk(embeds[start:end], positions[:, start:end], cache, start, end, **how)

    def _slab(self, room: int, lengths: list[int]) -> tuple[Slab, list[int]]:
        slab = Slab(self._shape, room, capacity=4)
        slab.keys.copy_(self._random(*slab.keys.shape))
        slab.values.copy_(self._random(*slab.values.shape))
        return slab, lengths

    def _rows(self, slab: Slab, lengths: list[int], at: int = 0) -> Rows:
        """Rows of `lengths` tokens, `at` steps later."""
        return Rows(
            embeds=self._random(len(lengths), self._sizes[1]).to(self._dtype),
            positions=self._positions(len(lengths)),
            slab=slab,
            lengths=torch.tensor(lengths) + at,
            longest=max(lengths) + at,
        )
