"""The pair of prompts that a request's own shift is measured with: corrupted, and text alone."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from server.engine.pictures import Picture
from server.engine.types import EngineInputs, PairError
from steering.corruption import CORRUPTIONS, Corruption, corrupt
from tests.server.engine.conftest import picture
from tests.server.engine.prompts import (
    CASES,
    IMAGES,
    TEXT_TURNS,
    TURNS,
    CountingProcessor,
    assert_same_tensors,
    builder_of,
    own_positions,
    whole,
)
from tests.server.engine.under_test import conversation
from tests.tiny_models import TinyModel
from tests.tiny_tokenizers import PICTURES_FIRST_TEMPLATE


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_corrupted_prompt_is_that_of_the_corrupted_pictures(
    tiny_model: TinyModel, kind: Corruption
) -> None:
    builder = builder_of(tiny_model)
    inputs = builder.build(TURNS, IMAGES, kind)
    plain = builder.build(TURNS, IMAGES).prompt
    assert inputs.pair is not None
    corrupted = inputs.pair.corrupted
    assert inputs.prompt.token_ids == plain.token_ids == corrupted.token_ids
    assert corrupted.position_ids.equal(plain.position_ids)
    assert corrupted.next_position == plain.next_position
    alone = builder.build(TURNS, [corrupt(image, kind) for image in IMAGES]).prompt
    for image, original, expected in zip(corrupted.images, plain.images, alone.images, strict=True):
        assert (image.start, image.end) == (original.start, original.end)
        assert image.num_features == original.num_features
        assert image.digest != original.digest
        assert (image.digest == expected.digest) == (kind not in ("blank", "gray"))
        assert_same_tensors(image.tensors, expected.tensors)


@pytest.mark.parametrize("case", ["one picture", "two of different sizes", "several turns"])
def test_the_text_only_prompt_is_the_conversation_without_pictures(
    tiny_model: TinyModel, case: str
) -> None:
    messages, images = CASES[case]
    text_turns = (
        TEXT_TURNS if messages is TURNS else conversation(messages[0]["content"][-1]["text"])
    )
    expected = whole(tiny_model, text_turns, [])
    pair = builder_of(tiny_model).build(messages, images, "blank").pair
    assert pair is not None
    assert pair.text_only.token_ids == tuple(expected["input_ids"][0].tolist())
    assert pair.text_only.images == ()
    assert pair.text_only.position_ids.equal(own_positions(tiny_model, expected))
    assert (pair.text_only.next_position, pair.text_only.shared_len) == (len(pair.text_only), 0)


def test_a_turn_of_pictures_alone_becomes_an_empty_one(tiny_model: TinyModel) -> None:
    """Templates look at the first part of a message; without any, some raise."""
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    pair = builder_of(tiny_model).build(messages, IMAGES[:1], "blank").pair
    assert pair is not None
    expected = whole(tiny_model, conversation(""), [])
    assert pair.text_only.token_ids == tuple(expected["input_ids"][0].tolist())


def test_without_pictures_or_corruption_there_is_no_pair(tiny_llava: TinyModel) -> None:
    builder = builder_of(tiny_llava)
    assert builder.build(conversation("Hi"), [], "blank").pair is None
    assert builder.build(conversation("Hi", 1), IMAGES[:1]).pair is None


def test_what_the_pair_took_is_told_apart_from_the_requests_own(
    tiny_llava: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only reading a picture moves: two of the request's, two corrupted."""
    builder, now = builder_of(tiny_llava), [0.0]
    monkeypatch.setattr("server.engine.inputs.time", SimpleNamespace(monotonic=lambda: now[0]))
    read = builder._read

    def slowly(image: Image.Image) -> Picture:
        now[0] += 1.5
        return read(image)

    monkeypatch.setattr(builder, "_read", slowly)
    inputs = builder.build(conversation("Hi", 2), IMAGES[:2], "noise")
    assert (inputs.pair_s, now[0]) == (3.0, 6.0)
    assert builder.build(conversation("Hi", 2), IMAGES[:2]).pair_s == 0.0


def test_noise_is_the_same_for_the_same_picture_and_differs_between_pictures(
    tiny_llava: TinyModel,
) -> None:
    def noisy(images: list[Image.Image]) -> list[str]:
        inputs = builder_of(tiny_llava).build(conversation("Hi", 2), images, "noise")
        assert inputs.pair is not None
        return [image.digest for image in inputs.pair.corrupted.images]

    first = noisy([picture(1), picture(2)])
    assert first == noisy([picture(1), picture(2)])
    assert first[0] != first[1]


def shared_len(inputs: EngineInputs) -> int:
    assert inputs.pair is not None
    assert inputs.prompt.shared_len == inputs.pair.text_only.shared_len == 0
    return inputs.pair.corrupted.shared_len


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_what_comes_up_to_the_first_meaningless_picture_is_shared(
    tiny_model: TinyModel, kind: Corruption
) -> None:
    builder = builder_of(tiny_model)
    one = builder.build(conversation("Why?", 2), IMAGES[:2], kind)
    other = builder.build(
        conversation("Something else altogether", 2), [picture(9), picture(8)], kind
    )
    if kind not in ("blank", "gray"):
        assert shared_len(one) == shared_len(other) == 0
        return
    assert one.pair is not None and other.pair is not None
    length = shared_len(one)
    assert length == shared_len(other) == one.pair.corrupted.images[0].end
    assert one.pair.corrupted.token_ids[:length] == other.pair.corrupted.token_ids[:length]
    assert one.pair.corrupted.images[0].digest == other.pair.corrupted.images[0].digest


def test_nothing_is_shared_after_a_clients_words(tiny_model: TinyModel) -> None:
    builder = builder_of(tiny_model)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert shared_len(builder.build([system, *conversation("Hi", 1)], IMAGES[:1], "blank")) == 0
    second = [*TEXT_TURNS[1:3], *conversation("Hi", 1)]
    assert shared_len(builder.build(second, IMAGES[:1], "blank")) == 0
    late = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}]
    length = shared_len(builder.build(late, IMAGES[:1], "blank"))
    # A template that writes all pictures of a turn first has the client's words behind them.
    assert (length > 0) == (tiny_model.processor.chat_template == PICTURES_FIRST_TEMPLATE)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_meaningless_picture_is_read_once_for_each_size(
    tiny_llava: TinyModel, kind: Corruption
) -> None:
    processor = CountingProcessor(tiny_llava.processor)
    builder = builder_of(tiny_llava, processor)
    for seed in range(3):
        images = [picture(seed, (24, 16)), picture(seed + 10, (48, 20))]
        builder.build(conversation("Hi", 2), images, kind)
    times = 2 if kind in ("blank", "gray") else 6
    assert len(processor.sizes) == 6 + times
    builder.build(conversation("Hi", 1), [picture(1, (20, 20))], kind)
    assert processor.sizes[-2:] == [(20, 20), (20, 20)]


def test_the_meaningless_pictures_that_are_kept_have_a_budget_in_bytes(
    tiny_llava: TinyModel,
) -> None:
    """Sixteen of any size took 430 MB with large pictures of Idefics3."""
    processor = CountingProcessor(tiny_llava.processor)
    pictures = [picture(seed, (20 + seed, 16)) for seed in range(3)]
    pair = builder_of(tiny_llava).build(conversation("Hi", 1), pictures[:1], "blank").pair
    assert pair is not None
    one = sum(tensor.nbytes for tensor in pair.corrupted.images[0].tensors.values())
    builder = builder_of(tiny_llava, processor, kept_bytes=int(2.9 * one))

    def is_read(number: int) -> bool:
        """Whether its blank picture went through the processor, beside itself."""
        processor.sizes.clear()
        builder.build(conversation("Hi", 1), [pictures[number]], "blank")
        return len(processor.sizes) == 2

    assert [is_read(number) for number in (0, 1, 0, 2)] == [True, True, False, True]
    assert [is_read(number) for number in (2, 0, 1)] == [False, False, True]


def test_meaningless_pictures_have_the_identity_of_what_the_vision_tower_is_given(
    tiny_model: TinyModel,
) -> None:
    """So a tower of one size has one blank picture, warm in the caches for every request."""
    builder = builder_of(tiny_model)
    pictures = []
    for size in ((24, 16), (48, 20), (24, 16)):
        pair = builder.build(conversation("Hi", 1), [picture(1, size)], "blank").pair
        assert pair is not None
        pictures.append(pair.corrupted.images[0])
    first, other, again = pictures
    is_same = first.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in first.tensors.items()
    )
    assert first.digest == again.digest
    assert (first.digest == other.digest) == is_same
    if tiny_model.name in ("llava", "gemma3"):
        assert is_same


def test_blank_and_gray_of_one_size_are_kept_apart(tiny_llava: TinyModel) -> None:
    builder = builder_of(tiny_llava)
    digests = []
    for kind in ("blank", "gray", "blank"):
        pair = builder.build(conversation("Hi", 1), IMAGES[:1], kind).pair
        assert pair is not None
        digests.append(pair.corrupted.images[0].digest)
    assert digests[0] == digests[2] != digests[1]


def test_only_the_pair_fails_where_the_template_wants_a_picture(tiny_llava: TinyModel) -> None:
    """The request itself can be served, so the error is another."""
    processor = copy.copy(tiny_llava.processor)
    processor.chat_template = (
        "{% if messages[0].content[0].type == 'image' %}<image>{{ messages[0].content[1].text }}"
        "{% else %}{{ raise_exception('no picture') }}{% endif %}"
    )
    builder = builder_of(tiny_llava, processor)
    builder.build(conversation("Hi", 1), IMAGES[:1])
    with pytest.raises(PairError, match="cannot be measured: .* no picture"):
        builder.build(conversation("Hi", 1), IMAGES[:1], "blank")


def test_a_corrupted_picture_of_other_tokens_makes_no_pair(tiny_llava: TinyModel) -> None:
    class ByContent(CountingProcessor):
        """Makes 5 tokens of a white picture, and 4 of any other."""

        def __call__(self, **kwargs: Any) -> Any:
            processed = super().__call__(**kwargs)
            if kwargs["images"][0].getpixel((0, 0)) == (255, 255, 255):
                offsets = processed["text_replacement_offsets"][0][0]
                offsets["replacement"] += self.image_token
            return processed

    builder = builder_of(tiny_llava, ByContent(tiny_llava.processor))
    with pytest.raises(PairError, match="does not become the same tokens"):
        builder.build(conversation("Hi", 1), IMAGES[:1], "blank")
    assert builder.build(conversation("Hi", 1), IMAGES[:1], "gray").pair is not None
