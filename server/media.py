"""Image part -> RGB picture, within byte, pixel, shape and scheme limits. Blocking, pure.

Only data: URLs; fetching http(s) is not covered. What the bytes are decides, not their label.
"""

import binascii
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from server.errors import InvalidRequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION_TAG = 0x0112
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders were seen to raise, and can raise by their source, on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class MediaLimits:
    """Bounds of one request's images; `max_aspect` because processors scale the short side."""

    max_images: int
    max_bytes: int
    max_pixels: int
    max_aspect: float


def decode_images(urls: Sequence[str], limits: MediaLimits) -> list[Image.Image]:
    """Decode every data: URL to RGB, in order. Raises InvalidRequestError naming the image."""
    if len(urls) > limits.max_images:
        raise InvalidRequestError(
            f"{len(urls)} images in one request; the limit is {limits.max_images}",
            param="messages",
        )
    return [
        decode_image(data_url_bytes(url, limits.max_bytes, name), limits, name)
        for name, url in ((f"image {i + 1} of {len(urls)}", url) for i, url in enumerate(urls))
    ]


def data_url_bytes(url: str, max_bytes: int, name: str) -> bytes:
    """The payload of `data:image/...;base64,...`; its length is checked before it is decoded."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.lower() != "data":
        raise _refused(name, "only data: URLs are accepted (data:image/png;base64,...)")
    header, comma, payload = rest.partition(",")
    media_type, *parameters = header.lower().split(";")
    if not comma or "base64" not in parameters or not media_type.startswith("image/"):
        raise _refused(name, "a data: URL must look like data:image/png;base64,...")
    if len(payload) // 4 * 3 - 2 > max_bytes:
        raise _refused(name, f"about {len(payload) // 4 * 3} bytes; the limit is {max_bytes} bytes")
    if len(payload) % 4:
        raise _refused(name, "the base64 is malformed (its length is no multiple of 4)")
    try:
        return binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character that is not ASCII
        raise _refused(name, f"the base64 is malformed ({error})") from None


def decode_image(data: bytes, limits: MediaLimits, name: str) -> Image.Image:
    """First frame as RGB, upright by EXIF, on white where transparent.

    Width and height come from the header and are checked before any pixel is decoded.
    """
    if len(data) > limits.max_bytes:
        raise _refused(name, f"{len(data)} bytes; the limit is {limits.max_bytes} bytes")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, limits, name)
            image.load()
            _check_size(image.size, limits, name)  # a GIF's frame may exceed its header's size
            return _rgb(_upright(image))
    except _TOO_LARGE:
        raise _refused(name, f"too many pixels; the limit is {limits.max_pixels}") from None
    except UnidentifiedImageError:
        raise _refused(name, f"not a readable image; accepted are {', '.join(FORMATS)}") from None
    except _DAMAGED as error:
        raise _refused(name, f"damaged or truncated ({type(error).__name__})") from None


def _check_size(size: tuple[int, int], limits: MediaLimits, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _refused(name, f"{width} x {height} pixels: empty")
    if width * height > limits.max_pixels:
        raise _refused(
            name,
            f"{width} x {height} = {width * height} pixels; the limit is {limits.max_pixels}",
        )
    if max(size) > limits.max_aspect * min(size):
        raise _refused(
            name, f"{width} x {height}: one side is over {limits.max_aspect:g} times the other"
        )


def _upright(image: Image.Image) -> Image.Image:
    orientation = None
    with suppress(*_DAMAGED):  # a picture with damaged EXIF is still a picture
        orientation = image.getexif().get(_ORIENTATION_TAG)
    transpose = _TRANSPOSE_OF_ORIENTATION.get(orientation) if orientation else None
    return image if transpose is None else image.transpose(transpose)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _refused(name: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {why}", param="messages", code="invalid_image")
