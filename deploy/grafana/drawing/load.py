"""A mixed load on the replicas: tenants with and without pictures, and what clients do wrong."""

import io
import itertools
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from PIL import Image

from deploy.grafana.drawing.results import Json, PictureError
from deploy.grafana.drawing.site import Site
from server.bench.prompts import Prompts
from server.bench.target import Target
from server.demo.cases import MODEL_NAME, data_url, photograph, png
from steering.demo.pictures import KINDS, example

NUM_CLIENTS = 6  # on all replicas together
_PAUSE_S = 0.4  # on average, between two requests of a client
_STATUSES = {200, 400, 401, 429}
# How often a client does what, out of the sum.
_TENANTS = {"acme": 5, "beta": 3, "gamma": 1}
_DEEDS = {"rendered": 8, "photo": 6, "same photo": 3, "text": 4, "leave": 1, "invalid": 1, "key": 1}


@contextmanager
def driven(site: Site) -> Iterator[Counter[str]]:
    """Until the block ends, which gets the statuses counted so far. Raises PictureError at its end
    where a replica answered anything that no client caused."""
    statuses: Counter[str] = Counter()
    is_over = threading.Event()
    problems: list[str] = []
    clients = [
        _Client(site, site.replicas[number % len(site.replicas)], number)
        for number in range(NUM_CLIENTS)
    ]

    def run(client: "_Client") -> None:
        try:
            while not is_over.wait(client.pause_s()):
                statuses[client.act()] += 1
        except (httpx.HTTPError, PictureError) as error:
            problems.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    if problems:
        raise PictureError(f"the load failed: {problems[0]}")


class _Client:
    """number: each has prompts of its own, the same in every run."""

    def __init__(self, site: Site, replica: Target, number: int) -> None:
        self._site, self._replica = site, replica
        self._random = random.Random(number)
        self._numbers = itertools.count(10_000 * number)
        self._photos = Prompts(Image.open(io.BytesIO(photograph())))
        self._http = httpx.Client(base_url=replica.url, timeout=120, trust_env=False)

    def pause_s(self) -> float:
        return self._random.expovariate(1 / _PAUSE_S)

    def act(self) -> str:
        """One request; returns its status. Raises PictureError, HTTPError."""
        tenant, deed = self._one_of(_TENANTS), self._one_of(_DEEDS)
        body = {
            "model": MODEL_NAME,
            "messages": self._messages(deed),
            "max_tokens": self._random.randint(12, 56),
        }
        key = "sk-of-nobody" if deed == "key" else self._site.keys[tenant]
        headers = {"authorization": f"Bearer {key}"}
        if deed == "leave":
            return self._leave(body, headers)
        if deed == "invalid":
            body["temperature"] = 99
        response = self._http.post("/v1/chat/completions", json=body, headers=headers)
        if response.status_code not in _STATUSES:
            raise PictureError(f"{response.status_code} {response.text[:300]}")
        return str(response.status_code)

    def _leave(self, body: Json, headers: dict[str, str]) -> str:
        """In the middle of the answer."""
        body |= {"stream": True, "ignore_eos": True, "max_tokens": 64}
        with self._http.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as response:
            next(response.iter_lines())
        return "left"

    def _messages(self, deed: str) -> list[Json]:
        number = next(self._numbers)
        if deed in ("photo", "leave"):
            return self._photos.about_picture(number, number)
        if deed == "same photo":
            return self._photos.about_picture(0, number)
        if deed in ("text", "invalid", "key"):
            return self._photos.text(number, 12)
        shown = example(number, "unseen", self._random.choice(KINDS))
        picture = {"type": "image_url", "image_url": {"url": data_url(png(shown.image), "png")}}
        question = {"type": "text", "text": shown.question.text}
        return [{"role": "user", "content": [picture, question]}]

    def _one_of(self, weights: dict[str, int]) -> str:
        return self._random.choices([*weights], [*weights.values()])[0]
