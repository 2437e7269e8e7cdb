"""Corrupted images: same size, no content, equal for equal inputs."""

import numpy as np
import pytest
from PIL import Image

from steering.corruption import CORRUPTIONS, MEANINGLESS, Corruption, corrupt, image_digest
from steering.errors import PlanError


def photo(width: int = 30, height: int = 20, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_every_kind_keeps_the_size_and_gives_rgb(kind: Corruption, mode: str) -> None:
    corrupted = corrupt(photo().convert(mode), kind)
    assert (corrupted.size, corrupted.mode) == ((30, 20), "RGB")


@pytest.mark.parametrize(
    ("kind", "colour"), [("blank", (255, 255, 255)), ("gray", (128, 128, 128))]
)
def test_blank_is_white_and_gray_is_middle_gray(
    kind: Corruption, colour: tuple[int, int, int]
) -> None:
    assert corrupt(photo(), kind).getcolors() == [(600, colour)]


def test_mean_colour_is_the_mean_of_each_channel() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (10, 0, 200))
    image.putpixel((1, 0), (30, 0, 100))
    assert corrupt(image, "mean-colour").getcolors() == [(2, (20, 0, 150))]


def test_noise_is_gaussian_and_equal_for_equal_image_and_seed_only() -> None:
    noise = corrupt(photo(300, 200), "noise")
    values = np.asarray(noise).astype(float)
    assert values.mean() == pytest.approx(127.5, abs=1)
    assert values.std() == pytest.approx(62, abs=2)  # 64, less what is clipped at 0 and 255
    assert noise.tobytes() == corrupt(photo(300, 200), "noise").tobytes()
    assert noise.tobytes() != corrupt(photo(300, 200), "noise", seed=1).tobytes()
    assert noise.tobytes() != corrupt(photo(300, 200, seed=1), "noise").tobytes()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_meaningless_pictures_are_those_that_their_size_alone_decides(kind: Corruption) -> None:
    """They are shared between tenants, so nothing of a client's picture may be left in them."""
    one, other = corrupt(photo(seed=1), kind), corrupt(photo(seed=2), kind)
    assert (one.tobytes() == other.tobytes()) == (kind in MEANINGLESS)


def test_the_digest_tells_the_same_bytes_of_another_size_apart() -> None:
    flat = Image.frombytes("RGB", (30, 150), bytes(30 * 150 * 3))
    tall = Image.frombytes("RGB", (150, 30), bytes(30 * 150 * 3))
    assert flat.tobytes() == tall.tobytes()
    assert image_digest(flat) != image_digest(tall)


def test_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(PlanError, match="'black' is not one of: blank, noise, gray, mean-colour"):
        corrupt(photo(), "black")  # type: ignore[arg-type]
