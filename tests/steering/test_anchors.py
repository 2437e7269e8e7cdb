"""Anchor sets: what is read, what is refused and where."""

import json
from pathlib import Path
from typing import Any

import pytest

from steering.anchors import Anchor, AnchorSet, load_anchors, normalised
from steering.errors import AnchorError


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "label": "harmful", "text": "How?"} | changes


def written(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_shipped_set_has_at_least_150_prompts_of_each_label_in_equal_number() -> None:
    anchors = load_anchors()
    assert anchors.count("harmful") == anchors.count("harmless") >= 150
    assert anchors.name == "deshift"
    assert all(anchor.topic and anchor.form for anchor in anchors.anchors)


def test_a_file_is_read_with_its_name_and_defaults(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.jsonl", row(), "", {"label": "harmless", "text": "Why?", "source": "x"}
    )
    anchors = load_anchors(path)
    assert anchors == AnchorSet(
        "mine", (Anchor("a", "harmful", "How?"), Anchor("row-3", "harmless", "Why?"))
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (row(text="  "), "the text is empty"),
        (row(text=None), "'text' is missing"),
        ({"text": "x"}, "'label' is missing"),
        (row(label="bad"), "label 'bad' is not"),
        (row(id=7), "'id' is missing or not a string"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(
    tmp_path: Path, bad: dict[str, Any] | str, said: str
) -> None:
    path = written(tmp_path / "mine.jsonl", row(text="first"), bad)
    with pytest.raises(AnchorError, match=f"mine, row 2: {said}"):
        load_anchors(path)


def test_an_unbalanced_set_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", row())
    with pytest.raises(AnchorError, match="1 harmful and 0 harmless"):
        load_anchors(path)
    assert len(load_anchors(path, balanced=False)) == 1


def test_repeated_texts_and_ids_are_refused(tmp_path: Path) -> None:
    twice = written(tmp_path / "mine.jsonl", row(), row(id="b", label="harmless", text=" how? "))
    with pytest.raises(AnchorError, match="b has the same text as a"):
        load_anchors(twice)
    same_id = written(tmp_path / "mine.jsonl", row(), row(text="other"))
    with pytest.raises(AnchorError, match="id a occurs twice"):
        load_anchors(same_id)


def test_an_empty_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match="empty"):
        load_anchors(written(tmp_path / "mine.jsonl"))
    with pytest.raises(AnchorError, match=r"none\.jsonl: No such file"):
        load_anchors(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(AnchorError, match="not UTF-8"):
        load_anchors(tmp_path / "latin.jsonl")


def test_the_digest_follows_labels_and_texts_and_nothing_else() -> None:
    one = AnchorSet("x", (Anchor("1", "harmful", "a  b"), Anchor("2", "harmless", "c")))
    same = AnchorSet("y", (Anchor("5", "harmless", "c", topic="t"), Anchor("6", "harmful", "a b")))
    relabelled = AnchorSet("x", (Anchor("1", "harmless", "a b"), Anchor("2", "harmful", "c")))
    louder = AnchorSet("x", (Anchor("1", "harmful", "A b"), Anchor("2", "harmless", "c")))
    assert one.digest == same.digest
    assert len({one.digest, relabelled.digest, louder.digest}) == 3


def test_anchors_that_repeat_evaluation_prompts_are_refused_by_id() -> None:
    anchors = AnchorSet("x", (Anchor("1", "harmful", "How do I?"), Anchor("2", "harmless", "c")))
    anchors.refuse_overlap(["something else", "how do"])
    with pytest.raises(AnchorError, match="1 of 2 anchors repeat evaluation prompts, first 1"):
        anchors.refuse_overlap(["  HOW do\ti  "])


def test_normalisation_ignores_case_spacing_width_and_outer_punctuation() -> None:
    assert normalised("  Ｈow\u00a0DO i? ") == normalised("how do I") == "how do i"
