"""The pictures that are shown: photographs dealt to items without one, and what conditions make of
a picture and of the text beside it. Encoded bytes are passed on as they are."""

import base64
import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from steering.corruption import corrupt
from steering.demo.pictures import example
from steering.errors import EvaluationError
from steering.evaluate.conditions import PictureUse
from steering.evaluate.items import Item, picture_bytes
from steering.evaluate.suites import Suite

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_NUM_RENDERED = 32
_FIRST_RENDERED = 900_000_000  # numbers of pictures that no suite asks about
_NUM_KEPT = 64


@dataclass(frozen=True)
class Photos:
    """What is dealt to items without a picture. source: the folder, or `rendered`."""

    source: str
    images: tuple[Path | bytes, ...]

    @property
    def digest(self) -> str:
        """sha256 over the pictures, in order; their names do not matter."""
        digests = [hashlib.sha256(picture_bytes(image)).hexdigest() for image in self.images]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dealt(self, suite: Suite, seed: int) -> Suite:
        """The suite with a picture for every item: the n-th gets the n-th of a shuffle that the
        seed and the suite's name decide, round and round, so that each is used equally often."""
        order = list(self.images)
        random.Random(f"{seed}:{suite.name}:photographs").shuffle(order)
        items = [
            replace(item, image=order[index % len(order)]) if item.image is None else item
            for index, item in enumerate(suite.items)
        ]
        return replace(suite, items=tuple(items))


def photos(folder: Path | None) -> Photos:
    """The folder's pictures by name, or rendered ones of our own. Raises EvaluationError, naming
    the file that is no picture."""
    if folder is None:
        numbers = range(_FIRST_RENDERED, _FIRST_RENDERED + _NUM_RENDERED)
        return Photos("rendered", tuple(_png(example(n, "unseen").image) for n in numbers))
    if not folder.is_dir():
        raise EvaluationError(f"--photos {folder}: not a folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not found:
        raise EvaluationError(f"--photos {folder}: no {', '.join(_ENDINGS)} in it")
    for path in found:
        _open(picture_bytes(path), str(path))
    return Photos(str(folder), tuple(path.absolute() for path in found))


class Shown:
    """Pictures as data: URLs, as a condition shows them; the last ones are kept."""

    def __init__(self) -> None:
        self._url = lru_cache(maxsize=_NUM_KEPT)(_data_url)

    def url(self, item: Item, use: PictureUse) -> str | None:
        """None where the condition shows no picture. Raises EvaluationError."""
        if use in ("none", "caption"):
            return None
        if item.image is None:
            raise EvaluationError(f"suite {item.suite}, {item.id}: no picture was dealt to it")
        return self._url(item.image, use)


def asked_text(item: Item, use: PictureUse) -> str:
    """The prompt, after the picture's caption where that stands for the picture."""
    return (
        f"The picture shows: {item.caption}\n\n{item.prompt}" if use == "caption" else item.prompt
    )


def asked_image(item: Item, use: PictureUse) -> Image.Image | None:
    """The RGB picture that a server makes of what `Shown` sends: upright, on white where it is
    transparent. None where the condition shows none. Raises EvaluationError."""
    if use in ("none", "caption"):
        return None
    where = f"suite {item.suite}, {item.id}"
    picture = _open(item.picture() or b"", where)
    try:
        if use in ("blank", "noise"):
            return corrupt(picture.convert("RGB"), use)
        upright = ImageOps.exif_transpose(picture)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        shown = upright.convert("RGBA")
    except OSError:
        raise EvaluationError(f"{where}: not a picture that can be read") from None
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def check(items: Sequence[Item]) -> None:
    """Raise EvaluationError for the first item whose own picture is none."""
    for item in items:
        if item.image is not None:
            _open(picture_bytes(item.image), f"suite {item.suite}, {item.id}")


def _data_url(image: Path | bytes, use: PictureUse) -> str:
    encoded = picture_bytes(image)
    if use in ("blank", "noise"):
        encoded = _png(corrupt(_open(encoded, "a picture").convert("RGB"), use))
    kind = (_open(encoded, "a picture").format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _open(encoded: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise EvaluationError(f"{where}: not a picture that can be read") from None


def _png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()
