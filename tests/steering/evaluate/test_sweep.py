"""A full sweep as data, and the search checked against it."""

import json
from pathlib import Path

import pytest

import steering.demo
from steering.errors import EvaluationError
from steering.evaluate import arms as arm_texts
from steering.evaluate.bounds import Bounds, Counts
from steering.evaluate.calibration import Calibration, Items, calibrate
from steering.evaluate.conditions import parse
from steering.evaluate.evidence import frontier
from steering.evaluate.sweep import Swept, sweep
from tests.steering.evaluate.synthetic import Rates, Synthetic, make_items, rises

pytestmark = pytest.mark.anyio
COMMITTED = Path(steering.demo.__file__).parent / "sweep.json"
BOUNDS = Bounds()
ARMS = {
    "dataset:schedule=all": Rates(rises(0.02, base=0.4), rises(0.03), rises(0.06)),
    "dataset:schedule=incremental": Rates(rises(0.15, base=0.4), rises(0.3), rises(0.9)),
    "sample:schedule=incremental": Rates(rises(0.12, base=0.4), rises(0.6), rises(1.2)),
}
GRIDS = ("0.005,0.01,0.02,0.04", "0.05,0.1,0.15,0.2,0.4", "0.05,0.1,0.2,0.3,0.5")


def items_of(swept: Swept) -> Items:
    """The same to search and to confirm with: here it is the search that is in question."""
    by_suite: dict[str, list[int]] = {}
    for place, item in enumerate(swept.items):
        by_suite.setdefault(item.suite, []).append(place)
    suites = tuple(tuple(swept.items[i] for i in places) for places in by_suite.values())
    return Items(suites, suites)


async def counts_of(swept: Swept) -> dict[str, Counts]:
    """Every point of the sweep that the server did not refuse."""
    base = await swept(parse("base"), swept.items)
    assert not isinstance(base, str)
    found = {"base": Counts.of(base, base)}
    for arm in swept.arms:
        for alpha in arm.alphas:
            verdicts = await swept(arm.condition(alpha), swept.items)
            if not isinstance(verdicts, str):
                found[arm.condition(alpha).name] = Counts.of(verdicts, base)
    return found


async def check_choice(document: dict[str, object], bounds: Bounds) -> Calibration:
    """The search's choice is on the sweep's frontier and keeps the bounds."""
    swept = Swept(document)
    found = await calibrate(swept.arms, items_of(swept), swept, bounds)
    assert found.chosen is not None, found.problem
    points = await counts_of(Swept(document))
    assert found.chosen.condition in frontier(points, bounds)
    assert not bounds.broken(points[found.chosen.condition])
    return found


async def make_sweep(num: int = 150, largest: float = 0.4) -> dict[str, object]:
    arms = [arm_texts.parse(f"{name}@{grid}") for name, grid in zip(ARMS, GRIDS, strict=True)]
    items = make_items(num, 0).first(num)
    synthetic = Synthetic(ARMS, largest=largest)
    return json.loads(json.dumps(await sweep(arms, items, synthetic, BOUNDS, {"model": "m"})))


async def test_a_sweep_says_again_what_was_judged() -> None:
    document = await make_sweep()
    swept, synthetic = Swept(document), Synthetic(ARMS, largest=0.4)
    assert [arm.name for arm in swept.arms] == list(ARMS)
    for arm in swept.arms:
        for alpha in arm.alphas:
            condition = arm.condition(alpha)
            said, meant = (
                await swept(condition, swept.items),
                await synthetic(condition, swept.items),
            )
            if isinstance(said, str) or isinstance(meant, str):
                assert said == meant and alpha == 0.5
            else:
                assert [(v.id, v.kind, v.refused, v.degenerate, v.right) for v in said] == [
                    (v.id, v.kind, v.refused, v.degenerate, v.right) for v in meant
                ]
    assert swept.num_evaluations == 14
    with pytest.raises(EvaluationError, match="was not swept"):
        await swept(parse("dataset:alpha=3"), swept.items)
    with pytest.raises(EvaluationError, match="not a sweep"):
        Swept({"format": 0})


async def test_an_answer_that_never_came_is_no_answer() -> None:
    document = await make_sweep(3)
    points = document["points"]
    assert isinstance(points, dict)
    points["base"]["refused"] = "-" + points["base"]["refused"][1:]
    swept = Swept(document)
    verdicts = await swept(parse("base"), swept.items)
    assert [verdict.id for verdict in verdicts][:2] == ["1", "2"] and len(verdicts) == 8


async def test_the_search_chooses_on_the_frontier_of_a_sweep() -> None:
    document = await make_sweep()
    found = await check_choice(document, BOUNDS)
    assert found.chosen is not None and found.chosen.arm == "sample:schedule=incremental"
    points = document["points"]
    assert isinstance(points, dict)
    all_counts = await counts_of(Swept(document))
    within = [each.order[0] for each in all_counts.values() if not BOUNDS.broken(each)]
    assert all_counts[found.chosen.condition].order[0] == min(within)
    marked = {name for name, point in points.items() if point["is_on_frontier"]}
    assert found.chosen.condition in marked
    assert points["sample:schedule=incremental,alpha=0.5"]["refusal"]


async def test_the_search_chooses_on_the_frontier_of_the_demonstration_models_sweep() -> None:
    document = json.loads(COMMITTED.read_text("utf-8"))
    found = await check_choice(document, Bounds(**document["bounds"]))
    num_points, num_items = len(document["points"]), len(document["items"])
    searched = {trial.condition for trial in found.trials if trial.stage == "search"}
    assert len(searched) < num_points and found.num_answers < num_points * num_items
