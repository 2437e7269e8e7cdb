"""Vision-feature cache: what the vision tower and projector made of a picture, for its next use.

Does not run the tower, nor put features into a prompt.
No locks: used on the engine thread only; other threads may read the counters.
"""

from collections.abc import Callable

from torch import Tensor

from server.engine.lru import TensorLRU
from server.engine.stats import CacheUse
from server.engine.types import ImageInput

# For pictures that hold nothing of any client's. No tenant can take it: a name holds no NUL.
SHARED_NAMESPACE = "\0shared"


class VisionCache:
    """Pictures' features under a byte budget, least recently used first to go; 0 turns it off.

    `hit_tokens` were found, `missed_tokens` encoded; counted in features, one an image token.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._features: TensorLRU[tuple[str, str]] = TensorLRU(budget_bytes)
        self.hit_tokens = 0
        self.missed_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Memory that the kept features take; never more than the budget."""
        return self._features.num_bytes

    def use(self) -> CacheUse:
        """What it came to so far."""
        budget = self._features.budget_bytes
        return CacheUse(self.hit_tokens, self.missed_tokens, self.num_bytes, budget)

    def features(
        self, image: ImageInput, namespace: str, encode: Callable[[ImageInput], Tensor]
    ) -> Tensor:
        """The picture's features (num_features, D), kept or from `encode`. Not to be written to.

        A namespace sees only its own pictures: whether one was kept shows in the time it takes.
        A picture that holds nothing of a client's (blank, gray) may go under SHARED_NAMESPACE.
        """
        key = (namespace, image.digest)
        if key in self._features:
            self.hit_tokens += image.num_features
            return self._features.use(key)
        features = encode(image)
        self.missed_tokens += image.num_features
        self._features.put(key, features)
        return features

    def clear(self) -> None:
        """Forget all features; the counters go on."""
        self._features.clear()
