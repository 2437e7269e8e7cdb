"""A picture as the processor sees it, and the meaningless ones, which are kept for their next use.

Does not draw them nor run the processor (inputs.py), and keeps no features (vision.py).
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from steering.corruption import Corruption

# A picture's tensors take 1 MB (LLaVA-1.5) to 27 MB (Idefics3 at its largest size).
KEPT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Picture:
    """One picture as the processor alone sees it; `text` stands in the prompt in its place."""

    digest: str
    tensors: dict[str, Tensor]
    text: str
    num_features: int

    @property
    def num_bytes(self) -> int:
        """Of its tensors and its text, which is as long as its tokens are many."""
        return len(self.text) + sum(tensor.nbytes for tensor in self.tensors.values())


class MeaninglessPictures:
    """Pictures by kind and size under a byte budget, least recently used first to go.

    Safe in many threads. `num_bytes`: what the kept ones take now.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self.num_bytes = 0
        self._pictures: OrderedDict[tuple[Corruption, tuple[int, int]], Picture] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, kind: Corruption, size: tuple[int, int]) -> Picture | None:
        """A kept picture, which becomes the last to go."""
        with self._lock:
            picture = self._pictures.get((kind, size))
            if picture is not None:
                self._pictures.move_to_end((kind, size))
            return picture

    def put(self, kind: Corruption, size: tuple[int, int], picture: Picture) -> None:
        """Keep a picture, unless it alone exceeds the budget or another thread was first."""
        with self._lock:
            if (kind, size) in self._pictures or picture.num_bytes > self._budget_bytes:
                return
            while self.num_bytes + picture.num_bytes > self._budget_bytes:
                self.num_bytes -= self._pictures.popitem(last=False)[1].num_bytes
            self._pictures[kind, size] = picture
            self.num_bytes += picture.num_bytes
