"""Our own prompts, and how suites are split."""

import json
from pathlib import Path

import pytest

from steering.anchors import load_anchors, normalised
from steering.demo.train_text import prompts
from steering.errors import EvaluationError
from steering.evaluate.development import default, read, split


def test_held_out_prompts_are_those_that_the_model_was_not_trained_on() -> None:
    harmful, harmless = read(["held-out"], 1000, 1)
    for suite, name in ((harmful, "harmful"), (harmless, "harmless")):
        assert suite.name == f"held-out-{name}" and {i.kind for i in suite.items} == {name}
        assert {item.prompt for item in suite.items} == set(prompts(name, held_out=True))
        assert suite.available == len(suite.items)
    everything = read(["development"], 10_000, 1)
    assert [len(suite.items) for suite in everything] == [436, 873]


def test_nothing_that_the_vectors_were_made_of_is_among_them() -> None:
    anchors = {normalised(anchor.text) for anchor in load_anchors().anchors}
    for suite in read(["development"], 10_000, 1):
        assert not anchors & {normalised(item.prompt) for item in suite.items}


def test_a_suites_anchors_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    texts = [load_anchors().anchors[0].text.upper(), "Some other prompt"]
    rows = ({"id": str(n), "prompt": text, "kind": "harmful"} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (suite,) = read([str(path)], 10, 1)
    assert [item.prompt for item in suite.items] == ["Some other prompt"]


def test_a_larger_number_has_the_same_prompts_first() -> None:
    few, many = (read(["held-out"], num, 3)[0].items for num in (5, 20))
    assert many[:5] == few
    assert read(["held-out"], 5, 4)[0].items != few


def test_suites_are_split_without_common_items_and_too_few_are_said() -> None:
    said: list[str] = []
    suites = read(["held-out", "rendered"], 60, 1)
    items = split(suites, 40, 20, said.append)
    assert [len(suite) for suite in items.search] == [27, 40, 40]
    assert [len(suite) for suite in items.confirm] == [20, 20, 20]
    assert said == ["held-out-harmful: 47 prompts, 27 to search with, 20 to confirm with"]
    for search, fresh in zip(items.search, items.confirm, strict=True):
        assert not {item.id for item in search} & {item.id for item in fresh}
    both = split(suites, 48, 120, said.append)
    assert (len(both.search[0]), len(both.confirm[0])) == (24, 23)
    swept = split(suites, 40, 0, said.append)
    assert [len(suite) for suite in swept.search] == [40, 40, 40] and not swept.fresh
    with pytest.raises(EvaluationError, match="one prompt is too few"):
        split(read(["rendered", "held-out"], 1, 1), 1, 1, said.append)


def test_mistakes_are_said() -> None:
    assert default(True) == ["held-out", "rendered"] and default(False)[0] == "development"
    with pytest.raises(EvaluationError, match="no suite has harmful prompts"):
        read(["rendered"], 3, 1)
    with pytest.raises(EvaluationError, match="two suites have the same name"):
        read(["held-out", "held-out"], 3, 1)
