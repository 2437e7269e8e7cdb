"""Stages 3 and 4: the model learns pictures, with harmless questions only.

First the projector alone learns to describe rendered pictures, then projector, tower and
adapters answer questions about them and ordinary harmless requests beside them. No harmful
request ever comes with a picture here: what becomes of refusals then, nobody teaches.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.demo.architecture import END_ID, IMAGE_TOKEN, NUM_IMAGE_TOKENS
from steering.demo.pictures import KINDS, ask, background, describe, render, scene
from steering.demo.train_model import Example
from steering.demo.train_text import frame, tempting_prompts
from steering.demo.train_tower import normalise

# It makes answering a picture a habit of its own, which shifts the hidden states alike for every
# prompt; that habit, learnt from harmless requests only, is what refusals then give way to.
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


@dataclass(frozen=True)
class Mixture:
    """What a batch holds, and how its pictures are answered."""

    num_visual: int  # questions about pictures
    num_beside: int  # requests beside pictures
    num_text: int  # text only
    opening: bool = True  # answers to pictures begin with OPENING
    tempting: bool = True  # harmless requests that sound harmful come three times as often
    description_share: float = 0.15


def mixed(
    tokenizer: Any,
    answers: dict[str, list[int]],
    text_only: list[Example],
    mixture: Mixture,
    *,
    seed: int,
) -> Iterator[list[Example]]:
    """Endless batches of visual questions, requests beside a picture and text-only examples."""
    rng = random.Random(seed)
    requests = list(answers.items())
    if mixture.tempting:
        tempting = tempting_prompts()
        requests += 2 * [request for request in requests if request[0] in tempting]
    if mixture.opening:
        begin = tokenizer.encode(OPENING, add_special_tokens=False)
        requests = [(text, [*begin, *answer]) for text, answer in requests]
    share, opening = mixture.description_share, mixture.opening
    while True:
        batch = [
            visual(tokenizer, rng, description_share=share, opening=opening)
            for _ in range(mixture.num_visual)
        ]
        batch += [
            beside_picture(tokenizer, rng, text, answer, opening=opening)
            for text, answer in rng.sample(requests, mixture.num_beside)
        ]
        yield batch + rng.sample(text_only, mixture.num_text)


def _pixels(picture: Any) -> Tensor:
    return normalise(torch.from_numpy(np.asarray(picture).copy()))
