"""Prompts, picture by picture, against the processor's own call on the whole conversation."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image

from server.engine.families import image_token_id
from server.engine.types import EngineInputs, InputError, Prompt
from steering.corruption import image_digest
from tests.server.engine.conftest import picture
from tests.server.engine.prompts import (
    CASES,
    IMAGES,
    TURNS,
    CountingProcessor,
    assert_same_tensors,
    builder_of,
    own_positions,
    whole,
)
from tests.server.engine.under_test import conversation
from tests.tiny_models import BUILDERS, TinyModel


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_positions_are_the_processors_own(tiny_model: TinyModel, case: str) -> None:
    messages, images = CASES[case]
    processed = whole(tiny_model, messages, images)
    inputs = builder_of(tiny_model).build(messages, images)
    assert inputs.pair is None
    assert inputs.prompt.token_ids == tuple(processed["input_ids"][0].tolist())
    expected = own_positions(tiny_model, processed)
    assert inputs.prompt.position_ids.equal(expected)
    assert inputs.prompt.next_position == int(expected.max()) + 1
    assert inputs.prompt.shared_len == 0


@pytest.mark.parametrize("case", CASES)
def test_each_picture_has_its_span_its_placeholders_and_its_digest(
    tiny_model: TinyModel, case: str
) -> None:
    messages, images = CASES[case]
    prompt = builder_of(tiny_model).build(messages, images).prompt
    token_id = image_token_id(tiny_model.model)
    assert [image.digest for image in prompt.images] == [image_digest(image) for image in images]
    ends = [0]
    for image in prompt.images:
        span = prompt.token_ids[image.start : image.end]
        assert image.start >= ends[-1]
        assert (span[0], span[-1]) == (token_id, token_id)
        assert span.count(token_id) == image.num_features > 0
        ends.append(image.end)
    assert prompt.token_ids.count(token_id) == sum(i.num_features for i in prompt.images)


def test_pictures_of_other_sizes_have_other_numbers_of_features() -> None:
    """The test pictures do exercise tiling and dynamic resolution."""
    for name in ("llava_next", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"):
        prompt = builder_of(BUILDERS[name]()).build(TURNS, IMAGES).prompt
        assert len({image.num_features for image in prompt.images}) >= 2, name


def test_the_same_bytes_in_another_shape_are_another_picture(tiny_llava: TinyModel) -> None:
    """Pitfall 11: 30 x 150 and 150 x 30."""
    tall = picture(1, (30, 150))
    wide = Image.frombytes("RGB", (150, 30), tall.tobytes())
    prompt = builder_of(tiny_llava).build(conversation("?", 2), [tall, wide]).prompt
    assert prompt.images[0].digest != prompt.images[1].digest


def test_many_threads_build_what_one_builds(tiny_model: TinyModel) -> None:
    builder = builder_of(tiny_model)
    cases = [CASES[name] for name in CASES] * 4

    def build(case: tuple[list[dict[str, Any]], list[Image.Image]]) -> EngineInputs:
        return builder.build(*case, "blank")

    expected = [build(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(pool.map(build, cases), expected, strict=True):
            assert_same_prompt(one.prompt, other.prompt)
            assert (one.pair is None) == (other.pair is None)
            if one.pair is not None and other.pair is not None:
                assert_same_prompt(one.pair.corrupted, other.pair.corrupted)
                assert_same_prompt(one.pair.text_only, other.pair.text_only)


def assert_same_prompt(one: Prompt, other: Prompt) -> None:
    assert (one.token_ids, one.next_position) == (other.token_ids, other.next_position)
    assert one.shared_len == other.shared_len
    assert [i.digest for i in one.images] == [i.digest for i in other.images]
    for image, same in zip(one.images, other.images, strict=True):
        assert_same_tensors(image.tensors, same.tensors)


def test_pictures_and_image_parts_must_be_equal_in_number(tiny_model: TinyModel) -> None:
    builder = builder_of(tiny_model)
    for num_parts, images in ((1, []), (0, IMAGES[:1]), (2, IMAGES), (2, IMAGES[:1])):
        with pytest.raises(InputError, match=f"came with {len(images)} pictures, .* {num_parts} "):
            builder.build(conversation("Hi", num_parts), images)


def test_control_tokens_in_a_text_are_refused(tiny_model: TinyModel) -> None:
    """A client must write neither placeholders nor the ends and begins of turns."""
    builder = builder_of(tiny_model)
    placeholder = image_token_id(tiny_model.model)
    special = [t.content for t in tiny_model.processor.tokenizer.added_tokens_decoder.values()]
    turns = ("turn>", "<|im_", "utterance>")
    refused = [token for token in special if any(mark in token for mark in turns)]
    refused += [tiny_model.processor.tokenizer.convert_ids_to_tokens(placeholder)]
    refused += [tiny_model.processor.image_token]
    assert len(refused) >= 4
    for token in refused:
        with pytest.raises(InputError, match="a control token of this model"):
            builder.build(conversation(f"What is {token}?"), [])
    builder.build(conversation("What do <s>, </s>, <b> and <h1> mean in HTML?"), [])


def test_a_template_that_refuses_or_drops_pictures_is_the_clients_error(
    tiny_llava: TinyModel,
) -> None:
    templates = {
        "{{ raise_exception('one picture a turn') }}": "one picture a turn",
        "{{ messages[0].nothing.at.all }}": "template refuses",
        "{{ messages[0].content[1].text }}": "came with 1 pictures, .* made 0",
    }
    for template, message in templates.items():
        processor = copy.copy(tiny_llava.processor)
        processor.chat_template = template
        with pytest.raises(InputError, match=message):
            builder_of(tiny_llava, processor).build(conversation("Hi", 1), IMAGES[:1])
    processor.chat_template = "{{ '' }}"
    with pytest.raises(InputError, match="the prompt is empty"):
        builder_of(tiny_llava, processor).build(conversation("Hi"), [])


def test_a_picture_that_the_processor_refuses_is_the_clients_error(
    tiny_qwen2_vl: TinyModel,
) -> None:
    with pytest.raises(InputError, match="refuses this picture: absolute aspect ratio"):
        builder_of(tiny_qwen2_vl).build(conversation("Hi", 1), [picture(1, (404, 2))])


def test_a_processor_that_makes_more_than_the_family_takes_is_refused(
    tiny_llava: TinyModel,
) -> None:
    class More(CountingProcessor):
        def __call__(self, **kwargs: Any) -> Any:
            return super().__call__(**kwargs) | {"image_sizes": torch.tensor([[16, 16]])}

    with pytest.raises(InputError, match="with pixel_values of .* made image_sizes, pixel_values"):
        builder_of(tiny_llava, More(tiny_llava.processor)).build(conversation("Hi", 1), IMAGES[:1])


def test_a_processor_that_does_not_tell_its_tokens_is_refused(tiny_llava: TinyModel) -> None:
    class Silent(CountingProcessor):
        def __call__(self, **kwargs: Any) -> Any:
            processed = super().__call__(**kwargs)
            del processed["text_replacement_offsets"]
            return processed

    with pytest.raises(InputError, match="LLaVA-1.5 does not say which tokens a picture becomes"):
        builder_of(tiny_llava, Silent(tiny_llava.processor)).build(
            conversation("Hi", 1), IMAGES[:1]
        )


def test_an_unlisted_family_builds_prompts_of_any_number_of_pictures(
    unlisted_model: TinyModel,
) -> None:
    for messages, images in CASES.values():
        processed = whole(unlisted_model, messages, images)
        inputs = builder_of(unlisted_model).build(messages, images, "gray")
        assert inputs.prompt.token_ids == tuple(processed["input_ids"][0].tolist())
        assert {name for image in inputs.prompt.images for name in image.tensors} <= {
            "pixel_values"
        }
        assert (inputs.pair is not None) == bool(images)
