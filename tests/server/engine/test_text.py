"""Decoding and stop strings: what is sent is never taken back."""

import pytest

from server.engine.text import Detokenizer, StopMatcher
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_a_character_of_several_tokens_comes_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.step(token) for token in TOKENIZER.encode("é😀x")]
    assert [piece for piece in pieces if piece] == ["é", "😀", "x"]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.step(TOKENIZER.encode("é")[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_not_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    tokens = TOKENIZER.encode("a<|im_start|>b<pad>")
    assert "".join(detokenizer.step(token) for token in tokens) == "ab"


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "met"),
    [
        ((), ["ab", "c"], "abc", False),
        (("END",), ["xE", "N", "Dy"], "x", True),
        (("END",), ["xE", "N", "x"], "xENx", False),
        (("END",), ["EEN", "D"], "E", True),
        (("b", "ab"), ["xa", "b"], "x", True),
        (("aab",), ["aaa", "b"], "a", True),
        (("\n\n",), ["a\n", "b\n", "\nc"], "a\nb", True),
    ],
)
def test_stop_strings_across_pieces(
    stops: tuple[str, ...], pieces: list[str], expected: str, met: bool
) -> None:
    matcher = StopMatcher(stops)
    sent, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.step(piece)
        sent += text
        if stopped:
            break
    assert stopped == met
    assert sent + ("" if met else matcher.flush()) == expected


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.step("hello E") == ("hello ", False)
    assert matcher.step("x") == ("Ex", False)
