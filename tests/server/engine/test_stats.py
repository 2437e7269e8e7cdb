"""What the engine counts about itself, against known runs."""

from collections.abc import Callable

import pytest

from server.engine.batch import Batch
from server.engine.engine import EmbeddedEngine, EngineConfig
from server.engine.stats import CacheUse, Histogram
from server.engine.steering_pass import SteeringPass
from server.engine.types import EngineError, Failed, Finished
from tests.server.engine.conftest import (
    loaded,
    picture,
    random_delta,
    sample_plan,
)
from tests.server.engine.under_test import EngineUnderTest
from tests.tiny_models import TinyModel

Start = Callable[..., EngineUnderTest]
CACHES = {"prefix_cache_bytes": 1 << 22, "vision_cache_bytes": 1 << 20}


def test_a_histogram_counts_a_value_at_a_bound_below_it() -> None:
    histogram = Histogram(1.0, 2.0)
    for value in (0.5, 1.0, 1.5, 2.5):
        histogram.observe(value)
    histogram.observe(3.0, times=2)
    seen = histogram.snapshot()
    assert (seen.bounds, seen.counts, seen.total, seen.num) == ((1.0, 2.0), (2, 1, 3), 11.5, 6)


@pytest.mark.parametrize("decoder", ["eager", "auto"])
def test_tokens_gaps_and_steps_of_two_known_requests(
    tiny_llava: TinyModel, start_engine: Start, decoder: str
) -> None:
    """One of six tokens, then one with three choices of four: each choice's first has no gap."""
    under_test = start_engine(tiny_llava, decoder=decoder)
    first, second = under_test.inputs("Hi"), under_test.inputs("there", [picture(1)])
    under_test.ask("", inputs=first, max_tokens=6).wait()
    under_test.ask("", inputs=second, max_tokens=4, n=3).wait()
    under_test.engine.drain(10)  # the last answer comes within the last step
    stats = under_test.engine.stats()
    assert stats.generated_tokens == 6 + 3 * 4
    assert stats.inter_token_s.num == 5 + 3 * 3
    assert stats.inter_token_s.total > 0
    assert stats.prefill_tokens == {
        "own": len(first.prompt) + len(second.prompt),
        "shift": 0,
        "probe": 0,
    }
    assert {kind: seen.num for kind, seen in stats.step_s.items()} == {
        "prefill": 2,
        "decode": 5 + 3,
        "mixed": 0,
    }
    assert stats.vision_encode_s.num == 1
    assert (stats.failures, stats.is_canary_passed) == ({"steps": 0, "hooks": 0}, True)


def test_a_step_with_a_prompt_beside_rows_is_a_mixed_one(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    under_test.stepper._pacer.budget = lambda *_: 512  # type: ignore[method-assign]
    joined: list[object] = []

    def join(_event: object) -> None:  # on the engine thread: before the next step
        if not joined:
            joined.append(under_test.ask("", inputs=late, max_tokens=1))

    late = under_test.inputs("late")
    under_test.ask("Hi", max_tokens=3, on_event=join).wait()
    under_test.engine.drain(10)
    steps = {kind: seen.num for kind, seen in under_test.engine.stats().step_s.items()}
    assert steps == {"prefill": 1, "mixed": 1, "decode": 1}


def test_cached_tokens_are_counted_by_whose_prompt_asked(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava, **CACHES)
    inputs = under_test.inputs("Hi there", [picture(1)], "blank")
    assert inputs.pair is not None
    own_len, features = len(inputs.prompt), inputs.prompt.images[0].num_features
    pair_len = len(inputs.pair.corrupted) + len(inputs.pair.text_only)

    cold = under_test.ask("", inputs=inputs, sample=sample_plan()).wait()
    before = under_test.engine.stats()
    assert before.prefill_tokens == {"own": own_len, "shift": pair_len, "probe": 0}
    assert before.prefix["own"].missed_tokens == own_len and cold.cached_tokens == 0
    assert (before.prefix["shift"].hit_tokens, before.prefix["shift"].missed_tokens) == (
        0,
        pair_len,
    )
    assert (before.vision.hit_tokens, before.vision.missed_tokens) == (0, 2 * features)
    assert before.vision_encode_s.num == 2

    warm = under_test.ask("", inputs=inputs, sample=sample_plan()).wait()
    plain = under_test.ask("", inputs=inputs).wait()
    after = under_test.engine.stats()
    assert warm.cached_tokens == plain.cached_tokens > 0
    assert after.prefix["own"].hit_tokens == 2 * warm.cached_tokens
    assert after.prefix["own"].missed_tokens == 3 * own_len - 2 * warm.cached_tokens
    shift = after.prefix["shift"]
    assert shift.hit_tokens + shift.missed_tokens == 2 * pair_len
    assert after.prefill_tokens == {
        "own": after.prefix["own"].missed_tokens,
        "shift": shift.missed_tokens,
        "probe": 0,
    }
    assert shift.hit_tokens >= inputs.pair.corrupted.images[0].end
    assert after.vision_encode_s.num == 2 and after.vision.missed_tokens == 2 * features
    runner = under_test.stepper.runner
    assert after.prefix["own"].num_bytes == runner.prefix.num_bytes > 0
    assert after.prefix["own"].budget_bytes == CACHES["prefix_cache_bytes"]
    assert (shift.num_bytes, shift.budget_bytes) == (0, 0)
    assert (after.vision.num_bytes, after.vision.budget_bytes) == (
        runner.vision.num_bytes,
        CACHES["vision_cache_bytes"],
    )


def test_a_pass_that_broke_and_a_request_without_memory_are_failures(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    bad = len(under_test.inputs("what breaks it").prompt)

    def break_down(batch: Batch) -> None:
        if any(chunk.cache.length == bad for chunk in batch.chunks):
            raise RuntimeError

    with under_test.before_each_pass(break_down):
        assert isinstance(under_test.ask("what breaks it").wait().terminal, Failed)
    assert under_test.engine.stats().failures == {"steps": 1, "hooks": 0}

    def no_memory(_active: object) -> None:
        raise MemoryError

    under_test.stepper.runner.admit = no_memory  # type: ignore[method-assign]
    assert isinstance(under_test.ask("Hi").wait().terminal, Failed)
    assert under_test.engine.stats().failures == {"steps": 2, "hooks": 0}


def test_what_no_request_failed_of_is_no_failure(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    """A cancelled request and one that timed out are none of the engine's."""
    under_test = start_engine(tiny_llava)
    with under_test.slow():
        late = under_test.ask("Hi", max_tokens=200, timeout_s=0.05)
        gone = under_test.ask("Hi", max_tokens=200)
        under_test.engine.cancel(gone.request_id)
        assert isinstance(late.wait().terminal, Failed)
        assert isinstance(gone.wait().terminal, Failed)
    assert under_test.engine.stats().failures == {"steps": 0, "hooks": 0}


def test_logits_that_are_no_numbers_are_a_failure(
    tiny_llava: TinyModel, start_engine: Start
) -> None:
    under_test = start_engine(tiny_llava)
    infinite = random_delta(tiny_llava) * float("inf")
    answer = under_test.ask("Hi", [picture(1)], delta=infinite).wait()
    assert isinstance(answer.terminal, Failed)
    stats = under_test.engine.stats()
    assert stats.failures == {"steps": 1, "hooks": 0}
    assert stats.generated_tokens == 0


def test_steering_that_loses_its_turn_is_counted(
    tiny_llava: TinyModel, start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_test = start_engine(tiny_llava)
    assert isinstance(under_test.ask("Hi").wait().terminal, Finished)
    monkeypatch.setattr(SteeringPass, "at", lambda _steering, _layer, _hidden: None)
    assert isinstance(under_test.ask("Hi").wait().terminal, Failed)
    assert under_test.engine.stats().failures == {"steps": 0, "hooks": 1}


def test_a_canary_that_failed_shows(tiny_llava: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EmbeddedEngine(loaded(tiny_llava), EngineConfig(decoder="eager"))
    assert engine.stats().is_canary_passed is None
    assert engine.stats().prefix["own"] == CacheUse()
    monkeypatch.setattr("server.engine.canary.TOLERANCE", -1.0)
    with pytest.raises(EngineError, match="canary"):
        engine.start()
    assert engine.stats().is_canary_passed is False
