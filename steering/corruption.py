"""A real image -> a corrupted image of the same size, so that the number of image tokens stays.

Does not decide which kind is used; the kind is part of a vector set's manifest.
"""

import hashlib
from typing import Literal, get_args

import numpy as np
from PIL import Image

from steering.errors import PlanError

Corruption = Literal["blank", "noise", "gray", "mean-colour"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
# The picture's size alone decides these: they hold nothing of any client's.
MEANINGLESS: tuple[Corruption, ...] = ("blank", "gray")

_NOISE_MEAN, _NOISE_STD = 127.5, 64.0


def corrupt(image: Image.Image, kind: Corruption, seed: int = 0) -> Image.Image:
    """An RGB image of `image`'s size without its content.

    blank: white. gray: (128, 128, 128). mean-colour: the image's mean. noise: Gaussian, mean
    127.5 and standard deviation 64 a channel, from `seed` and the image's own digest, so that
    equal images have equal noise. Raises PlanError for another kind.
    """
    if kind == "blank":
        return Image.new("RGB", image.size, "white")
    if kind == "gray":
        return Image.new("RGB", image.size, (128, 128, 128))
    if kind == "mean-colour":
        red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0).round()
        return Image.new("RGB", image.size, (int(red), int(green), int(blue)))
    if kind == "noise":
        random = np.random.default_rng([seed, int(image_digest(image), 16)])
        values = random.normal(_NOISE_MEAN, _NOISE_STD, (image.height, image.width, 3))
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    raise PlanError(f"corruption {kind!r} is not one of: {', '.join(CORRUPTIONS)}")


def image_digest(image: Image.Image) -> str:
    """sha256 of mode, size and pixels: 30 x 150 and 150 x 30 differ with the same bytes."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
