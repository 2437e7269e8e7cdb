"""Which decoder runs which model, and what is refused."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from server.engine.decoders import DecoderChoice, build_decoder
from server.engine.eager import EagerDecoder
from server.engine.fused import FusedDecoder, can_fuse
from server.engine.types import EngineError
from steering.errors import ModelError
from tests.tiny_models import TinyModel, build_tiny_llava


def test_every_family_but_gemmas_runs_fused(tiny_model: TinyModel) -> None:
    is_fused = tiny_model.name != "gemma3"
    assert can_fuse(tiny_model.model) == is_fused
    with ExitStack() as life:
        decoder = build_decoder("auto", copy.deepcopy(tiny_model.model), life)
        assert isinstance(decoder, FusedDecoder if is_fused else EagerDecoder)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": None, "sliding_window": 16},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
    ],
)
def test_what_the_fused_pass_does_not_compute_runs_by_the_models_own_modules(
    tiny_llava: TinyModel, change: dict[str, Any]
) -> None:
    model = copy.deepcopy(tiny_llava.model)
    for name, value in change.items():
        setattr(model.config.get_text_config(), name, value)
    assert not can_fuse(model)


def test_a_window_that_the_config_turns_off_does_not_matter(tiny_llava: TinyModel) -> None:
    """Qwen2's configurations name a window that they do not use."""
    model = copy.deepcopy(tiny_llava.model)
    config = model.config.get_text_config()
    config.layer_types, config.sliding_window, config.use_sliding_window = None, 16, False
    assert can_fuse(model)


def test_a_class_that_only_looks_alike_is_not_fused(tiny_llava: TinyModel) -> None:
    model = copy.deepcopy(tiny_llava.model)
    decoder = model.get_decoder()
    decoder.__class__ = type("GraniteModel", (type(decoder),), {})
    assert not can_fuse(model)


class Quantised(nn.Linear):
    """Stands for a library's own kind of matrix, whose weight is not to be had as numbers."""


def quantised(model: Any, name: str) -> None:
    model.get_submodule(name).__class__ = Quantised


def quantised_by_its_weight(model: Any, name: str) -> None:
    """As torchao does it: the module stays, its weight is a tensor of another class."""
    packed = type("Packed", (torch.Tensor,), {})
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(packed), requires_grad=False)


PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
PROJECTIONS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
MATRICES = [f"model.language_model.layers.2.{name}" for name in PROJECTIONS] + ["lm_head"]


@pytest.mark.parametrize("change", [quantised, quantised_by_its_weight])
@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_of_another_kind_runs_by_the_models_own_modules(
    tiny_llava: TinyModel, name: str, change: Callable[[Any, str], None]
) -> None:
    """The fused pass takes weights over; of a quantised matrix it would take codes for numbers."""
    model = copy.deepcopy(tiny_llava.model)
    change(model, name)
    assert not can_fuse(model)
    with ExitStack() as life:
        assert type(build_decoder("auto", model, life)) is EagerDecoder


@pytest.mark.parametrize(
    "name", ["layers.1.input_layernorm", "layers.1.post_attention_layernorm", "norm"]
)
def test_a_norm_of_another_kind_runs_by_the_models_own_modules(
    tiny_llava: TinyModel, name: str
) -> None:
    model = copy.deepcopy(tiny_llava.model)
    model.get_decoder().set_submodule(name, nn.LayerNorm(32))
    assert not can_fuse(model)


@pytest.mark.parametrize("choice", ["fused", "compiled"])
def test_fused_where_it_cannot_be_is_refused_by_name(
    tiny_gemma3: TinyModel, choice: DecoderChoice
) -> None:
    message = f"Gemma3TextModel cannot run {choice}"
    with ExitStack() as life, pytest.raises(EngineError, match=message):
        build_decoder(choice, tiny_gemma3.model, life)


def test_the_eager_decoders_hooks_are_there_for_its_life_only() -> None:
    model = build_tiny_llava().model
    layers = model.get_decoder().layers
    with ExitStack() as life:
        build_decoder("eager", model, life)
        assert [len(layer._forward_hooks) for layer in layers] == [1, 1, 1]
    assert [len(layer._forward_hooks) for layer in layers] == [0, 0, 0]


@pytest.mark.parametrize("choice", ["auto", "eager", "fused", "compiled"])
def test_layers_that_are_not_where_they_were_are_refused(choice: DecoderChoice) -> None:
    """Pitfall 2: a renamed or shortened list of layers must not become a silent no-op."""
    model = build_tiny_llava().model
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layers[:2])
    with ExitStack() as life, pytest.raises(ModelError, match="2 decoder layers, but its config"):
        build_decoder(choice, model, life)
    decoder.blocks = layers
    del decoder.layers
    with ExitStack() as life, pytest.raises(ModelError, match="has no `layers` to steer"):
        build_decoder(choice, model, life)


@pytest.mark.parametrize("choice", ["fused", "compiled"])
def test_a_fused_model_has_given_its_weights_away(
    tiny_llava: TinyModel, choice: DecoderChoice
) -> None:
    """Memory: the language model's matrices are held once; what embeds pictures and text stays."""
    model = copy.deepcopy(tiny_llava.model)
    decoder = model.get_decoder()
    with ExitStack() as life:
        build_decoder(choice, model, life)
    matrices = [m.weight for m in decoder.layers.modules() if isinstance(m, nn.Linear)]
    assert len(matrices) == 3 * 7 and all(weight.numel() == 0 for weight in matrices)
    assert model.get_output_embeddings().weight.numel() == 0
    assert model.get_input_embeddings()(torch.tensor([1])).shape == (1, 32)
