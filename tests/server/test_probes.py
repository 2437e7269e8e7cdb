"""Which requests are probed."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from starlette.testclient import TestClient

from server.control import activate
from server.probes import is_probed, reference_of
from steering.stores.memory import MemoryStore
from tests.server.fakes import FakeEngine, chat_body, make_vectors
from tests.steering.samples import shift_vectors

PATH = "/v1/chat/completions"


@pytest.mark.parametrize(
    "share, draw, expected",
    [(0.1, 0.05, True), (0.1, 0.1, False), (0.0, 0.0, False), (1.0, 0.999, True)],
)
def test_a_share_of_the_requests_with_pictures(share: float, draw: float, expected: bool) -> None:
    assert is_probed(share, True, lambda: draw) is expected
    assert is_probed(share, False, lambda: draw) is False


def test_the_reference_is_the_sets_where_it_has_one() -> None:
    vectors = shift_vectors()
    reference = reference_of(vectors)
    assert reference is not None and reference.delta is vectors.mean
    assert reference_of(shift_vectors(text_mean=None)) is None
    assert reference_of(None) is None


def test_the_engine_is_asked_to_probe_and_told_what_to_measure_against(
    store: MemoryStore, client_for: Callable[..., TestClient], fake_engine: FakeEngine
) -> None:
    """Steered or not: how far prompts lie from text is a fact about the prompts."""
    vectors = make_vectors()
    text = torch.full_like(vectors.mean, 2.0)
    vectors = replace(vectors, text_mean=text)

    async def put_in_force() -> None:
        await store.put_vectors(vectors.to_bytes())
        await activate(store, "default", vectors.id, by="the tests", reason="to be tested")

    asyncio.run(put_in_force())
    always = client_for(probe_share=1.0)
    for alpha in (0.5, 0.0):
        always.post(PATH, json=chat_body("Hi", images=1, steering={"alpha": alpha}))
        request = fake_engine.requests[-1]
        assert request.probe and request.reference is not None
        assert torch.equal(request.reference.text, text)
        assert torch.equal(request.reference.delta, vectors.mean)
    always.post(PATH, json=chat_body("Hi"))
    assert not fake_engine.requests[-1].probe
    client_for(probe_share=0.0).post(PATH, json=chat_body("Hi", images=1))
    assert not fake_engine.requests[-1].probe
