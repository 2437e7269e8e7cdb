"""Model families: what is put together picture by picture is what the bare model makes at once."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from server.engine.families import (
    FAMILIES,
    bidirectional_blocks,
    embed,
    encode_image,
    family_of,
    image_blocks,
    image_token_id,
    images_between,
)
from server.engine.inputs import InputBuilder
from server.engine.types import EngineError, Prompt
from tests.server.engine.conftest import picture
from tests.tiny_models import BUILDERS, TinyModel, build_tiny_gemma3, build_tiny_llava

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "image"}],
    },
]
IMAGES = [picture(1), picture(2, (48, 20)), picture(3, (16, 40))]


@pytest.fixture(scope="module", params=[*BUILDERS, "unlisted"])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    """Every family, and the one that is not listed."""
    if request.param == "unlisted":
        return request.getfixturevalue("unlisted_model")
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def prompt(tiny: TinyModel) -> Prompt:
    """Three pictures of different sizes in two turns."""
    return build(tiny, TURNS, IMAGES)


@pytest.fixture(scope="module")
def whole(tiny: TinyModel) -> dict[str, Tensor]:
    """The same by one call of the processor."""
    text = tiny.processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    return dict(tiny.processor(text=[text], images=IMAGES, return_tensors="pt"))


def build(tiny: TinyModel, messages: list[dict[str, Any]], images: list[Image.Image]) -> Prompt:
    builder = InputBuilder(family_of(tiny.model), tiny.model, tiny.processor)
    return builder.build(messages, images).prompt


@torch.inference_mode()
def features_of(tiny: TinyModel, prompt: Prompt) -> dict[str, Tensor]:
    return {image.digest: encode_image(tiny.model, image) for image in prompt.images}


@torch.inference_mode()
def bare_pass(tiny: TinyModel, whole: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the bare model gives its decoder, (1, T, D), and its logits, (1, T, V)."""
    seen: list[Tensor] = []
    handle = tiny.model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        logits = tiny.model(**whole, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits


@torch.inference_mode()
def test_pictures_encoded_alone_equal_those_of_one_call(
    tiny: TinyModel, prompt: Prompt, whole: dict[str, Tensor]
) -> None:
    """LLaVA-NeXT pads all pictures to the largest number of tiles when they come together."""
    of_the_text = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    tensors = {name: tensor for name, tensor in whole.items() if name not in of_the_text}
    output = tiny.model.get_image_features(**tensors, return_dict=True).pooler_output
    size = tiny.model.config.get_text_config().hidden_size
    together = torch.cat([part.reshape(-1, size) for part in output])
    alone = [encode_image(tiny.model, image) for image in prompt.images]
    assert [len(features) for features in alone] == [i.num_features for i in prompt.images]
    torch.testing.assert_close(torch.cat(alone), together, **TOLERANCE)


def test_embeddings_equal_what_the_bare_model_gives_its_decoder(
    tiny: TinyModel, prompt: Prompt, whole: dict[str, Tensor]
) -> None:
    expected, _ = bare_pass(tiny, whole)
    embeds = embed(tiny.model, prompt, features_of(tiny, prompt), 0, len(prompt))
    torch.testing.assert_close(embeds, expected, **TOLERANCE)


def test_embeddings_of_any_range_are_part_of_the_whole(tiny: TinyModel, prompt: Prompt) -> None:
    """Only the pictures that a range touches are asked for; some are cut by the range's ends."""
    features = features_of(tiny, prompt)
    whole = embed(tiny.model, prompt, features, 0, len(prompt))
    second = prompt.images[1]
    middle = (second.start + second.end) // 2
    cuts = [0, 1, prompt.images[0].start + 1, second.start, middle, second.end, len(prompt)]
    ranges = [(a, b) for a in cuts for b in cuts if a < b]
    for start, end in ranges:
        needed = {i.digest: features[i.digest] for i in images_between(prompt, start, end)}
        part = embed(tiny.model, prompt, needed, start, end)
        assert part.equal(whole[:, start:end]), (start, end)
    assert [i.digest for i in images_between(prompt, second.end, len(prompt))] == [
        prompt.images[2].digest
    ]
    assert images_between(prompt, 0, prompt.images[0].start) == []


@torch.inference_mode()
def test_the_decoder_on_these_embeddings_and_positions_gives_the_bare_models_logits(
    tiny: TinyModel, prompt: Prompt, whole: dict[str, Tensor]
) -> None:
    """With masks by the family's description: causal, windows, blocks that see themselves."""
    _, expected = bare_pass(tiny, whole)
    embeds = embed(tiny.model, prompt, features_of(tiny, prompt), 0, len(prompt))
    positions = prompt.position_ids[:, None]
    hidden = tiny.model.get_decoder()(
        inputs_embeds=embeds,
        position_ids=positions if len(positions) == 3 else positions[0],
        attention_mask=masks(tiny, prompt),
        use_cache=False,
    ).last_hidden_state
    logits = tiny.model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def masks(tiny: TinyModel, prompt: Prompt) -> Any:
    """(1, 1, T, T) bool, one for each layer type where a family has several."""
    tokens = torch.arange(len(prompt))
    queries, keys = tokens[:, None], tokens[None]
    seen = keys <= queries
    if tiny.name != "gemma3":
        return seen[None, None]
    for start, end in image_blocks(tiny.model, prompt.token_ids):
        seen[start:end, start:end] = True
    window = tiny.model.config.get_text_config().sliding_window
    assert len(prompt) > window  # else the sliding layers would show nothing
    near = keys > queries - window
    return {
        "full_attention": seen[None, None],
        "sliding_attention": (seen & near)[None, None],
    }


def test_only_gemma_has_blocks_that_see_themselves(tiny: TinyModel, prompt: Prompt) -> None:
    spans = tuple((image.start, image.end) for image in prompt.images)
    blocks = bidirectional_blocks(family_of(tiny.model), tiny.model, prompt)
    assert blocks == (spans if tiny.name == "gemma3" else ())


def test_the_blocks_of_a_prompt_are_its_runs_of_placeholders(tiny_gemma3: TinyModel) -> None:
    prompt = build(tiny_gemma3, TURNS, IMAGES)
    blocks = image_blocks(tiny_gemma3.model, prompt.token_ids)
    assert blocks == [(image.start, image.end) for image in prompt.images]
    assert image_blocks(tiny_gemma3.model, prompt.token_ids[: prompt.images[0].start]) == []


def test_a_tiled_picture_is_several_blocks() -> None:
    tiny = BUILDERS["idefics3"]()
    prompt = build(tiny, TURNS, IMAGES)
    first = prompt.images[0]
    assert first.num_features == 5 * 4  # 2 x 2 tiles and the whole
    inside = [b for b in image_blocks(tiny.model, prompt.token_ids) if b[1] <= first.end]
    assert [end - start for start, end in inside] == [4] * 5


def test_features_that_do_not_fill_the_placeholders_are_refused(tiny_llava: TinyModel) -> None:
    prompt = build(tiny_llava, TURNS, IMAGES)
    image = prompt.images[0]
    short = type(image)(image.digest, image.tensors, image.start, image.end, 5)
    with pytest.raises(EngineError, match="5 image placeholders but 4 image features"):
        encode_image(tiny_llava.model, short)


@torch.inference_mode()
def test_a_bfloat16_model_encodes_and_embeds_in_bfloat16() -> None:
    tiny = build_tiny_llava()
    tiny.model.to(torch.bfloat16)
    prompt = build(tiny, TURNS, IMAGES)
    features = features_of(tiny, prompt)
    assert {tensor.dtype for tensor in features.values()} == {torch.bfloat16}
    assert embed(tiny.model, prompt, features, 0, len(prompt)).dtype == torch.bfloat16


def test_every_listed_family_has_a_tiny_model() -> None:
    assert [family.model_type for family in FAMILIES] == [*BUILDERS]
    for name, builder in BUILDERS.items():
        family = family_of(builder().model)
        assert (family.model_type, family.is_known) == (name, True)


def test_an_unlisted_family_is_known_by_its_type_only(unlisted_model: TinyModel) -> None:
    family = family_of(unlisted_model.model)
    assert (family.name, family.is_known, family.image_tensors) == ("vipllava", False, ())
    assert not family.has_mrope


def test_an_unlisted_family_with_positions_of_its_own_has_mrope() -> None:
    tiny = BUILDERS["qwen2_vl"]()
    tiny.model.config.model_type = "another"
    family = family_of(tiny.model)
    assert family.has_mrope and not family.is_known


def test_a_model_whose_pictures_are_no_tokens_is_refused_by_name() -> None:
    names = {"model_type": "mllama", "image_token_index": 7}
    model = SimpleNamespace(config=SimpleNamespace(**names))
    with pytest.raises(EngineError, match="'mllama' is not served, .* served are: LLaVA-1.5, LL"):
        family_of(model)
    unlisted = build_tiny_llava().model
    unlisted.config.model_type = "another"
    unlisted.config.image_token_id = None
    with pytest.raises(EngineError, match="'another' is not served"):
        family_of(unlisted)


def changed(model: Any, part: str, changes: dict[str, Any]) -> Any:
    for name, value in changes.items():
        setattr(getattr(model.config, part), name, value)
    return model


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"model_type": "pixtral"}, "LLaVA-1.5 with a 'pixtral' vision tower"),
        ("text_config", {"sliding_window": 16}, "LLaVA-1.5 with sliding-window attention"),
        ("text_config", {"layer_types": ["sliding_attention"] * 3}, "sliding-window attention"),
        ("text_config", {"layer_types": ["chunked_attention"] * 3}, "type chunked_attention is"),
    ],
)
def test_variants_of_a_family_that_nobody_tried_are_refused(
    part: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        family_of(changed(build_tiny_llava().model, part, changes))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"model_type": "clip"}, "Gemma 3 with a 'clip' vision tower"),
        ("text_config", {"use_bidirectional_attention": True}, "text that sees later text"),
    ],
)
def test_variants_of_gemma_that_nobody_tried_are_refused(
    part: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        family_of(changed(build_tiny_gemma3().model, part, changes))


def test_an_unlisted_family_with_a_window_says_which_layers_have_it() -> None:
    """A short self-check would not notice a window that no mask makes."""
    model = build_tiny_llava().model
    model.config.model_type = "another"
    changed(model, "text_config", {"sliding_window": 4096})
    with pytest.raises(EngineError, match="another with sliding-window attention"):
        family_of(model)
    layer_types = ["sliding_attention", "full_attention", "full_attention"]
    assert not family_of(changed(model, "text_config", {"layer_types": layer_types})).is_known


def test_the_placeholder_is_the_configs(tiny: TinyModel, prompt: Prompt) -> None:
    """Gemma's config calls it image_token_index and its processor's image token is another."""
    token_id = image_token_id(tiny.model)
    found = [i for i, token in enumerate(prompt.token_ids) if token == token_id]
    assert len(found) == sum(image.num_features for image in prompt.images)
    assert (found[0], found[-1] + 1) == (prompt.images[0].start, prompt.images[-1].end)
