"""The vision-feature cache, with random features for a vision tower's."""

import random
from collections import OrderedDict

import torch
from torch import Tensor

from server.engine.types import ImageInput
from server.engine.vision import VisionCache

DIM = 8


def image(digest: str, num_features: int = 4) -> ImageInput:
    return ImageInput(digest, {}, start=5, end=5 + num_features, num_features=num_features)


def expected(picture: ImageInput) -> Tensor:
    seed = sum(picture.digest.encode()) * 100 + picture.num_features
    return torch.randn(picture.num_features, DIM, generator=torch.Generator().manual_seed(seed))


class Tower:
    """Stands for the vision tower; `seen` are the digests that it was asked for."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, picture: ImageInput) -> Tensor:
        self.seen.append(picture.digest)
        return expected(picture)


def num_bytes(picture: ImageInput) -> int:
    return picture.num_features * DIM * 4


def test_a_repeated_picture_is_encoded_once() -> None:
    cache, tower = VisionCache(10_000), Tower()
    for _ in range(3):
        features = cache.features(image("a"), "tenant", tower)
        torch.testing.assert_close(features, expected(image("a")), rtol=0, atol=0)
    assert tower.seen == ["a"]
    assert (cache.hit_tokens, cache.missed_tokens) == (8, 4)
    assert cache.num_bytes == num_bytes(image("a"))


def test_another_picture_of_the_same_place_and_size_is_another_one() -> None:
    cache, tower = VisionCache(10_000), Tower()
    cache.features(image("a"), "tenant", tower)
    other = cache.features(image("b"), "tenant", tower)
    torch.testing.assert_close(other, expected(image("b")), rtol=0, atol=0)
    assert tower.seen == ["a", "b"]


def test_namespaces_do_not_see_each_others_pictures() -> None:
    cache, tower = VisionCache(10_000), Tower()
    cache.features(image("a"), "tenant", tower)
    cache.features(image("a"), "other", tower)
    assert tower.seen == ["a", "a"]
    assert cache.hit_tokens == 0


def test_writing_to_what_the_tower_returned_changes_nothing_kept() -> None:
    cache, tower = VisionCache(10_000), Tower()
    batch = torch.stack([expected(image("a")), expected(image("b"))])
    cache.features(image("a"), "tenant", lambda _: batch[0])
    batch.zero_()
    kept = cache.features(image("a"), "tenant", tower)
    torch.testing.assert_close(kept, expected(image("a")), rtol=0, atol=0)
    assert kept.untyped_storage().nbytes() == cache.num_bytes
    assert tower.seen == []


def test_features_that_are_not_finite_are_returned_and_not_kept() -> None:
    cache, tower = VisionCache(10_000), Tower()
    broken = expected(image("a"))
    broken[2, 3] = float("nan")
    assert cache.features(image("a"), "tenant", lambda _: broken).isnan().sum() == 1
    assert cache.num_bytes == 0
    assert cache.features(image("a"), "tenant", tower).isfinite().all()
    assert tower.seen == ["a"]


def test_without_a_budget_every_picture_is_encoded() -> None:
    cache, tower = VisionCache(0), Tower()
    for _ in range(2):
        assert cache.features(image("a"), "tenant", tower).shape == (4, DIM)
    assert tower.seen == ["a", "a"]
    assert (cache.num_bytes, cache.hit_tokens, cache.missed_tokens) == (0, 0, 8)


def test_clear_forgets_pictures_and_keeps_counting() -> None:
    cache, tower = VisionCache(10_000), Tower()
    cache.features(image("a"), "tenant", tower)
    cache.clear()
    assert cache.num_bytes == 0
    cache.features(image("a"), "tenant", tower)
    assert tower.seen == ["a", "a"]
    assert cache.missed_tokens == 8


def test_random_use_agrees_with_a_plain_model_of_the_cache() -> None:
    """Features, hits, bytes and order of eviction, over pictures of several sizes."""
    rng, budget = random.Random(0), 30 * DIM * 4
    cache, tower = VisionCache(budget), Tower()
    model: OrderedDict[tuple[str, str], int] = OrderedDict()
    hits = misses = 0
    for _ in range(500):
        digest, namespace = rng.choice("abcdefgh"), rng.choice(["", "tenant"])
        picture = image(digest, {"a": 31, "b": 30}.get(digest, ord(digest) - ord("a")))
        num_seen, key = len(tower.seen), (namespace, digest)
        features = cache.features(picture, namespace, tower)
        torch.testing.assert_close(features, expected(picture), rtol=0, atol=0)
        assert (len(tower.seen) == num_seen) == (key in model)
        if key in model:
            hits += picture.num_features
            model.move_to_end(key)
        else:
            misses += picture.num_features
            if num_bytes(picture) <= budget:
                while sum(model.values()) + num_bytes(picture) > budget:
                    model.popitem(last=False)
                model[key] = num_bytes(picture)
        assert cache.num_bytes == sum(model.values()) <= budget
    assert (cache.hit_tokens, cache.missed_tokens) == (hits, misses)
    assert hits > 300 and misses > 300
