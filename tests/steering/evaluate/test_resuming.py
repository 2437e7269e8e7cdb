"""Runs that are killed, finished, moved or continued, and what they keep on disk."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from steering.errors import EvaluationError
from steering.evaluate.conditions import parse
from steering.evaluate.evaluation import Evaluation, Sampling
from steering.evaluate.pictures import Photos, photos
from steering.evaluate.record import Answer, RunDir
from steering.evaluate.run import Tally
from steering.evaluate.suites import read_suite
from tests.server.fakes import FakeEngine
from tests.steering.evaluate.small_runs import (
    CONDITIONS,
    asked,
    asker,
    content,
    echo,
    make_evaluation,
)

pytestmark = pytest.mark.anyio


def test_a_killed_run_has_all_conditions_alike(tmp_path: Path) -> None:
    order = make_evaluation(tmp_path / "data", 40).asked()
    for cut in range(0, len(order), 7):
        counts = [sum(c.name == name for _, c in order[:cut]) for name in CONDITIONS]
        assert max(counts) - min(counts) <= 1
        suites = [sum(i.suite == name for i, _ in order[:cut]) for name in ("first", "second")]
        assert abs(suites[0] - suites[1]) <= 32 * len(CONDITIONS)
    digests = [item.picture_digest for item, _ in order[: 64 * len(CONDITIONS)]]
    changes = sum(one != other for one, other in zip(digests, digests[1:], strict=False))
    assert changes == 2  # three pictures, each back to back within the first round


async def test_a_killed_run_resumes_and_is_the_same_as_one_that_was_not(tmp_path: Path) -> None:
    evaluation, engine = make_evaluation(tmp_path / "data"), FakeEngine(echo)
    num_done = 0

    def kill(_: Answer) -> None:
        nonlocal num_done
        num_done += 1
        if num_done == 17:
            running.cancel()

    async with asker(engine) as deshift:
        await asked(evaluation, deshift, tmp_path / "whole")
        running = asyncio.create_task(asked(evaluation, deshift, tmp_path / "killed", done=kill))
        with pytest.raises(asyncio.CancelledError):
            await running
        path = tmp_path / "killed" / "answers.jsonl"
        num_known = len(path.read_text().splitlines()) - 1
        assert 16 <= num_known < 24  # others were under way beside the seventeenth
        path.write_bytes(path.read_bytes()[:-20])  # torn in its last line
        assert len(RunDir(tmp_path / "killed").answers()) == num_known
        engine.requests.clear()
        tally = await asked(evaluation, deshift, tmp_path / "killed", resume=True)
    assert tally == Tally(num_asked=48, num_known=num_known, num_errors=0)
    assert len(engine.requests) == len(CONDITIONS) + 48 - num_known  # a check before what is left
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    whole, killed = (
        json.loads((tmp_path / n / "run.json").read_text()) for n in ("whole", "killed")
    )
    assert whole["settings"] == killed["settings"]
    assert (len(whole["starts"]), len(killed["starts"])) == (1, 2)


async def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    evaluation, engine = make_evaluation(tmp_path / "data", 2), FakeEngine(echo)
    async with asker(engine) as deshift:
        await asked(evaluation, deshift, tmp_path / "run")
        before = content(tmp_path / "run")
        tally = await asked(evaluation, deshift, tmp_path / "run", resume=True)
    assert (tally.num_known, tally.num_asked) == (16, 16) and content(tmp_path / "run") == before


async def test_other_settings_are_another_run_and_the_difference_is_named(tmp_path: Path) -> None:
    evaluation, out = make_evaluation(tmp_path / "data"), tmp_path / "run"
    async with asker(FakeEngine(echo)) as deshift:
        await asked(evaluation, deshift, out)
        with pytest.raises(EvaluationError, match="holds a run already: give --resume"):
            await asked(evaluation, deshift, out)
        stronger = tuple(parse(text) for text in (*CONDITIONS[:3], "dataset:alpha=0.5"))
        more = make_evaluation(tmp_path / "data", 7)
        for change, words in [
            ({"sampling": Sampling(max_tokens=64)}, "sampling.max_tokens is 32 there and 64 here"),
            ({"conditions": stronger}, "steering.alpha is 0.25 there and 0.5 here"),
            ({"suites": more.suites}, "suites[first].num is 6 there and 7 here"),
            ({"photos": Photos("x", (b"1",))}, "photos.num is 3 there and 1 here"),
            ({"checkpoint": "c" * 64}, "checkpoint is null there"),
            ({"setup": "d" * 64}, "setup is null there"),
        ]:
            with pytest.raises(EvaluationError) as error:
                await asked(replace(evaluation, **change), deshift, out, resume=True)
            assert words in str(error.value), error.value
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").touch()
        with pytest.raises(EvaluationError, match="is not empty and holds no run"):
            await asked(evaluation, deshift, tmp_path / "full", resume=True)


async def test_the_same_prompts_from_another_place_are_the_same_run(tmp_path: Path) -> None:
    async with asker(FakeEngine(echo)) as deshift:
        await asked(make_evaluation(tmp_path / "data", 2), deshift, tmp_path / "run")
        moved = make_evaluation(tmp_path / "moved", 2)
        tally = await asked(moved, deshift, tmp_path / "run", resume=True)
    assert tally.num_known == 16


async def test_run_json_holds_what_it_takes_to_repeat_the_run(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "data", max_tokens=8, seed=5)
    async with asker(FakeEngine(echo)) as deshift:
        await asked(evaluation, deshift, tmp_path / "run")
    folder = RunDir(tmp_path / "run")
    settings = folder.settings()
    assert (settings["model"], settings["is_deshift"]) == ("tiny", True)
    assert settings["sampling"] == {"max_tokens": 8, "seed": 5, "temperature": 0.0}
    assert settings["conditions"][3] == {
        "name": "dataset:alpha=0.25",
        "picture": "own",
        "steering": {"mode": "dataset", "alpha": 0.25},
        "asked": {"first": 6, "second": 6},
    }
    assert settings["suites"][0] == {
        "name": "first",
        "seed": 1,
        "skip": 0,
        "num": 6,
        "available": 6,
        "kinds": {"harmful": 6},
        "digest": evaluation.suites[0].digest,
        "repeats_anchors": [],
    }
    assert settings["photos"] == {"num": 3, "digest": evaluation.photos.digest}
    assert len(settings["vectors"]["vector"]) == 64 and len(settings["anchors"]["digest"]) == 64
    restored = folder.items()
    assert restored == evaluation.items
    assert [item.digest for item in restored] == [item.digest for item in evaluation.items]


async def test_pictures_of_our_own_making_are_kept_with_the_run(tmp_path: Path) -> None:
    suite = read_suite("rendered", 2, 0)
    evaluation = Evaluation((suite,), (parse("base"),), photos(None))
    async with asker(FakeEngine(echo)) as deshift:
        await asked(evaluation, deshift, tmp_path / "run")
    restored = RunDir(tmp_path / "run").items()
    assert [item.picture() for item in restored] == [item.image for item in suite.items]
    assert [item.answers for item in restored] == [item.answers for item in suite.items]


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    with folder.appending(), pytest.raises(EvaluationError, match="another process goes on"):
        RunDir(tmp_path).appending().__enter__()
    with RunDir(tmp_path).appending():  # the first has ended
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"condition": "base"}\n')
    with pytest.raises(EvaluationError, match=r"answers\.jsonl, line 1: not an answer"):
        RunDir(tmp_path).answers()
