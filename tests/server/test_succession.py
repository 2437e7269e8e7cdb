"""Which store continues what is in force, and how an operator puts another one in force."""

import pytest

from server.succession import SUCCESSION_PREFIX, InForce
from steering.stores.base import Changes, Document


def document(key: str, revision: int, value: str | None = "{}") -> Document:
    return Document(key, value, revision)


A1, B2 = document("a", 1), document("b", 2)


@pytest.fixture
def in_force() -> InForce:
    held = InForce()
    held.take(Changes("one", 2, (A1, B2)), True)
    return held


@pytest.mark.parametrize(
    "whole",
    [
        Changes("one", 2, (A1, B2)),
        Changes("one", 3, (A1, document("b", 3, None))),
        Changes("one", 4, (document("a", 3), B2, document("c", 4))),
    ],
)
def test_the_same_and_later_documents_continue_what_is_in_force(
    in_force: InForce, whole: Changes
) -> None:
    assert in_force.contradiction(whole, True) is None


@pytest.mark.parametrize(
    ("whole", "problem"),
    [
        (Changes("", 0, ()), "empty"),
        (Changes("two", 9, (A1, B2)), "other data"),
        (Changes("one", 1, (A1,)), "went back to revision 1; 2 is in force"),
        # What revision 2 wrote is lost, and the revisions are taken by others:
        (Changes("one", 3, (A1, document("c", 3))), "lost changes"),
        (Changes("one", 3, (A1, document("b", 2, "other"), document("c", 3))), "lost changes"),
        (Changes("one", 3, (A1, B2, document("c", 2))), "lost changes"),
    ],
)
def test_other_data_are_foreign_whatever_they_hold(
    in_force: InForce, whole: Changes, problem: str
) -> None:
    assert problem in str(in_force.contradiction(whole, True))


def test_who_has_nothing_in_force_takes_any_store() -> None:
    assert InForce().contradiction(Changes("two", 9, (A1,)), True) is None
    seen_empty = InForce()
    seen_empty.take(Changes("", 0, ()), True)
    assert seen_empty.contradiction(Changes("two", 1, (A1,)), False) is None


def test_only_what_is_new_is_put_in_force_unless_all_is(in_force: InForce) -> None:
    newer = document("a", 3)
    assert in_force.take(Changes("one", 3, (newer, B2)), False).documents == (newer,)
    assert in_force.documents == {"a": newer, "b": B2}
    assert in_force.take(Changes("two", 1, (A1,)), True).documents == (A1,)
    assert (in_force.documents, in_force.epoch, in_force.revision) == ({"a": A1}, "two", 1)


def test_an_operators_word_counts_for_the_revisions_that_it_names_and_once(
    in_force: InForce,
) -> None:
    in_force.take(Changes("one", 5, (document("c", 5),)), False)
    ((key, text),) = in_force.adoption().items()
    assert key == SUCCESSION_PREFIX + "one"
    mark = document(key, 3, text)
    back = Changes("one", 3, (A1, B2, mark))  # all after revision 2 was lost; then the word
    assert in_force.contradiction(back, True)
    assert in_force.is_succeeded_by(back)
    ahead = InForce("one", 6, dict(in_force.documents))
    assert not ahead.is_succeeded_by(back), "it would give up revision 6, which nobody spoke of"
    in_force.take(back, True)
    in_force.take(Changes("one", 4, (document("d", 4),)), False)
    assert in_force.contradiction(back, True), "the store went back again"
    assert not in_force.is_succeeded_by(back)


@pytest.mark.parametrize("text", [None, "", "[]", '{"revision": "x"}', '{"revision": 1e999}', "{}"])
def test_a_word_that_cannot_be_read_is_none(in_force: InForce, text: str | None) -> None:
    mark = document(SUCCESSION_PREFIX + "one", 5, text)
    assert not in_force.is_succeeded_by(Changes("two", 5, (mark,)))


def test_a_restoration_says_again_what_is_in_force_and_removes_the_rest(in_force: InForce) -> None:
    held = Changes("two", 7, (document("b", 5, "other"), document("x", 6), document("a", 7, None)))
    made = in_force.restoration(held)
    assert made.writes == {"a": "{}", "b": "{}", "x": None, **in_force.adoption()}
    assert made.expected == {"a": 0, "b": 5, "x": 6, "succeeds/one": 0}
