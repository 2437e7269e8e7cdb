"""The load: the same pictures and questions for every target, in interleaved rounds."""

import asyncio
import base64
import hashlib
import io
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from PIL import Image

from server.bench.stream import StreamRecord, chat
from server.bench.target import Target

QUESTIONS = (
    "What is in this picture?",
    "Describe the colours that you see.",
    "What stands in the middle?",
    "Where could this have been taken?",
    "Write a caption for this photograph.",
    "What is the largest thing here?",
    "What would you do with what you see?",
    "Tell a short story about this picture.",
)


@dataclass(frozen=True)
class Burst:
    """One round of one target: `len(records)` chats that started at the same moment."""

    target: str
    num_streams: int
    round: int
    wall_s: float
    records: tuple[StreamRecord, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(record.tokens for record in self.records) / self.wall_s


@dataclass(frozen=True)
class Load:
    """What is sent. Every chat of a round has a picture of its own (a patch in its corner differs),
    so that no cache of a server answers for the work; all targets get the same ones.
    """

    image: Image.Image
    max_tokens: int = 64
    seed: int = 0

    def prompt(self, round_: int, stream: int) -> tuple[str, str]:
        """The picture as a data: URL and the question."""
        rng = random.Random(f"{self.seed}/{round_}/{stream}")
        picture = self.image.convert("RGB")
        picture.paste(tuple(rng.randrange(256) for _ in range(3)), (0, 0, 8, 8))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=85)
        url = "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
        return url, QUESTIONS[(round_ + stream) % len(QUESTIONS)]

    @property
    def digest(self) -> str:
        """sha256 of the picture's pixels, its size and the questions."""
        content = repr((self.image.size, self.image.mode, QUESTIONS)).encode()
        return hashlib.sha256(content + self.image.tobytes()).hexdigest()


async def burst(
    client: httpx.AsyncClient, target: Target, load: Load, num_streams: int, round_: int
) -> Burst:
    """Start `num_streams` chats at once and wait for all."""
    bodies = [
        target.body(*load.prompt(round_, stream), load.max_tokens) for stream in range(num_streams)
    ]
    start = time.perf_counter()
    records = await asyncio.gather(*(chat(client, target, body) for body in bodies))
    return Burst(target.name, num_streams, round_, time.perf_counter() - start, tuple(records))


async def measure(
    client: httpx.AsyncClient,
    targets: Sequence[Target],
    load: Load,
    *,
    streams: Sequence[int],
    rounds: int,
    warmup: int = 1,
    pause_s: float = 0.2,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Burst]:
    """All bursts after the warm-up, targets in turn within a round and rotated between rounds,
    so that a machine that slows down or speeds up does so for all of them alike.
    """
    bursts: list[Burst] = []
    for round_ in range(-warmup, rounds):
        for num_streams in streams:
            first = round_ % len(targets)
            for target in [*targets[first:], *targets[:first]]:
                progress(f"{target.name}, {num_streams} at once")
                done = await burst(client, target, load, num_streams, round_)
                if round_ >= 0:
                    bursts.append(done)
                await asyncio.sleep(pause_s)
    return bursts
