"""Which requests are asked how far their prompts lie from text, and measured against what."""

import random
from collections.abc import Callable

from steering.projection import Reference
from steering.vectors import ShiftVectors


def is_probed(share: float, has_images: bool, draw: Callable[[], float] = random.random) -> bool:
    """Of the requests with pictures, a share between 0 and 1, by chance."""
    return has_images and draw() < share


def reference_of(vectors: ShiftVectors | None) -> Reference | None:
    """None where there is no set, or one of before sets knew what text looks like."""
    return None if vectors is None else vectors.reference
