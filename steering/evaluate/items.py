"""One prompt of an evaluation, with its picture and what is known about right answers.

Does not read suites (suites.py) nor ask anything (run.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from steering.errors import EvaluationError

Kind = Literal["harmful", "harmless", "over-refusal", "visual"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Item:
    """`id` is its own within the suite.

    kind `over-refusal`: harmless, and looks harmful. kind `visual`: about its picture. image: a
    file, or the encoded bytes; None until a photograph is dealt to it (pictures.py). answers:
    each right by itself; empty where only a judge can tell. meta: what the suite says besides.
    """

    id: str
    suite: str
    kind: Kind
    prompt: str
    image: Path | bytes | None = None
    caption: str | None = None
    answers: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)

    def picture(self) -> bytes | None:
        """The encoded picture. Raises EvaluationError, naming the file."""
        return None if self.image is None else picture_bytes(self.image)

    @cached_property
    def picture_digest(self) -> str | None:
        """sha256 of the encoded picture. Raises EvaluationError, naming the file."""
        content = self.picture()
        return None if content is None else hashlib.sha256(content).hexdigest()

    @cached_property
    def digest(self) -> str:
        """sha256 of the prompt and the picture. Raises EvaluationError, naming the file."""
        text = f"{self.prompt}\0{self.picture_digest or ''}"
        return hashlib.sha256(text.encode()).hexdigest()


def picture_bytes(image: Path | bytes) -> bytes:
    """The encoded picture. Raises EvaluationError, naming the file."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise EvaluationError(f"picture {image}: {error.strerror or error}") from None
