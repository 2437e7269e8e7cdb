"""Decoding and stop strings: what is sent is never taken back."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.text import Detokenizer, StopMatcher, token_bytes
from tests.tiny_tokenizers import byte_tokenizer

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


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2's kind: pieces with a space mark, and bytes as a fallback."""
    pieces = ["<unk>", "\u2581a", "\u2581b", "b", "\u00e9", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES = 5  # the first byte's token
EURO = (0xE2 + BYTES, 0x82 + BYTES, 0xAC + BYTES)


def test_whole_characters_decode_as_they_do_at_once() -> None:
    tokenizer = sentencepiece_tokenizer()
    chance = random.Random(1)
    for _ in range(100):
        parts = [chance.choice([(1,), (2,), (3,), (4,), (10 + BYTES,), EURO]) for _ in range(20)]
        tokens = [token for part in parts for token in part]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.step(token) for token in tokens) + detokenizer.flush()
        assert text == tokenizer.decode(tokens)


def test_any_tokens_of_a_byte_fallback_tokenizer_can_be_decoded() -> None:
    """A newline, a broken character and a word once raised, which ended the engine."""
    detokenizer = Detokenizer(sentencepiece_tokenizer())
    chance = random.Random(2)
    for _ in range(3000):
        detokenizer.step(chance.choice([1, 2, 3, 4, 10 + BYTES, *EURO]))
    detokenizer.flush()
    text = "".join(detokenizer.step(token) for token in (10 + BYTES, EURO[0], 3, 2))
    assert text.endswith("b b")


def test_words_keep_their_spaces() -> None:
    detokenizer = Detokenizer(sentencepiece_tokenizer())
    assert [detokenizer.step(token) for token in (1, 2, 3, 1)] == ["a", " b", "b", " a"]


def test_the_bytes_of_tokens_join_to_the_text() -> None:
    """Tokens of one character each once all reported the replacement character's bytes."""
    ids = TOKENIZER.encode("\u00e9<|im_end|>")
    assert [token_bytes(TOKENIZER, i) for i in ids] == [b"\xc3", b"\xa9", b"<|im_end|>"]
    tokenizer = sentencepiece_tokenizer()
    pieces = [token_bytes(tokenizer, i) for i in (2, 4, 0xC3 + 5, 0xA9 + 5)]
    assert b"".join(pieces).decode() == " b\u00e9\u00e9"


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
