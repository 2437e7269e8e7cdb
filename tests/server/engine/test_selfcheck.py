"""Who may serve: the check at start against the bare model."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.types import EngineError
from tests.server.engine.conftest import (
    assert_equals_reference,
    loaded,
    picture,
    random_delta,
    sample_plan,
)
from tests.server.engine.under_test import EngineUnderTest
from tests.tiny_models import TinyModel, build_tiny_llava

Start = Callable[..., EngineUnderTest]
Break = Callable[[Any], object]


@pytest.mark.parametrize("decoder", ["auto", "eager"])
def test_an_unlisted_family_that_passes_serves(
    unlisted_model: TinyModel, start_engine: Start, decoder: str
) -> None:
    under_test = start_engine(unlisted_model, decoder=decoder)
    images = [picture(1), picture(2, (40, 20))]
    for delta in (None, random_delta(unlisted_model)):
        answer = under_test.ask("Compare.", images, delta=delta).wait()
        assert_equals_reference(unlisted_model, answer, "Compare.", images, delta)
    sample = under_test.ask("Compare.", images, sample=sample_plan()).wait()
    assert sample.applied.failure is None and sample.applied.relative_dose > 0


def scales_its_logits(model: Any) -> None:
    """After the head, as Cohere's models do."""

    def scale(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = output.logits * 0.5
        return output

    model.register_forward_hook(scale)


def counts_positions_its_own_way(model: Any) -> None:
    """Within its forward pass, where nobody else can ask for them."""

    def count(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["input_ids"].shape[1]
        return args, kwargs | {"position_ids": 2 * torch.arange(length)[None]}

    model.model.register_forward_pre_hook(count, with_kwargs=True)


def sees_later_tokens(model: Any) -> None:
    """As Gemma 3 does within a picture; here everywhere."""

    def see(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["input_ids"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        return args, kwargs | {"attention_mask": mask}

    model.model.register_forward_pre_hook(see, with_kwargs=True)


def forgets_its_pictures(model: Any) -> None:
    features = model.get_image_features
    model.get_image_features = lambda **tensors: [
        torch.zeros_like(part) for part in features(**tensors).pooler_output
    ]


def holds_a_weight_that_is_no_number(model: Any) -> None:
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize("decoder", ["auto", "eager"])
@pytest.mark.parametrize(
    "is_wrong",
    [
        scales_its_logits,
        counts_positions_its_own_way,
        sees_later_tokens,
        forgets_its_pictures,
        holds_a_weight_that_is_no_number,
    ],
)
def test_an_unlisted_family_that_the_engine_computes_wrongly_is_refused(
    unlisted_model: TinyModel, start_engine: Start, is_wrong: Break, decoder: str
) -> None:
    """By name, with how far it is off; before any request could be answered wrongly."""
    broken = replace(unlisted_model, model=copy.deepcopy(unlisted_model.model))
    is_wrong(broken.model)
    message = "vipllava is not served: the engine's logits differ from the bare model's by "
    with pytest.raises(EngineError, match=message):
        start_engine(broken, decoder=decoder)


def raises_on_pictures(model: Any) -> None:
    def refuse(**_tensors: Any) -> None:
        raise RuntimeError("no grid\nof these pictures")

    model.get_image_features = refuse


def raises_in_its_own_pass(model: Any) -> None:
    def refuse(_module: Any, _args: Any) -> None:
        raise NotImplementedError

    model.register_forward_pre_hook(refuse)


def raises_in_its_head_alone(model: Any) -> None:
    """At the second pass, which is the decoder's."""
    seen: list[bool] = []

    def refuse(_module: Any, _args: Any) -> None:
        seen.append(True)
        if len(seen) > 1:
            raise KeyError("weight")

    model.get_output_embeddings().register_forward_pre_hook(refuse)


@pytest.mark.parametrize(
    ("is_wrong", "reason"),
    [
        (raises_on_pictures, "RuntimeError: no grid"),
        (raises_in_its_own_pass, "NotImplementedError: "),
        (raises_in_its_head_alone, "KeyError: 'weight'"),
    ],
)
def test_an_unlisted_family_that_raises_is_refused_in_one_line(
    unlisted_model: TinyModel, start_engine: Start, is_wrong: Break, reason: str
) -> None:
    """It said "RuntimeError: no grid" and not what that means: that the family is not served."""
    broken = replace(unlisted_model, model=copy.deepcopy(unlisted_model.model))
    is_wrong(broken.model)
    with pytest.raises(EngineError) as refused:
        start_engine(broken, decoder="eager")
    assert str(refused.value) == f"vipllava is not served: the self-check failed: {reason}"


def test_a_family_whose_processor_raises_is_refused_in_one_line(
    unlisted_model: TinyModel, start_engine: Start
) -> None:
    class Processor:
        def __getattr__(self, name: str) -> Any:
            return getattr(unlisted_model.processor, name)

        def __call__(self, **_inputs: Any) -> Any:
            raise TypeError("unexpected keyword argument 'images'")

    message = "vipllava is not served: the self-check failed: TypeError: unexpected keyword"
    with pytest.raises(EngineError, match=message):
        start_engine(replace(unlisted_model, processor=Processor()))


def test_a_listed_family_is_checked_too(start_engine: Start) -> None:
    """Against a library that has changed."""
    tiny = build_tiny_llava()
    counts_positions_its_own_way(tiny.model)
    with pytest.raises(EngineError, match="LLaVA-1.5 is not served: the engine's logits differ"):
        start_engine(tiny)


def test_a_model_whose_pictures_are_no_tokens_is_refused_by_name() -> None:
    """Llama 3.2 Vision's decoder looks at pictures through cross-attention."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1}
    with torch.device("meta"):
        config = MllamaConfig(text_config=text | heads, vision_config=vision)
        model = MllamaForConditionalGeneration(config)
    other = replace(loaded(build_tiny_llava()), model=model)
    with pytest.raises(EngineError, match="'mllama' is not served, because its pictures do not"):
        EmbeddedEngine(other, EngineConfig())


@pytest.mark.parametrize("decoder", ["auto", "eager"])
def test_every_family_passes_in_bfloat16(
    tiny_model: TinyModel, start_engine: Start, decoder: str
) -> None:
    """What rounding alone does is no reason to refuse a model."""
    half = replace(tiny_model, model=copy.deepcopy(tiny_model.model).to(torch.bfloat16))
    start_engine(half, decoder=decoder)
