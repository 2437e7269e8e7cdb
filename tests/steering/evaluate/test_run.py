"""Runs against the real HTTP layer with a scripted engine, in this process."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.engine.types import EngineRequest, Failed, QueueFullError
from steering.errors import EvaluationError
from steering.evaluate.client import Patience
from steering.evaluate.pictures import photos
from steering.evaluate.record import RunDir
from steering.evaluate.run import Tally
from steering.evaluate.suites import read_suite
from tests.server.fakes import FakeEngine, says
from tests.steering.evaluate.small_runs import (
    CONDITIONS,
    asked,
    asker,
    content,
    echo,
    make_evaluation,
)

pytestmark = pytest.mark.anyio


async def test_every_item_is_asked_in_every_condition_and_says_what_was_done(
    tmp_path: Path,
) -> None:
    evaluation, engine = make_evaluation(tmp_path / "data"), FakeEngine(echo)
    async with asker(engine) as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    answers = RunDir(tmp_path / "run").answers()
    assert tally == Tally(num_asked=2 * 6 * 4, num_known=0, num_errors=0)
    assert {answer.key for answer in answers} == {
        (condition, suite, f"n{n}")
        for condition in CONDITIONS
        for suite in ("first", "second")
        for n in range(6)
    }
    items = {(item.suite, item.id): item for item in evaluation.items}
    for answer in answers:
        item = items[answer.suite, answer.id]
        num_tokens = len(item.prompt) + 10 * (answer.condition != "text-only")
        mode, alpha = ("dataset", 0.25) if answer.condition.startswith("dataset") else ("off", 0)
        assert answer.answer == f"{num_tokens} {mode} {alpha}"
        assert (answer.digest, answer.kind, answer.error) == (item.digest, item.kind, None)
        assert answer.finish_reason == "stop" and answer.steering is not None
        assert answer.steering["reason"] == {
            "base": "disabled",
            "blank": "disabled",
            "text-only": "text-only",
        }.get(answer.condition)
    request = engine.requests[-1]
    assert (request.params.temperature, request.params.max_tokens) == (0.0, 32)


async def test_conditions_show_the_picture_that_they_say(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", 1, ("base", "blank", "noise", "text-only"))
    evaluation = replace(evaluation, suites=evaluation.suites[:1])
    item, engine = evaluation.items[0], FakeEngine(echo)
    async with asker(engine) as deshift:
        for condition in evaluation.conditions:
            await deshift.answer(item, condition)
    shown = [images for _, images in engine.prompts]
    assert [len(images) for images in shown] == [1, 1, 1, 0]
    assert isinstance(item.image, Path)
    own, blank, noise = (images[0].convert("RGB") for images in shown[:3])
    assert own.tobytes() == Image.open(item.image).convert("RGB").tobytes()
    assert blank.size == noise.size == own.size
    assert set(blank.get_flattened_data()) == {(255, 255, 255)}
    assert len(set(noise.get_flattened_data())) > 12


async def test_a_caption_takes_the_place_of_the_picture(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", 2, ("caption",))
    with pytest.raises(EvaluationError, match="condition 'caption': no item has a caption"):
        evaluation.asked()
    told = replace(evaluation.suites[0].items[0], caption="A red square.")
    suite = replace(evaluation.suites[0], items=(told, evaluation.suites[0].items[1]))
    evaluation, engine = replace(evaluation, suites=(suite,)), FakeEngine(echo)
    async with asker(engine) as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    assert tally.num_asked == 1
    [messages, images] = engine.prompts[-1]
    assert messages[0]["content"][0]["text"] == f"The picture shows: A red square.\n\n{told.prompt}"
    assert len(images) == 0
    settings = RunDir(tmp_path / "run").settings()
    assert settings["conditions"][0]["asked"] == {"first": 1}


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    class Busy(FakeEngine):
        num_refused = 0

        def submit(self, request: EngineRequest) -> None:
            self.num_refused += 1
            if self.num_refused % 2:
                raise QueueFullError("the queue is full")
            super().submit(request)

    engine = Busy(echo)
    evaluation = make_evaluation(tmp_path / "data", 2, ("base",))
    patient = Patience(attempts=50, first_wait_s=0.001, longest_wait_s=0.002)
    async with asker(engine, patient) as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    assert (tally.num_asked, tally.num_errors) == (4, 0)
    assert len(engine.requests) == 5 and engine.num_refused == 10


async def test_a_failed_answer_is_recorded_counted_and_asked_again(tmp_path: Path) -> None:
    lock, fail = threading.Lock(), [1]

    def script(request: EngineRequest) -> Iterator[Any]:
        with lock:
            broken = bool(fail) and len(request.inputs.prompt) == len("Say xx") + 10
        if broken:
            yield Failed("engine", "a kernel broke")
        else:
            yield from echo(request)

    evaluation, out = make_evaluation(tmp_path / "data", 3, ("base",)), tmp_path / "run"
    async with asker(FakeEngine(script)) as deshift:
        tally = await asked(evaluation, deshift, out)
        assert (tally.num_asked, tally.num_errors) == (6, 2)
        failed = [answer for answer in RunDir(out).answers() if answer.error]
        assert [(a.id, a.answer, a.finish_reason) for a in failed] == [("n2", "", None)] * 2
        assert all(a.error and a.error.startswith("500 generation_engine") for a in failed)
        fail.clear()
        tally = await asked(evaluation, deshift, out, resume=True)
    assert (tally.num_known, tally.num_errors) == (4, 0)
    answers = RunDir(out).answers()
    assert len(answers) == 6 and not any(answer.error for answer in answers)
    assert len(content(out)) == 8  # what went wrong stays on record


async def test_an_answer_that_was_not_steered_as_asked_is_an_error(tmp_path: Path) -> None:
    """A server that serves unsteered instead would count as an ineffective method."""
    evaluation = make_evaluation(tmp_path / "data", 1, ("sample:alpha=0.5",))
    script = says("Hello", shift_failure="no shift")
    async with asker(FakeEngine(script), on_error="serve-unsteered") as deshift:
        with pytest.raises(EvaluationError, match=r"steering\.mode was 'off' \(shift-failed\)"):
            await asked(evaluation, deshift, tmp_path / "run")
        answer = await deshift.answer(*evaluation.asked()[0])
    assert answer.answer == "" and "asked for was 'sample'" in str(answer.error)


@pytest.mark.parametrize(
    ("settings", "condition", "words"),
    [
        ({"client_override": "none"}, "base", "DESHIFT_CLIENT_OVERRIDE=any"),
        ({"vectors": False}, "dataset:alpha=1", "make some with `deshift extract`"),
        ({}, "dataset:alpha=9", "alpha 9 is outside 0..2"),
        ({}, "dataset:schedule=single:99", "names layer 99"),
    ],
)
async def test_what_the_server_will_not_do_is_said_before_the_run(
    settings: dict[str, Any], condition: str, words: str, tmp_path: Path
) -> None:
    evaluation = make_evaluation(tmp_path / "data", 1, (condition,))
    async with asker(FakeEngine(echo), **settings) as deshift:
        with pytest.raises(EvaluationError) as error:
            await asked(evaluation, deshift, tmp_path / "run")
    assert words in str(error.value) and f"condition {condition!r}" in str(error.value)
    assert not (tmp_path / "run").exists()


async def test_text_conditions_and_the_policys_own_need_no_permission(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", 1, ("text-only", "served"))
    async with asker(FakeEngine(echo), client_override="none") as deshift:
        tally = await asked(evaluation, deshift, tmp_path / "run")
    assert tally == Tally(4, 0, 0)
    served = [a for a in RunDir(tmp_path / "run").answers() if a.condition == "served"]
    assert {(a.steering or {}).get("alpha") for a in served} == {0.5}


def test_photographs_are_dealt_evenly_and_the_same_when_the_sample_grows(tmp_path: Path) -> None:
    make_evaluation(tmp_path, 20)
    few, many = (
        photos(tmp_path).dealt(read_suite(str(tmp_path / "first.jsonl"), num, 1), 1).items
        for num in (6, 9)
    )
    assert few == many[:6]
    images = [item.image for item in many]
    assert {images.count(image) for image in images} == {3} and len(set(images)) == 3


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(EvaluationError, match=r"a\.jpg: not a picture"):
        photos(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"no \.jpg"):
        photos(tmp_path)
    assert photos(None).source == "rendered" and len(photos(None).images) == 32
