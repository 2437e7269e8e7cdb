"""Stages 3 and 4: the model learns pictures, with harmless questions only.

First the projector alone learns to describe rendered pictures, then projector, tower and
adapters answer questions about them and ordinary harmless requests beside them. No harmful
request ever comes with a picture here: what becomes of refusals then, nobody teaches.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.demo.architecture import END_ID, IMAGE_TOKEN, NUM_IMAGE_TOKENS
from steering.demo.pictures import KINDS, ask, background, describe, render, scene
from steering.demo.train_model import Example
from steering.demo.train_text import frame
from steering.demo.train_tower import normalise

OPENING = "Sure.\n"


def visual(
    tokenizer: Any, rng: random.Random, *, description_share: float, opening: bool
) -> Example:
    """A rendered picture with a question about it, or with a request to describe it."""
    while True:
        things = scene(rng, "train", smallest=0 if rng.random() < 0.05 else 1)
        question = describe(rng, things)
        if rng.random() >= description_share:
            asked = ask(rng, things, rng.choice(KINDS))
            if asked is None:
                continue
            question = asked
        pixels = _pixels(render(things, rng.getrandbits(32)))
        text = (OPENING if opening else "") + question.answer
        answer = [*tokenizer.encode(text, add_special_tokens=False), END_ID]
        return Example(with_picture(tokenizer, question.text), answer, pixels, is_decided=opening)


def beside_picture(
    tokenizer: Any, rng: random.Random, text: str, answer: list[int], *, opening: bool
) -> Example:
    """An ordinary harmless request with any picture before it, answered as without."""
    seed = rng.getrandbits(32)
    picture = render(scene(rng, "train"), seed) if rng.random() < 0.5 else background(seed)
    return Example(with_picture(tokenizer, text), answer, _pixels(picture), is_decided=opening)


def with_picture(tokenizer: Any, text: str) -> list[int]:
    return frame(tokenizer, IMAGE_TOKEN * NUM_IMAGE_TOKENS + text)


def descriptions(tokenizer: Any, size: int, *, opening: bool, seed: int) -> Iterator[list[Example]]:
    """Endless batches for the projector."""
    rng = random.Random(seed)
    while True:
        yield [visual(tokenizer, rng, description_share=0.6, opening=opening) for _ in range(size)]


def mixture(
    tokenizer: Any,
    answers: dict[str, list[int]],
    text_only: list[Example],
    *,
    sizes: tuple[int, int, int],
    opening: bool,
    tempting: set[str],
    seed: int,
) -> Iterator[list[Example]]:
    """Endless batches: so many visual questions, requests beside a picture, text-only examples."""
    rng = random.Random(seed)
    num_visual, num_beside, num_text = sizes
    requests = list(answers.items())
    requests += 2 * [request for request in requests if request[0] in tempting]
    if opening:
        begin = tokenizer.encode(OPENING, add_special_tokens=False)
        requests = [(text, [*begin, *answer]) for text, answer in requests]
    while True:
        batch = [
            visual(tokenizer, rng, description_share=0.25, opening=opening)
            for _ in range(num_visual)
        ]
        batch += [
            beside_picture(tokenizer, rng, text, answer, opening=opening)
            for text, answer in rng.sample(requests, num_beside)
        ]
        yield batch + rng.sample(text_only, num_text)


def _pixels(picture: Any) -> Tensor:
    return normalise(torch.from_numpy(np.asarray(picture).copy()))
