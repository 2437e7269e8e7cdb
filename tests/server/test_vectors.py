"""The vectors in force follow the alias, and the last good set survives whatever happens to it."""

import asyncio
import logging

import pytest
import torch

from server.policy import Override, Policy, decide
from server.vectors import RowSteering, VectorCatalogue
from steering.errors import PlanError, StoreError
from steering.plan import Schedule
from steering.stores import MemoryStore
from steering.vectors import ShiftVectors
from tests.server.conftest import make_settings
from tests.server.fakes import make_identity, make_vectors


class BreakableStore(MemoryStore):
    """A store that can fail, hold a damaged set, or raise what no store should."""

    error: Exception | None = None
    is_damaged = False

    def aliases(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return super().aliases()

    def get_vectors(self, vector_id: str) -> ShiftVectors:
        if self.is_damaged:
            return ShiftVectors.from_bytes(b"\x00" * 100, expected_id=vector_id)
        return super().get_vectors(vector_id)


@pytest.fixture
def store() -> BreakableStore:
    return BreakableStore()


def publish(store: MemoryStore, length: float = 0.5, **identity: object) -> str:
    vectors = make_vectors(length, make_identity(**identity))
    vector_id = store.put_vectors(vectors.to_bytes())
    store.set_alias("default", vector_id)
    return vector_id


def make_catalogue(store: MemoryStore, **settings: object) -> VectorCatalogue:
    policy = Policy.from_settings(make_settings(**settings))
    return VectorCatalogue(store, policy, make_identity())


def active_id(catalogue: VectorCatalogue) -> str | None:
    return catalogue.active.id if catalogue.active else None


def test_an_activated_set_is_taken_up_and_a_switch_followed(store: BreakableStore) -> None:
    catalogue = make_catalogue(store)
    catalogue.refresh()
    assert active_id(catalogue) is None and not catalogue.is_ready
    assert "no alias 'default'" in str(catalogue.problem)
    first = publish(store)
    catalogue.refresh()
    assert (active_id(catalogue), catalogue.problem) == (first, None)
    second = publish(store, 0.25)
    catalogue.refresh()
    assert active_id(catalogue) == second != first


def test_steering_off_is_ready_without_vectors(store: BreakableStore) -> None:
    catalogue = make_catalogue(store, steering_mode="off")
    catalogue.refresh()
    assert catalogue.is_ready


def test_the_sample_level_is_ready_without_vectors_and_takes_them_up_undosed(
    store: BreakableStore,
) -> None:
    """A cap that the policy's alpha would break with these vectors is no reason to refuse them."""
    catalogue = make_catalogue(store, steering_mode="sample", max_relative_dose=0.05)
    catalogue.refresh()
    assert catalogue.is_ready and catalogue.active is None
    vector_id = publish(store)
    catalogue.refresh()
    assert (active_id(catalogue), catalogue.problem) == (vector_id, None)


def test_a_sample_plan_has_no_delta_yet_and_a_schedule_that_fits(store: BreakableStore) -> None:
    catalogue = make_catalogue(store, steering_mode="sample")
    policy = Policy.from_settings(make_settings(steering_mode="sample", client_override="any"))
    plan = decide(policy, None, has_images=True, vectors=None)
    assert catalogue.steering(plan, None) == RowSteering()
    beyond = decide(policy, Override(schedule=Schedule.parse("single:3")), True, None)
    with pytest.raises(PlanError, match="names layer 3; the model has 3"):
        catalogue.steering(beyond, None)


def test_who_serves_unsteered_without_vectors_is_ready_without_them(store: BreakableStore) -> None:
    catalogue = make_catalogue(store, on_error="serve-unsteered")
    catalogue.refresh()
    assert catalogue.is_ready and "no alias 'default'" in str(catalogue.problem)


def test_a_set_for_another_model_is_refused_and_the_last_good_one_stays(
    store: BreakableStore, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = make_catalogue(store)
    good = publish(store)
    catalogue.refresh()
    publish(store, weights_digest="e" * 64)
    catalogue.refresh()
    catalogue.refresh()
    assert active_id(catalogue) == good and catalogue.is_ready
    assert "does not fit" in str(catalogue.problem)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and good in warnings[0].getMessage()


def test_a_damaged_set_a_lost_alias_and_a_failing_store_keep_the_last_good_one(
    store: BreakableStore,
) -> None:
    catalogue = make_catalogue(store)
    good = publish(store)
    catalogue.refresh()
    publish(store, 0.25)
    store.is_damaged = True
    catalogue.refresh()
    assert active_id(catalogue) == good and "digest" in str(catalogue.problem)
    store.error = StoreError("disk full of bees")
    catalogue.refresh()
    assert active_id(catalogue) == good and catalogue.problem == "disk full of bees"
    store.error, store.is_damaged = None, False
    catalogue.refresh()
    assert active_id(catalogue) != good and catalogue.problem is None


def test_a_set_that_the_policy_would_overdose_with_is_refused(store: BreakableStore) -> None:
    catalogue = make_catalogue(store, max_relative_dose=0.05)
    publish(store)  # 0.5 * 1.5 / 10 = 0.075 at the last layer
    catalogue.refresh()
    assert not catalogue.is_ready and "0.075" in str(catalogue.problem)


def test_the_poll_survives_what_no_store_should_raise(store: BreakableStore) -> None:
    catalogue = make_catalogue(store)
    store.error = ZeroDivisionError()

    async def scenario() -> None:
        poll = asyncio.create_task(catalogue.poll(interval_s=0.005))
        while catalogue.problem is None:
            await asyncio.sleep(0.005)
        store.error = None
        publish(store)
        while catalogue.active is None:
            await asyncio.sleep(0.005)
        poll.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_what_a_plan_subtracts_is_computed_once_and_forgotten_when_there_are_many(
    store: BreakableStore,
) -> None:
    policy = Policy.from_settings(make_settings(client_override="any"))
    catalogue = VectorCatalogue(store, policy, make_identity(), capacity=2)
    publish(store)
    catalogue.refresh()
    vectors = catalogue.active
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


def test_a_plan_made_before_a_switch_keeps_its_vectors(store: BreakableStore) -> None:
    catalogue = make_catalogue(store)
    publish(store)
    catalogue.refresh()
    old = catalogue.active
    plan = decide(Policy.from_settings(make_settings()), None, True, old)
    publish(store, 0.25)
    catalogue.refresh()
    delta = catalogue.steering(plan, old).delta
    assert old is not None and delta is not None and torch.equal(delta, 0.5 * old.mean)
    with pytest.raises(PlanError):
        make_catalogue(store).steering(plan, catalogue.active)


def test_a_set_is_parsed_and_hashed_once(
    store: BreakableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store verified the bytes and threw the result away, and the catalogue did it again."""
    publish(store)
    parsed = []
    from_bytes = ShiftVectors.from_bytes

    def counted(data: bytes, expected_id: str | None = None) -> ShiftVectors:
        parsed.append(expected_id)
        return from_bytes(data, expected_id)

    monkeypatch.setattr(ShiftVectors, "from_bytes", counted)
    catalogue = make_catalogue(store)
    catalogue.refresh()
    catalogue.refresh()
    assert parsed == [active_id(catalogue)]
