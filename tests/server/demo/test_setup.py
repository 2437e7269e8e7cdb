"""The demonstration's store."""

import asyncio
import json
from pathlib import Path

import pytest

from server.config import Settings
from server.control import Author, Control, activate
from server.demo import setup
from server.demo.setup import keep, put_back
from server.documents import PolicyFields
from steering.stores import opened_store
from steering.stores.base import aliases
from tests.steering.samples import shift_vectors

ONE, TWO = shift_vectors(1), shift_vectors(2)


@pytest.mark.anyio
async def test_setting_up_again_changes_nothing_and_new_vectors_move_the_alias(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/demo.db"
    for vectors in (ONE, ONE, TWO):
        await keep(url, vectors.to_bytes(), "demo", by="deshift demo")
    async with opened_store(url) as store:
        assert await aliases(store) == {"demo": TWO.id}
        entries = [json.loads(record.entry) for record in await store.audit(9)]
    assert [entry["by"] for entry in entries] == ["deshift demo"] * 2
    assert [entry["changes"][0]["after"] for entry in entries] == [
        {"vector": TWO.id},
        {"vector": ONE.id},
    ]


@pytest.mark.anyio
async def test_the_default_tenant_is_put_back_to_what_is_recommended(tmp_path: Path) -> None:
    """An alpha that was tried in the console is not the next demonstration's."""
    url, policy = f"sqlite:///{tmp_path}/demo.db", PolicyFields(alpha=0.1, client_override="any")
    await put_back(url, policy, by="deshift demo")
    async with opened_store(url) as store:
        control = Control(store)
        tried = policy.model_copy(update={"alpha": 0.0})
        await control.set_policy("default", tried, None, Author("demo", "to see it", "console"))
        await put_back(url, policy, by="deshift demo")
        assert (await control.tenant("default")).document.policy == policy


def test_a_server_that_starts_again_leaves_the_vectors_that_an_operator_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "assemble", lambda directory: directory)
    settings = Settings(cache=tmp_path)

    async def alias(change_to: str | None = None) -> str:
        async with opened_store(settings.store_url) as store:
            if change_to is not None:
                await store.put_vectors(ONE.to_bytes())
                await activate(store, "demo", change_to, by="alice", reason="better ones")
            return (await aliases(store))["demo"]

    first = setup.prepare_for(settings)
    shipped = asyncio.run(alias())
    assert asyncio.run(alias(ONE.id)) == ONE.id != shipped
    assert setup.prepare_for(settings) == first
    assert asyncio.run(alias()) == ONE.id
