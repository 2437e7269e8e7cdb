"""Stage 1: the CLIP tower learns to tell shapes, colours, places and numbers, from labels alone.

Each image token in a place's part of the picture predicts which shape, in which colour, is
there: a dense target, learnt in minutes where pooled features would take hours. Once that
holds, each also predicts the place and how many things there are in all, so that a language
model can read both off any token.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPVisionModel

from steering.demo.architecture import PATCH, TOWER
from steering.demo.pictures import (
    COLOURS,
    MAX_THINGS,
    PLACES,
    SHAPES,
    SIZE,
    Thing,
    render,
    scene,
)

BATCH = 64
GRID = SIZE // PATCH
# The tokens (row, column) that answer for each place.
_AREAS = {
    "top left": ((0, 1), (0, 1)),
    "top right": ((0, 1), (4, 5)),
    "centre": ((2, 3), (2, 3)),
    "bottom left": ((4, 5), (0, 1)),
    "bottom right": ((4, 5), (4, 5)),
}


# Each place's index after mirroring left and right.
_MIRRORED = torch.tensor([1, 0, 2, 4, 3, 5])
# The classes of each label; the last but for the count is "nothing here".
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(PLACES) + 1, MAX_THINGS + 1)


class Labeller(nn.Module):
    """A tower with a linear head per label on its tokens; the heads are thrown away afterwards."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(TOWER)
        self.norm = nn.LayerNorm(TOWER.hidden_size)
        self.heads = nn.ModuleList(
            nn.Linear(TOWER.hidden_size, size) for size in CLASSES[:num_labels]
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        tokens = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        tokens = self.norm(tokens[:, 1:])  # the class token is not used
        return [head(tokens) for head in self.heads]


def train_tower(
    path: Path,
    *,
    num_labels: int,
    pool: int,
    steps: int,
    rate: float,
    seed: int,
    start: Path | None = None,
) -> None:
    """Train the tower on the first labels and write its state dict to path, unless it is there.

    start: a state dict of the tower to go on from.
    """
    if path.exists():
        return
    torch.manual_seed(seed)
    pixels, labels = _pool(pool, seed)
    model = Labeller(num_labels)
    if start is not None:
        model.tower.load_state_dict(torch.load(start))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="vision tower")
    for step in progress:
        chosen = torch.randint(len(pixels), (BATCH,))
        batch, target = _augment(pixels[chosen], labels[chosen])
        target = target[..., :num_labels]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        losses = [
            functional.cross_entropy(head.float().flatten(0, 1), target[..., i].flatten())
            for i, head in enumerate(logits)
        ]
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            guess = torch.stack([head.argmax(-1) for head in logits], dim=-1)
            filled = target[..., 0] < len(SHAPES)
            right = (guess == target)[filled].float().mean(0)
            progress.set_postfix(right=" ".join(f"{share:.3f}" for share in right.tolist()))
    torch.save(model.tower.state_dict(), path)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (..., H, W, 3) uint8 -> (..., 3, H, W) float32 in -1..1, as the processor does."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def _pool(size: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = random.Random(seed)
    scenes = [scene(rng, "train", smallest=0) for _ in tqdm(range(size), desc="scenes")]
    pixels = np.stack(
        [
            np.asarray(render(things, rng.getrandbits(32)))
            for things in tqdm(scenes, desc="pictures")
        ]
    )
    return torch.from_numpy(pixels), torch.stack([_labels(things) for things in scenes])


def _labels(things: tuple[Thing, ...]) -> Tensor:
    """(tokens, labels): what each token shall tell, in the order of CLASSES."""
    grid = torch.empty(GRID, GRID, len(CLASSES), dtype=torch.long)
    grid[:] = torch.tensor([len(SHAPES), len(COLOURS), len(PLACES), len(things)])
    for thing in things:
        rows, columns = _AREAS[thing.place]
        label = [
            SHAPES.index(thing.shape),
            list(COLOURS).index(thing.colour),
            list(PLACES).index(thing.place),
            len(things),
        ]
        area = grid[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
        area[:] = torch.tensor(label)
    return grid.flatten(0, 1)


def _augment(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the batch and vary its brightness."""
    mirrored = torch.rand(len(pixels)) < 0.5
    images = normalise(pixels)
    images[mirrored] = images[mirrored].flip(-1)
    grid = labels.view(-1, GRID, GRID, len(CLASSES)).clone()
    grid[mirrored] = grid[mirrored].flip(2)
    grid[mirrored, :, :, 2] = _MIRRORED[grid[mirrored, :, :, 2]]
    gain = 1 + 0.15 * torch.randn(len(pixels), 1, 1, 1)
    return (images * gain).clamp(-1, 1), grid.flatten(1, 2)
