"""Rendered pictures with questions whose answers are known.

The demonstration model is trained and measured on these: coloured shapes on flat, graded,
cloudy, striped and noisy backgrounds. Needs Pillow and NumPy only. Not covered: photographs.

A scene (which shape, in which colour, at which place) belongs to one split by its digest, so
an unseen scene never occurs in training, on whatever background.
"""

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Split = Literal["train", "unseen"]
Kind = Literal["colour", "shape", "count", "position"]

SIZE = 96
MAX_THINGS = 4
KINDS: tuple[Kind, ...] = ("colour", "shape", "count", "position")
NUMBERS = ("no", "one", "two", "three", "four")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 32, 36),
    "green": (30, 150, 50),
    "blue": (32, 70, 214),
    "yellow": (246, 216, 30),
    "purple": (136, 40, 168),
    "orange": (246, 130, 20),
}
PLACES = {
    "top left": (23, 23),
    "top right": (73, 23),
    "centre": (48, 48),
    "bottom left": (23, 73),
    "bottom right": (73, 73),
}
UNSEEN_SHARE = 8  # one scene in eight is kept from training

_QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "colour": (
        "What colour is the {shape}?",
        "Which colour does the {shape} have?",
        "Tell me the colour of the {shape}.",
    ),
    "shape": (
        "What shape is the {colour} one?",
        "Which shape is {colour}?",
        "Name the shape that is {colour}.",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes does the picture show?",
        "Count the shapes in the picture.",
    ),
    "position": (
        "Where is the {colour} {shape}?",
        "In which part of the picture is the {colour} {shape}?",
        "Tell me where the {colour} {shape} is.",
    ),
}
_DESCRIBE = ("What is in the picture?", "Describe the picture.", "What does this picture show?")


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    place: str


@dataclass(frozen=True)
class Question:
    """A question, a full-sentence answer, and the words that make an answer right."""

    kind: str
    text: str
    answer: str
    key: str


@dataclass(frozen=True)
class Example:
    image: Image.Image
    things: tuple[Thing, ...]
    question: Question


def split_of(things: tuple[Thing, ...]) -> Split:
    text = ";".join(sorted(f"{t.shape},{t.colour},{t.place}" for t in things))
    return "unseen" if hashlib.sha256(text.encode()).digest()[0] % UNSEEN_SHARE == 0 else "train"


def scene(rng: random.Random, split: Split, *, smallest: int = 1) -> tuple[Thing, ...]:
    """Draw a scene of the split, its things in reading order of their places.

    An empty scene (only with smallest=0) belongs to both splits.
    """
    while True:
        places = sorted(rng.sample(range(len(PLACES)), rng.randint(smallest, MAX_THINGS)))
        names = list(PLACES)
        things = tuple(
            Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), names[place]) for place in places
        )
        if not things or split_of(things) == split:
            return things


def ask(rng: random.Random, things: tuple[Thing, ...], kind: Kind) -> Question | None:
    """Ask a question of that kind, or return None where the scene allows none."""
    pattern = rng.choice(_QUESTIONS[kind])
    if kind == "count":
        verb, noun = ("is", "shape") if len(things) == 1 else ("are", "shapes")
        number = NUMBERS[len(things)]
        return Question(kind, pattern, f"There {verb} {number} {noun}.", number)
    candidates = [thing for thing in things if _is_clear(thing, things, kind)]
    if not candidates:
        return None
    thing = rng.choice(candidates)
    text = pattern.format(shape=thing.shape, colour=thing.colour)
    if kind == "colour":
        return Question(kind, text, f"The {thing.shape} is {thing.colour}.", thing.colour)
    if kind == "shape":
        return Question(kind, text, f"The {thing.colour} one is a {thing.shape}.", thing.shape)
    preposition = "in" if thing.place == "centre" else "at"
    answer = f"The {thing.colour} {thing.shape} is {preposition} the {thing.place}."
    return Question(kind, text, answer, thing.place)


def describe(rng: random.Random, things: tuple[Thing, ...]) -> Question:
    """Ask for a description; used in training only, as it has no single key."""
    parts = [
        f"a {t.colour} {t.shape} {'in' if t.place == 'centre' else 'at'} the {t.place}"
        for t in things
    ]
    text = " and ".join(parts) or "no shapes"
    return Question("describe", rng.choice(_DESCRIBE), f"The picture shows {text}.", text)


def is_right(question: Question, reply: str) -> bool:
    """Say whether the reply names the key and none of its rivals."""
    said = reply.lower()
    rivals = {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "count": NUMBERS,
        "position": tuple(PLACES),
    }[question.kind]
    if question.kind == "shape":  # "the red one" is no number, "which shape" no answer
        said = said.replace(" one", "")
    words = said.replace(".", " ").replace(",", " ")
    named = [rival for rival in rivals if f" {rival} " in f" {words} "]
    return named == [question.key]


def example(seed: int, split: Split = "unseen", kind: Kind | None = None) -> Example:
    """Render one picture with one question; the same arguments give the same example."""
    rng = random.Random(f"{split}:{kind}:{seed}")
    wanted = kind or KINDS[rng.randrange(len(KINDS))]
    while True:
        things = scene(rng, split)
        question = ask(rng, things, wanted)
        if question is not None:
            return Example(render(things, rng.getrandbits(32)), things, question)


def render(things: tuple[Thing, ...], seed: int) -> Image.Image:
    """Render a scene, 96 x 96 pixels, on a background drawn from the seed."""
    rng = random.Random(seed)
    image = background(seed)
    draw_on = image.resize((SIZE * 2, SIZE * 2), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(draw_on)
    for thing in things:
        _draw(draw, rng, thing)
    image = draw_on.resize((SIZE, SIZE), Image.Resampling.BOX)
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return image


def background(seed: int) -> Image.Image:
    """Render a background: flat, graded, cloudy, striped, chequered or noisy."""
    rng = np.random.default_rng(seed)
    style = ("flat", "white", "graded", "clouds", "clouds", "stripes", "chequers", "noise")[
        int(rng.integers(8))
    ]
    one, two = _muted(rng), _muted(rng)
    ramp_y, ramp_x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)
    if style == "white":
        pixels = np.full((SIZE, SIZE, 3), 255.0)
    elif style == "flat":
        pixels = np.broadcast_to(one, (SIZE, SIZE, 3)).copy()
    elif style == "graded":
        angle = rng.uniform(0, 2 * math.pi)
        share = ramp_x * math.cos(angle) + ramp_y * math.sin(angle)
        pixels = _mix(one, two, (share - share.min()) / (np.ptp(share) + 1e-6))
    elif style == "clouds":
        pixels = _clouds(rng)
    elif style == "noise":
        pixels = rng.normal(rng.uniform(90, 170), rng.uniform(20, 70), (SIZE, SIZE, 3))
    else:
        period = rng.uniform(0.08, 0.35)
        wave = (ramp_x + rng.uniform(-1, 1) * ramp_y) / period % 1 < 0.5
        if style == "chequers":
            wave ^= ramp_y / period % 1 < 0.5
        pixels = _mix(one, 0.6 * one + 0.4 * two, wave.astype(float))
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _is_clear(thing: Thing, things: tuple[Thing, ...], kind: Kind) -> bool:
    others = [other for other in things if other is not thing]
    if kind == "colour":
        return all(other.shape != thing.shape for other in others)
    if kind == "shape":
        return all(other.colour != thing.colour for other in others)
    return all((other.shape, other.colour) != (thing.shape, thing.colour) for other in others)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour too grey to be mistaken for a thing's, light or dark."""
    grey = rng.uniform(20, 250)
    return np.clip(grey + rng.uniform(-35, 35, 3), 0, 255)


def _mix(one: np.ndarray, two: np.ndarray, share: np.ndarray) -> np.ndarray:
    return one + (two - one) * share[:, :, None]


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Smooth blobs on several scales, the nearest thing here to a photograph."""
    total = np.zeros((SIZE, SIZE, 3))
    for cells in (3, 6, 14, 30):
        grey = rng.normal(0, 1, (cells, cells, 1)) + 0.5 * rng.normal(0, 1, (cells, cells, 3))
        scaled = Image.fromarray(np.clip(128 + 50 * grey, 0, 255).astype(np.uint8))
        blown = scaled.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        total += (np.asarray(blown, dtype=float) - 128) / cells**0.5
    return rng.uniform(60, 190) + total * rng.uniform(0.5, 1.6)


def _draw(draw: ImageDraw.ImageDraw, rng: random.Random, thing: Thing) -> None:
    """Draw a thing on a canvas of twice the size."""
    centre_x, centre_y = PLACES[thing.place]
    x, y = (2 * (centre + rng.uniform(-5, 5)) for centre in (centre_x, centre_y))
    r = 2 * rng.uniform(11, 16)
    red, green, blue = (
        max(0, min(255, channel + rng.randint(-14, 14))) for channel in COLOURS[thing.colour]
    )
    fill = (red, green, blue)
    edge = rng.choice([None, (15, 15, 15), (245, 245, 245)])
    if thing.shape in ("circle", "ring"):
        box = (x - r, y - r, x + r, y + r)
        if thing.shape == "ring":
            draw.ellipse(box, outline=fill, width=int(r * rng.uniform(0.35, 0.45)))
        else:
            draw.ellipse(box, fill=fill, outline=edge, width=2)
        return
    draw.polygon(_outline(thing.shape, x, y, r, rng.uniform(-0.15, 0.15)), fill=fill, outline=edge)


def _outline(shape: str, x: float, y: float, r: float, turn: float) -> list[tuple[float, float]]:
    polar: list[tuple[float, float]]  # (radius, angle from straight up)
    if shape == "square":
        polar = [(1.15, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif shape == "triangle":
        polar = [(1.15, k * 2 * math.pi / 3) for k in range(3)]
    elif shape == "star":
        polar = [(1.2 if k % 2 == 0 else 0.5, k * math.pi / 5) for k in range(10)]
    else:  # cross
        arm = math.atan2(0.33, 1.1)
        quarter = [(math.hypot(0.33, 1.1), -arm), (math.hypot(0.33, 1.1), arm), (0.47, math.pi / 4)]
        polar = [(size, angle + k * math.pi / 2) for k in range(4) for size, angle in quarter]
    return [
        (x + r * size * math.sin(angle + turn), y - r * size * math.cos(angle + turn))
        for size, angle in polar
    ]
