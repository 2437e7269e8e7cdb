"""The meaningless pictures that are kept: their budget, and their order of going."""

import random
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import torch

from server.engine.pictures import MeaninglessPictures, Picture
from steering.corruption import Corruption

Size = tuple[int, int]


def picture(num_bytes: int) -> Picture:
    """4 of its bytes are its text's."""
    values = torch.zeros(num_bytes - 4, dtype=torch.uint8)
    return Picture("digest", {"pixel_values": values[:3], "mask": values[3:]}, "text", 4)


def test_a_pictures_bytes_are_its_tensors_and_its_text() -> None:
    tensors = {"pixel_values": torch.zeros(2, 3), "grid": torch.zeros(1, 3, dtype=torch.int64)}
    assert Picture("digest", tensors, "<image>" * 5, 5).num_bytes == 24 + 24 + 35


def test_a_picture_over_the_budget_is_not_kept_and_drives_none_out() -> None:
    kept = MeaninglessPictures(100)
    small, large = picture(40), picture(101)
    kept.put("blank", (1, 1), small)
    kept.put("blank", (9, 9), large)
    assert kept.get("blank", (1, 1)) is small
    assert kept.get("blank", (9, 9)) is None
    assert kept.num_bytes == 40
    kept.put("blank", (10, 10), exact := picture(100))
    assert kept.get("blank", (10, 10)) is exact
    assert (kept.get("blank", (1, 1)), kept.num_bytes) == (None, 100)


def test_the_first_of_two_equal_ones_stays_and_counts_once() -> None:
    kept = MeaninglessPictures(100)
    first = picture(40)
    kept.put("gray", (1, 2), first)
    kept.put("gray", (1, 2), picture(40))
    assert kept.get("gray", (1, 2)) is first
    assert kept.get("gray", (2, 1)) is kept.get("blank", (1, 2)) is None
    assert kept.num_bytes == 40


def test_random_use_agrees_with_a_plain_model_of_it() -> None:
    rng, budget = random.Random(0), 200
    kept = MeaninglessPictures(budget)
    model: OrderedDict[tuple[Corruption, Size], Picture] = OrderedDict()
    hits = 0
    for _ in range(1000):
        kind: Corruption = rng.choice(("blank", "gray"))
        size = (rng.randrange(1, 8), 5)
        found = kept.get(kind, size)
        assert found is model.get((kind, size))
        if found is not None:
            hits += 1
            model.move_to_end((kind, size))
        else:
            new = picture(size[0] * 12)
            kept.put(kind, size, new)
            model[kind, size] = new
            while sum(one.num_bytes for one in model.values()) > budget:
                model.popitem(last=False)
        assert kept.num_bytes == sum(one.num_bytes for one in model.values()) <= budget
    assert 100 < hits < 900


def test_many_threads_keep_to_the_budget() -> None:
    kept = MeaninglessPictures(300)

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            size = (rng.randrange(1, 12), 1)
            found = kept.get("blank", size)
            assert found is None or found.num_bytes == size[0] * 10
            kept.put("blank", size, picture(size[0] * 10))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    sizes = [(width, 1) for width in range(1, 12)]
    left = [one.num_bytes for size in sizes if (one := kept.get("blank", size)) is not None]
    assert 0 < sum(left) == kept.num_bytes <= 300
