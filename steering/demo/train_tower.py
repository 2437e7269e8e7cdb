"""Stage 1: the CLIP tower learns to tell shape, colour and place, from labels alone.

Each image token in a place's part of the picture predicts which shape, in which colour, is
there: a dense target, learnt in minutes where pooled features would take hours.
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
from steering.demo.pictures import COLOURS, SHAPES, SIZE, Thing, render, scene

POOL = 20_000
STEPS = 2_400
BATCH = 64
LEARNING_RATE = 1e-3
GRID = SIZE // PATCH
# The tokens (row, column) that answer for each place.
_AREAS = {
    "top left": ((0, 1), (0, 1)),
    "top right": ((0, 1), (4, 5)),
    "centre": ((2, 3), (2, 3)),
    "bottom left": ((4, 5), (0, 1)),
    "bottom right": ((4, 5), (4, 5)),
}


class Labeller(nn.Module):
    """A tower with two linear heads on its tokens; the heads are thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(TOWER)
        self.norm = nn.LayerNorm(TOWER.hidden_size)
        self.shape = nn.Linear(TOWER.hidden_size, len(SHAPES) + 1)
        self.colour = nn.Linear(TOWER.hidden_size, len(COLOURS) + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        tokens = self.norm(tokens[:, 1:])  # the class token is not used
        return self.shape(tokens), self.colour(tokens)


def train_tower(path: Path, *, seed: int = 1) -> None:
    """Train the tower and write its state dict to path, unless it is there."""
    if path.exists():
        return
    torch.manual_seed(seed)
    pixels, labels = _pool(seed)
    model = Labeller()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, STEPS, pct_start=0.1)
    progress = tqdm(range(STEPS), desc="vision tower")
    for step in progress:
        chosen = torch.randint(len(pixels), (BATCH,))
        batch, target = _augment(pixels[chosen], labels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        loss = torch.stack(
            [
                functional.cross_entropy(head.float().flatten(0, 1), target[..., i].flatten())
                for i, head in enumerate(logits)
            ]
        ).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            guess = torch.stack([head.argmax(-1) for head in logits], dim=-1)
            both = (guess == target).all(-1)
            right = both[target[..., 0] < len(SHAPES)].float().mean().item()
            progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.3f}")
    torch.save(model.tower.state_dict(), path)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (..., H, W, 3) uint8 -> (..., 3, H, W) float32 in -1..1, as the processor does."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def _pool(seed: int) -> tuple[Tensor, Tensor]:
    rng = random.Random(seed)
    scenes = [scene(rng, "train", smallest=0) for _ in tqdm(range(POOL), desc="scenes")]
    pixels = np.stack(
        [
            np.asarray(render(things, rng.getrandbits(32)))
            for things in tqdm(scenes, desc="pictures")
        ]
    )
    return torch.from_numpy(pixels), torch.stack([_labels(things) for things in scenes])


def _labels(things: tuple[Thing, ...]) -> Tensor:
    """(tokens, 2): shape and colour each token shall tell; the last class is "nothing"."""
    grid = torch.empty(GRID, GRID, 2, dtype=torch.long)
    grid[..., 0], grid[..., 1] = len(SHAPES), len(COLOURS)
    for thing in things:
        rows, columns = _AREAS[thing.place]
        label = torch.tensor([SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)])
        grid[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = label
    return grid.flatten(0, 1)


def _augment(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the batch and vary its brightness."""
    mirrored = torch.rand(len(pixels)) < 0.5
    images = normalise(pixels)
    images[mirrored] = images[mirrored].flip(-1)
    grid = labels.view(-1, GRID, GRID, 2).clone()
    grid[mirrored] = grid[mirrored].flip(2)
    gain = 1 + 0.15 * torch.randn(len(pixels), 1, 1, 1)
    return (images * gain).clamp(-1, 1), grid.flatten(1, 2)
