"""The vectors in force follow every alias, and the last good set survives whatever happens."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from server import vectors as module
from server.policy import Override, Policy, decide, default_fields
from server.vectors import VectorCatalogue
from steering.errors import PlanError, StoreError
from steering.plan import Schedule
from steering.stores import MemoryStore
from steering.stores.base import aliases
from steering.vectors import ShiftVectors
from tests.server.conftest import make_settings
from tests.server.fakes import make_identity, make_vectors, publish

pytestmark = pytest.mark.anyio
DEFAULT = frozenset({"default"})


class BreakableStore(MemoryStore):
    """A store whose sets can be damaged, held back, or raise what no store should; it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.damaged: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}  # by id: what reading it waits for
        self.reads: list[str] = []

    async def get_vectors(self, vector_id: str) -> ShiftVectors:
        self.reads.append(vector_id)
        if vector_id in self.gates:
            await self.gates[vector_id].wait()
        if self.error is not None:
            raise self.error
        if vector_id in self.damaged:
            return ShiftVectors.from_bytes(b"\x00" * 100, expected_id=vector_id)
        return await super().get_vectors(vector_id)


@pytest.fixture
def store() -> BreakableStore:
    return BreakableStore()


@pytest.fixture
async def catalogue(
    store: BreakableStore, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[VectorCatalogue]:
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.005)
    made = VectorCatalogue(store, make_identity())
    yield made
    await made.close()


def policy_of(**settings: Any) -> Policy:
    return Policy.of(default_fields(make_settings(**settings)), 0)


async def follow(
    catalogue: VectorCatalogue, store: MemoryStore, in_use: frozenset[str] = DEFAULT
) -> None:
    """With the aliases that the store has, until each set has come or failed."""
    catalogue.follow(await aliases(store), in_use)
    await catalogue.wait_until_settled()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def active_id(catalogue: VectorCatalogue, alias: str = "default") -> str | None:
    active = catalogue.active(alias)
    return active.id if active else None


async def test_an_activated_set_is_taken_up_and_a_switch_followed(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await follow(catalogue, store)
    assert active_id(catalogue) is None and not catalogue.is_ready_for(policy_of())
    assert "no alias 'default'" in str(catalogue.problem("default"))
    first = await publish(store)
    await follow(catalogue, store)
    assert (active_id(catalogue), catalogue.problem("default")) == (first, None)
    assert catalogue.is_ready_for(policy_of())
    second = await publish(store, 0.25)
    await follow(catalogue, store)
    assert active_id(catalogue) == second != first


async def test_every_alias_has_its_own_set_and_its_own_problem(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    good, other = await publish(store), await publish(store, 0.25, "other")
    bad = await publish(store, 0.125, "bad")
    store.damaged.add(bad)
    await follow(catalogue, store, frozenset({"default", "other", "bad", "gone"}))
    assert catalogue.ids == {"default": good, "other": other}
    assert set(catalogue.problems) == {"bad", "gone"}
    assert "digest" in catalogue.problems["bad"] and "no alias" in catalogue.problems["gone"]
    assert catalogue.is_ready_for(policy_of()) and not catalogue.is_ready_for(
        policy_of(vector_alias="bad")
    )


async def test_a_set_under_two_aliases_is_read_once_and_held_once(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await publish(store), await publish(store, alias="same")
    store.reads.clear()
    await follow(catalogue, store, frozenset({"default", "same"}))
    await publish(store, alias="third")
    store.reads.pop()  # by the publishing, which verifies
    await follow(catalogue, store, frozenset({"default", "same", "third"}))
    assert store.reads == [active_id(catalogue)]
    assert catalogue.active("default") is catalogue.active("same") is catalogue.active("third")


async def test_an_alias_that_no_policy_uses_yet_is_there_when_one_does_and_no_problem_before(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    """Pointing a policy to another alias would have refused requests until its set had come."""
    await publish(store)
    ready = await publish(store, 0.25, "next")
    await publish(store, 0.5, "elsewhere", weights_digest="e" * 64)
    await follow(catalogue, store)
    assert active_id(catalogue, "next") == ready
    assert set(catalogue.ids) == {"default"} and not catalogue.problems


async def test_a_set_that_no_alias_names_is_let_go_but_not_by_who_holds_it(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await publish(store)
    await follow(catalogue, store)
    held = catalogue.active("default")
    assert held is not None
    gone = weakref.ref(held)
    await publish(store, 0.25)
    await follow(catalogue, store)
    gc.collect()
    assert gone() is held, "a request keeps its own"
    del held
    gc.collect()
    assert gone() is None
    catalogue.follow({}, frozenset())
    assert not catalogue.held and not catalogue.problems


async def test_steering_off_and_the_sample_level_are_ready_without_vectors(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await follow(catalogue, store)
    assert catalogue.is_ready_for(policy_of(steering_mode="off"))
    assert catalogue.is_ready_for(policy_of(alpha=0.0)) and not catalogue.is_ready_for(policy_of())
    assert catalogue.is_ready_for(policy_of(steering_mode="sample", max_relative_dose=0.05))


async def test_with_nothing_to_read_there_is_nothing_to_wait_for(
    catalogue: VectorCatalogue,
) -> None:
    """A server without aliases whose policy uses none waited START_WAIT_S at every start."""
    catalogue.follow({}, frozenset())
    await asyncio.wait_for(catalogue.wait_until_settled(), 1)


async def test_a_sample_plan_has_no_delta_yet_and_a_schedule_that_fits(
    catalogue: VectorCatalogue,
) -> None:
    policy = policy_of(steering_mode="sample", client_override="any")
    plan = decide(policy, None, has_images=True, vectors=None)
    assert catalogue.steering(plan, None).delta is None
    beyond = decide(policy, Override(schedule=Schedule.parse("single:3")), True, None)
    with pytest.raises(PlanError, match="names layer 3; the model has 3"):
        catalogue.steering(beyond, None)


async def test_who_serves_unsteered_without_vectors_is_ready_without_them(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await follow(catalogue, store)
    policy = policy_of(on_error="serve-unsteered")
    assert catalogue.is_ready_for(policy)
    assert "no alias 'default'" in str(catalogue.problem_of(policy))


async def test_a_set_for_another_model_is_refused_once_and_the_last_good_one_stays(
    store: BreakableStore, catalogue: VectorCatalogue, caplog: pytest.LogCaptureFixture
) -> None:
    good = await publish(store)
    await follow(catalogue, store)
    unfit = await publish(store, weights_digest="e" * 64)
    store.reads.clear()
    await follow(catalogue, store)
    await follow(catalogue, store)
    assert active_id(catalogue) == good and catalogue.is_ready_for(policy_of())
    assert "does not fit" in str(catalogue.problem("default"))
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and good in warnings[0].getMessage()
    assert store.reads == [unfit], "content has one verdict: it is not read again"


async def test_a_damaged_set_a_lost_alias_and_a_failing_store_keep_the_last_good_one(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    good = await publish(store)
    await follow(catalogue, store)
    new = await publish(store, 0.25)
    store.damaged.add(new)
    await follow(catalogue, store)
    assert active_id(catalogue) == good and "digest" in str(catalogue.problem("default"))
    store.error = StoreError("disk full of bees")
    await until(lambda: catalogue.problem("default") == "disk full of bees")
    assert active_id(catalogue) == good
    catalogue.follow({}, DEFAULT)
    assert active_id(catalogue) == good and "no alias" in str(catalogue.problem("default"))
    store.error = None
    store.damaged.clear()
    await follow(catalogue, store)
    assert (active_id(catalogue), catalogue.problem("default")) == (new, None)


async def test_a_dose_that_a_policy_would_refuse_is_that_policys_problem(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await publish(store)  # 0.5 * 1.5 / 10 = 0.075 at the last layer
    await follow(catalogue, store)
    overdosed = policy_of(max_relative_dose=0.05)
    assert not catalogue.is_ready_for(overdosed)
    assert "0.075" in str(catalogue.problem_of(overdosed))
    assert catalogue.is_ready_for(policy_of()) and catalogue.problem("default") is None
    beyond = policy_of(steering_mode="sample", schedule="single:3")
    assert not catalogue.is_ready_for(beyond) and "layer 3" in str(catalogue.problem_of(beyond))


async def test_what_failed_is_tried_again_whatever_was_raised(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    """Bytes are mended without any change of the alias."""
    vector_id = await publish(store)
    store.error = ZeroDivisionError()
    await follow(catalogue, store)
    assert "ZeroDivisionError" in str(catalogue.problem("default"))
    store.error = None
    await until(lambda: active_id(catalogue) == vector_id)
    assert catalogue.problem("default") is None


async def test_a_reader_whose_cancellation_was_lost_ends_all_the_same(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    """It read for ever what nobody wanted, or took away the entry of who read it anew."""
    get_vectors = store.get_vectors

    async def losing_the_cancellation(vector_id: str) -> ShiftVectors:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await get_vectors(vector_id)

    vector_id = await publish(store)
    store.reads.clear()
    store.get_vectors = losing_the_cancellation  # type: ignore[method-assign]
    catalogue.follow({"default": vector_id}, DEFAULT)
    await asyncio.sleep(0)
    before = asyncio.all_tasks()
    catalogue.follow({}, DEFAULT)
    store.error = StoreError("disk full of bees")
    await until(lambda: vector_id in store.reads)
    await until(lambda: len(asyncio.all_tasks() & before) < len(before))
    assert store.reads == [vector_id] and not catalogue.held


async def test_a_set_that_never_comes_holds_up_no_other(
    store: BreakableStore, catalogue: VectorCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is named with it nor one that is named later."""
    monkeypatch.setattr(module, "LOAD_TIMEOUT_S", 0.3)
    good, stuck = await publish(store), await publish(store, 0.25, "a")
    store.gates[stuck] = asyncio.Event()
    both = frozenset({"a", "default"})
    catalogue.follow(await aliases(store), both)
    await until(lambda: active_id(catalogue) == good)
    later = await publish(store, 0.125)
    catalogue.follow(await aliases(store), both)
    await until(lambda: active_id(catalogue) == later)
    assert catalogue.problem("a") is None
    await catalogue.wait_until_settled()
    assert "did not come within 0.3 s" in catalogue.problems["a"]
    store.gates[stuck].set()
    await until(lambda: active_id(catalogue, "a") == stuck)


async def test_an_alias_that_moves_on_while_its_set_is_read_does_not_go_back(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    slow = await publish(store)
    gate = store.gates[slow] = asyncio.Event()
    catalogue.follow(await aliases(store), DEFAULT)
    await asyncio.sleep(0)
    new = await publish(store, 0.25)
    await follow(catalogue, store)
    gate.set()
    await asyncio.sleep(0.02)
    assert active_id(catalogue) == new


async def test_what_a_plan_subtracts_is_computed_once_and_forgotten_when_there_are_many(
    store: BreakableStore,
) -> None:
    policy = policy_of(client_override="any")
    catalogue = VectorCatalogue(store, make_identity(), capacity=2)
    await publish(store)
    await follow(catalogue, store)
    vectors = catalogue.active("default")
    assert vectors is not None

    def delta_of(alpha: float) -> torch.Tensor:
        plan = decide(policy, Override(alpha=alpha), True, vectors)
        delta = catalogue.steering(plan, vectors).delta
        assert delta is not None
        return delta

    first = delta_of(0.5)
    assert torch.equal(first, 0.5 * vectors.mean)
    assert delta_of(0.5) is first
    delta_of(0.6), delta_of(0.7)
    assert delta_of(0.5) is not first


async def test_a_plan_made_before_a_switch_keeps_its_vectors(
    store: BreakableStore, catalogue: VectorCatalogue
) -> None:
    await publish(store)
    await follow(catalogue, store)
    old = catalogue.active("default")
    plan = decide(policy_of(), None, True, old)
    await publish(store, 0.25)
    await follow(catalogue, store)
    delta = catalogue.steering(plan, old).delta
    assert old is not None and delta is not None and torch.equal(delta, 0.5 * old.mean)
    with pytest.raises(PlanError):
        VectorCatalogue(store, make_identity()).steering(plan, catalogue.active("default"))


async def test_a_set_is_parsed_and_hashed_once(
    store: BreakableStore, catalogue: VectorCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store verified the bytes and threw the result away, and the catalogue did it again."""
    await publish(store)
    parsed = []
    from_bytes = ShiftVectors.from_bytes

    def counted(data: bytes, expected_id: str | None = None) -> ShiftVectors:
        parsed.append(expected_id)
        return from_bytes(data, expected_id)

    monkeypatch.setattr(ShiftVectors, "from_bytes", counted)
    await follow(catalogue, store)
    await follow(catalogue, store)
    assert parsed == [make_vectors().id]
