"""How rows of one length class lie in memory, without a model; the shape of a model's own keys."""

import random

import pytest
import torch

from server.engine.slab import KVShape, Slab
from tests.tiny_models import TinyModel

SHAPE = KVShape(2, 1, 2, torch.float32, torch.device("cpu"))  # 2 layers, 1 head of 2


def filled(length: int, value: float) -> torch.Tensor:
    """A row's keys are `value`, its values the negative: (2, 2, 1, length, 2)."""
    kv = torch.full((2, 2, 1, length, 2), value)
    kv[:, 1] = -value
    return kv


def test_the_shape_is_that_of_the_models_own_keys(tiny_model: TinyModel) -> None:
    model = tiny_model.model
    with torch.no_grad():
        cache = model(torch.arange(1, 6)[None], use_cache=True).past_key_values
    keys = cache.layers[0].keys
    shape = KVShape.of(model)
    assert (len(cache.layers), *keys.shape) == (
        shape.num_layers,
        1,
        shape.num_heads,
        5,
        shape.head_dim,
    )
    assert shape.dtype == keys.dtype


def test_a_slab_gives_its_rows_keys_up_to_the_longest() -> None:
    slab = Slab(SHAPE, length=100)
    slab.fit(3, 8)
    for row, length in enumerate((10, 80, 80)):
        slab.put(row, filled(length, row + 1.0))
    slab.begin(torch.tensor([10, 80, 80]), longest=80)
    new = torch.tensor([7.0, 8.0, 9.0])[:, None, None, None].expand(3, 1, 1, 2)
    keys, values = slab.update(new, -new, 1)
    assert keys.shape == values.shape == (3, 1, 96, 2), "in steps"
    assert keys[0, 0, :, 0].tolist() == [1.0] * 10 + [7.0] + [0.0] * 85
    assert keys[1, 0, :, 0].tolist() == [2.0] * 80 + [8.0] + [0.0] * 15
    assert values[2, 0, :, 0].tolist() == [-3.0] * 80 + [-9.0] + [0.0] * 15
    assert slab.values[0, ..., 80:, :].eq(0).all(), "the other layer is as it was"


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_tokens_whatever_the_width(seed: int) -> None:
    """Rows are laid out anew when the longest one grows past the width, comes or leaves."""
    rng = random.Random(seed)
    slab, rows, widths = Slab(SHAPE, length=500), [], set()
    for _ in range(200):
        if len(rows) < 6 and rng.random() < 0.1:
            slab.fit(len(rows) + 1, 6)
            rows.append(torch.rand(2, 2, 1, rng.randrange(1, 250), 2))
            slab.put(len(rows) - 1, rows[-1])
        if rows and rng.random() < 0.1:
            last = rows.pop()
            if rows:
                rows[0] = last
                slab.put(0, slab.get(len(rows), last.shape[3]))
        if not rows:
            continue
        lengths = [row.shape[3] for row in rows]
        slab.begin(torch.tensor(lengths), max(lengths))
        widths.add(slab.width)
        new = torch.rand(2, 2, len(rows), 1, 1, 2)  # layers, keys and values, B, H, 1, Dh
        rows = [torch.cat([row, new[:, :, i]], dim=3) for i, row in enumerate(rows)]
        for layer in range(2):
            seen = slab.update(new[layer, 0], new[layer, 1], layer)
            for i, row in enumerate(rows):
                for kind in range(2):
                    torch.testing.assert_close(seen[kind][i, :, : row.shape[3]], row[layer, kind])
                    assert seen[kind].isfinite().all()
        assert max(lengths) < slab.width < max(lengths) + 1 + slab.STEP + slab.SLACK
    assert len(widths) > 3


def test_room_for_more_rows_keeps_those_that_are_there() -> None:
    slab = Slab(SHAPE, length=8)
    slab.values[:, 0] = slab.keys[:, 0] = 5.0
    slab.fit(2, 8)
    slab.values[:, 1] = slab.keys[:, 1] = 6.0
    slab.fit(3, 8)
    assert slab.capacity >= 3
    for tensor in (slab.keys, slab.values):
        assert tensor[:, :3].mean(dim=(0, 2, 3, 4)).tolist() == [5.0, 6.0, 0.0]
