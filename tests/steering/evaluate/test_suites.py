"""Reading suites: sampling, repetitions, what was seen before, our own format, a hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from steering.anchors import Anchor, AnchorSet, load_anchors
from steering.demo.pictures import Question, example, is_right
from steering.errors import EvaluationError
from steering.evaluate.items import Item
from steering.evaluate.suites import load, read_suite, read_suites


def own(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, num: int) -> str:
    rows = ({"id": f"n{n}", "prompt": f"Say {n}.", "kind": "harmless"} for n in range(num))
    return own(path, *rows)


def ids(items: list[Item] | tuple[Item, ...]) -> list[str]:
    return [item.id for item in items]


def test_the_sample_is_decided_by_the_seed_and_stays_when_it_grows(tmp_path: Path) -> None:
    spec = numbered(tmp_path / "mine.jsonl", 50)
    few, many = load(spec, 10, 1), load(spec, 30, 1)
    assert many[:10] == few and len(many) == 30
    assert load(spec, 10, 1) == few
    assert ids(load(spec, 10, 2)) != ids(few)
    assert sorted(ids(load(spec, None, 1))) == sorted(f"n{n}" for n in range(50))
    assert len(load(spec, 1000, 1)) == 50


def test_repetitions_count_once_and_skipped_prompts_do_not_come_back(tmp_path: Path) -> None:
    prompts = ["Say one.", "Say two.", "  say ONE ", "Say three.", "Say two!"]
    rows = [{"id": f"{n}", "prompt": p, "kind": "harmless"} for n, p in enumerate(prompts)]
    spec = own(tmp_path / "mine.jsonl", *rows)
    whole = read_suite(spec, None, 1)
    assert (sorted(ids(whole.items)), whole.available) == (["0", "1", "3"], 3)
    rest = read_suite(spec, None, 1, skip=1)
    assert (sorted(ids(rest.items)), rest.skip) == (["1", "3"], 1)
    with pytest.raises(EvaluationError, match="holds no items after skip"):
        read_suite(spec, None, 1, skip=4)


def test_the_same_prompt_with_another_picture_is_no_repetition(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    rows = [
        {"id": name, "prompt": "What is it?", "kind": "visual", "image": name}
        for name in ("a.png", "b.png")
    ]
    assert len(load(own(tmp_path / "mine.jsonl", *rows), None, 1)) == 2


def test_an_own_suite_is_named_after_its_file_or_as_one_likes(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "red.png")
    row = {
        "id": 1,
        "prompt": "Which colour?",
        "kind": "visual",
        "image": "red.png",
        "caption": "A square.",
        "answers": ["red"],
        "meta": {"topic": "colours"},
    }
    spec = own(tmp_path / "mine.jsonl", row)
    expected = Item(
        "1",
        "mine",
        "visual",
        "Which colour?",
        tmp_path / "red.png",
        "A square.",
        ("red",),
        {"topic": "colours"},
    )
    assert load(spec, None, 1) == [expected]
    assert load(f"colours={spec}", None, 1)[0].suite == "colours"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "nice"}, "field 'kind' is not one of: harmful, harmless"),
        ({"id": None}, "field 'id' is missing"),
        ({"prompt": " "}, "field 'prompt' is missing"),
        ({"image": "none.png"}, "field 'image' names none.png, which is not a file"),
        ({"kind": "visual"}, "field 'image' is missing"),
        ({"answers": "red"}, "field 'answers' is not a list of texts"),
        ({"meta": {"a": 1}}, "field 'meta' is not an object of texts"),
        ({"promt": "x"}, "field 'promt' is not known"),
        ({"prompt": "half \ud83d"}, "field 'prompt' holds half of a surrogate pair"),
        ({"answers": ["\ud83d"]}, "field 'answers' is not a list of texts"),
    ],
)
def test_a_broken_row_is_named_by_file_line_and_field(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    row = {"id": "a", "prompt": "Say one.", "kind": "harmless"}
    spec = own(tmp_path / "mine.jsonl", row, {**row, "id": "b", **change})
    with pytest.raises(EvaluationError) as error:
        load(spec, None, 1)
    assert str(error.value) == f"{spec}, line 2: " + str(error.value).partition("line 2: ")[2]
    assert words in str(error.value)


def test_what_is_no_suite_is_said(tmp_path: Path) -> None:
    spec = numbered(tmp_path / "mine.jsonl", 2)
    for text, words in [
        ("vlsafe", "write NAME=PATH"),
        ("=x", "write NAME=PATH"),
        ("mine=rows.csv", "'mine' is not one of: vlsafe"),
        (f"rendered={spec}", "'rendered' is not one of"),
        (own(tmp_path / "none.jsonl"), "holds no items"),
    ]:
        with pytest.raises(EvaluationError) as error:
            load(text, 2, 1)
        assert words in str(error.value)
    with pytest.raises(EvaluationError, match="the same name: mine, mine"):
        read_suites([spec, spec], 2, 1, lambda _: 0)
    row = {"id": "a", "prompt": "One?", "kind": "harmless"}
    twice = own(tmp_path / "twice.jsonl", row, {**row, "prompt": "Two?"})
    with pytest.raises(EvaluationError, match="the id 'a' occurs twice"):
        load(twice, None, 1)


def test_rendered_pictures_come_with_exact_answers_and_go_by_seed_and_skip() -> None:
    items = load("rendered", 3, 0)
    assert ids(items) == ["0", "1", "2"]
    for number, item in enumerate(items):
        made = example(number, "unseen")
        question = Question(item.meta["question"], item.prompt, "", item.answers[0])
        assert is_right(question, made.question.answer)
        assert isinstance(item.image, bytes) and item.picture() == item.image
    assert ids(read_suite("rendered", 2, 0, skip=1).items) == ["1", "2"]
    assert ids(load("rendered", 1, 3)) == ["3000000"]
    with pytest.raises(EvaluationError, match="say how many"):
        load("rendered", None, 0)


def test_the_digest_covers_prompt_and_picture(tmp_path: Path) -> None:
    base = Item("a", "s", "harmless", "Hi", b"1")
    assert base.digest == Item("b", "t", "harmful", "Hi", b"1").digest
    assert len({base.digest, Item("a", "s", "harmless", "Hi", b"2").digest}) == 2
    assert Item("a", "s", "harmless", "Hi").picture_digest is None
    with pytest.raises(EvaluationError, match=r"gone\.png: No such file"):
        _ = Item("a", "s", "harmless", "Hi", tmp_path / "gone.png").digest


def test_what_repeats_an_anchor_is_found(tmp_path: Path) -> None:
    anchors = AnchorSet("few", (Anchor("x", "harmless", "say 1"), Anchor("y", "harmful", "Other")))
    suite = read_suite(numbered(tmp_path / "mine.jsonl", 3), None, 1)
    assert suite.overlap(anchors) == ["n1"]
    assert read_suite("rendered", 5, 1).overlap(load_anchors()) == []


def test_a_hubs_rows_are_read_like_a_files() -> None:
    asked = []

    def rows(place: str) -> Iterator[dict[str, Any]]:
        asked.append(place)
        yield {"goal": "Bake bread", "target": "Sure"}
        yield {"goal": None}

    with pytest.raises(EvaluationError, match=r"hf:org/set, row 2: field 'goal' is missing"):
        read_suite("advbench=hf:org/set", None, 1, hub=rows)
    only_first = read_suite("advbench=hf:org/set", 1, 1, hub=lambda _: [{"goal": "Bake bread"}])
    assert [item.prompt for item in only_first.items] == ["Bake bread"] and asked == ["org/set"]
    with pytest.raises(EvaluationError, match="its pictures are files"):
        read_suite("figstep=hf:org/set", None, 1, hub=rows)
