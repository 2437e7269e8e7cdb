"""Images: what is accepted becomes upright RGB on white; bombs and damage are refused cheaply."""

import random
import struct
import zlib
from base64 import b64encode, urlsafe_b64encode
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from server.errors import InvalidRequestError
from server.media import FORMATS, MediaLimits, decode_images
from tests.server.fakes import data_url, image_bytes

LIMITS = MediaLimits(max_images=2, max_bytes=100_000, max_pixels=1_000_000, max_aspect=50)


def decode(data: bytes, limits: MediaLimits = LIMITS) -> Image.Image:
    return decode_images([data_url(data)], limits)[0]


def refusal_of(url: str, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode_images([url], limits)
    assert caught.value.status == 400
    return str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_decoded_whatever_its_label_says(format: str) -> None:
    image = decode_images([data_url(image_bytes((8, 6), format=format), "image/x")], LIMITS)[0]
    assert (image.mode, image.size) == ("RGB", (8, 6))
    red, green, blue = image.getpixel((3, 3))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("format", ["TIFF", "ICO", "PPM", "TGA"])
def test_other_formats_are_refused_even_under_a_good_label(format: str) -> None:
    assert "accepted are JPEG" in refusal_of(data_url(image_bytes((32, 32), format=format)))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "https://127.0.0.1/a.png",
        "http://2130706433/",
        "http://[64:ff9b::7f00:1]/",
        "ftp://x/y",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
    ],
)
def test_nothing_is_fetched(url: str) -> None:
    assert "only data: URLs are accepted" in refusal_of(url)


@pytest.mark.parametrize(
    "url",
    ["data:", "data:image/png,abc", "data:text/html;base64,AAAA", "data:;base64,AAAA", "data:,"],
)
def test_a_data_url_must_be_base64_of_an_image(url: str) -> None:
    assert "must look like" in refusal_of(url)


def test_base64_is_strict() -> None:
    encoded = b64encode(image_bytes()).decode()
    for bad in (
        encoded[:-1],
        encoded + "=",
        encoded[:9] + "\n" + encoded[9:],
        " " + encoded,
        encoded[:8] + "é" + encoded[9:],
        encoded[:8] + "%2B" + encoded[11:],
        urlsafe_b64encode(b"\xff\xef" * 30).decode(),
    ):
        assert "base64 is malformed" in refusal_of(f"data:image/png;base64,{bad}")
    assert "not a readable image" in refusal_of("data:image/png;base64,")


def test_the_scheme_and_its_parameters_may_be_written_in_any_case() -> None:
    encoded = b64encode(image_bytes()).decode()
    assert decode_images([f"DATA:IMAGE/PNG;charset=x;BASE64,{encoded}"], LIMITS)[0].size == (8, 6)


def test_too_many_bytes_are_refused_before_they_are_decoded() -> None:
    message = refusal_of("data:image/png;base64," + "!" * 200_000)
    assert "about 150000 bytes; the limit is 100000" in message
    exact = MediaLimits(2, len(image_bytes()), 1_000_000, 50)
    assert decode(image_bytes(), exact).size == (8, 6)
    less = MediaLimits(2, len(image_bytes()) - 1, 1_000_000, 50)
    assert "the limit is" in refusal_of(data_url(), less)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; its data is almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(1001, 1000), (13000, 13000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    assert "pixels; the limit is 1000000" in refusal_of(data_url(png_claiming(*size)))


def test_a_real_bomb_is_small_on_the_wire_and_still_refused() -> None:
    data = image_bytes((4000, 4000), mode="1", colour=0)
    assert len(data) < 10_000
    assert "4000 x 4000 = 16000000 pixels" in refusal_of(data_url(data))


def test_a_gif_frame_larger_than_its_screen_cannot_pass_the_limit() -> None:
    """The header says 8 x 6, the frame's own descriptor says 20,000 x 20,000."""
    data = bytearray(image_bytes((8, 6), format="GIF"))
    descriptor = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[descriptor + 5 : descriptor + 9] = struct.pack("<HH", 20_000, 20_000)
    assert "too many pixels" in refusal_of(data_url(bytes(data)))


def test_a_needle_is_refused_because_processors_scale_its_short_side() -> None:
    """1 x 60 pixels, scaled to a short side of 336, is already 336 x 20,160."""
    assert "over 50 times" in refusal_of(data_url(image_bytes((1, 51))))
    assert "over 50 times" in refusal_of(data_url(image_bytes((51, 1))))
    assert decode(image_bytes((1, 50))).size == (1, 50)


def test_the_number_of_images_is_bounded() -> None:
    with pytest.raises(InvalidRequestError, match="3 images in one request; the limit is 2"):
        decode_images([data_url()] * 3, LIMITS)


def test_the_message_says_which_image() -> None:
    with pytest.raises(InvalidRequestError, match="image 2 of 2"):
        decode_images([data_url(), "x"], LIMITS)


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_image_is_refused_and_never_grey_filled(format: str) -> None:
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    buffer = BytesIO()
    noise.save(buffer, format)
    data = buffer.getvalue()
    for length in (10, len(data) // 2):
        refusal_of(data_url(data[:length]))


@pytest.mark.parametrize("format", FORMATS)
def test_damage_gives_a_picture_or_a_400_and_nothing_else(format: str) -> None:
    """Pillow's decoders raise many kinds of exception; none may become a 500."""
    chance = random.Random(1)
    original = image_bytes((24, 16), format=format)
    for _ in range(150):
        data = bytearray(original)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except InvalidRequestError as error:
            assert error.status == 400


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_transparent_becomes_white(mode: str, clear: Any) -> None:
    assert decode(image_bytes(mode=mode, colour=clear)).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_colour_becomes_white() -> None:
    buffer = BytesIO()
    Image.new("P", (4, 4), 0).save(buffer, "PNG", transparency=0)
    assert decode(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    """Pillow's own conversion clips at 255: a mid-grey scan would come out white."""
    buffer = BytesIO()
    Image.new("I;16", (4, 4), 0x8000).save(buffer, "PNG")
    red, _, _ = decode(buffer.getvalue()).getpixel((0, 0))  # type: ignore[misc]
    assert abs(red - 128) <= 1


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)),
     (8, (0, 1))],
)  # fmt: skip
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    """The stored top left is red; where it is seen follows from the EXIF standard's table."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    seen = decode(buffer.getvalue())
    assert seen.size == ((40, 20) if orientation < 5 else (20, 40))
    x, y = (2 if corner[0] == 0 else seen.width - 3), (2 if corner[1] == 0 else seen.height - 3)
    assert seen.getpixel((x, y))[1] < 80  # type: ignore[index]


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for format in ("GIF", "WEBP", "PNG"):
        buffer = BytesIO()
        frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(buffer.getvalue()).getpixel((4, 4)) == (255, 0, 0)
